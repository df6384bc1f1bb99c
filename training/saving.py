"""Which checkpoint a run writes and reads: one process in its own layout, several processes sharded, DeepSpeed its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from optc.compiler.diagnostics import InputError
from optc.training import checkpoint
from optc.training.checkpoint import RunState
from optc.training.deepspeed_checkpoint import load_deepspeed, save_deepspeed
from optc.training.deepspeed_zero import EngineOptimizer
from optc.training.parallel import sum_over_ranks
from optc.training.setup import Run
from optc.training.sharded_checkpoint import load_sharded, save_sharded
from optc.training.state_file import read_state_file


class _Layout(NamedTuple):
    """A way to write checkpoints: who does, the file that only it has, and the values of parallel.kind that read it."""

    writer: str
    state: str
    kinds: str


_ONE = _Layout("one process", "checkpoint.json", "none")
_SHARDED = _Layout("several processes", "state.json", "ddp, zero1 or fsdp")
_DEEPSPEED = _Layout("DeepSpeed", "deepspeed.json", "deepspeed")
_OF_KIND = {"none": _ONE, "deepspeed": _DEEPSPEED}  # the others: several processes


class _RunOfSeveral(msgspec.Struct, frozen=True):
    """The part of state.json and deepspeed.json that is about the run."""

    extra: RunState


def save_run(run: Run, start: RunState, folder: Path) -> Path:
    """Write the checkpoint of a run's step; every rank calls it.

    Args:
        start: the state that the run started or resumed from.
        folder: the run's folder.

    Raises:
        InputError, ResourceError: it cannot be written.
    """
    state = msgspec.structs.replace(
        start,
        step=run.step,
        position=run.reader.position,
        skipped=run.skipped,
        scaler=run.scaler.state_dict(),
        validation=run.validation,
        optimizer=checkpoint.OptimizerValues(),
    )
    place = checkpoint.folder_of(folder, run.step)
    if run.config.parallel.kind == "none":
        checkpoint.save(folder, state, run.model, run.optimizer)
    elif isinstance(run.optimizer, EngineOptimizer):
        save_deepspeed(place, run.model, run.optimizer, msgspec.to_builtins(state))
    else:
        save_sharded(place, run.model, run.optimizer, msgspec.to_builtins(state))
    if run.world.rank == 0:
        _remove_oldest(folder, run.config.saving.keep)
    return place


def _remove_oldest(folder: Path, keep: int) -> None:
    """Keep the newest checkpoints, and what was best when each of them was written: any of them may be resumed from."""
    states = [read_state(path) for path in checkpoint.checkpoints(folder)[-keep:]]
    checkpoint.remove_oldest(folder, keep, {state.validation.best_step for state in states if state.validation})


class SaveClock:
    """When a checkpoint is due for its age. The first rank's clock is everyone's."""

    def __init__(self, minutes: float) -> None:
        self._wait = minutes * 60
        self._last, self._took = time.monotonic(), 0.0

    def due(self, run: Run) -> bool:
        """Whether the newest checkpoint is older than it may be; every rank calls it."""
        if not self._wait:
            return False
        old = time.monotonic() - self._last >= max(self._wait, 20 * self._took)
        return sum_over_ranks(float(old and run.world.rank == 0), run.device) > 0

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around the writing of a checkpoint."""
        begun = time.monotonic()
        yield
        self._last = time.monotonic()
        self._took = self._last - begun


def resume_run(run: Run, now: RunState, folder: Path) -> RunState | None:
    """Bring a run to the state of its newest checkpoint; None when there is none.

    Raises:
        InputError: damaged, of another run, or of one process where there are several now (or the reverse).
    """
    found = checkpoint.checkpoints(folder)
    if not found:
        return None
    checkpoint.check_whole(found[-1])
    state = read_state(found[-1])
    checkpoint.check_same_run(found[-1], state, now)
    layout = _layout_of(found[-1])
    if layout is not _OF_KIND.get(run.config.parallel.kind, _SHARDED):
        raise InputError(
            f"the checkpoint was written by {layout.writer}",
            where=str(found[-1]),
            remedy=f"resume with parallel.kind={layout.kinds}",
        )
    _restore(run, found[-1], state)
    run.validation = state.validation
    run.step, run.skipped, run.reader.position = state.step, state.skipped, state.position
    if run.config.epochs is not None:  # with other ranks or accumulation an epoch may take another number of steps
        steps = run.step + run.reader.steps_of(run.config.epochs)
        run.config = msgspec.structs.replace(run.config, max_steps=steps)
    if run.scaler.is_enabled():
        run.scaler.load_state_dict(state.scaler)
    return state


def restore_best(run: Run, folder: Path) -> None:
    """Bring the weights to those of the best step of the run; every rank calls it, behind the last step.

    Raises:
        InputError: its checkpoint is damaged or missing.
    """
    assert run.validation is not None
    place = checkpoint.folder_of(folder, run.validation.best_step)
    checkpoint.check_whole(place)
    _restore(run, place, read_state(place))


def _restore(run: Run, place: Path, state: RunState) -> None:
    if isinstance(run.optimizer, EngineOptimizer):
        load_deepspeed(place, run.model, run.optimizer)
    elif _layout_of(place) is _SHARDED:
        load_sharded(place, run.model, run.optimizer)
    else:
        checkpoint.restore(place, state, run.model, run.optimizer)


def read_state(folder: Path) -> RunState:
    """The plain part of a checkpoint of any layout.

    Raises:
        InputError: missing, malformed, or of another format.
    """
    layout = _layout_of(folder)
    if layout is _ONE:
        return checkpoint.read_state(folder)
    path = folder / layout.state
    return checkpoint.check_format(read_state_file(path, _RunOfSeveral).extra, path)


def _layout_of(folder: Path) -> _Layout:
    return next((layout for layout in (_SHARDED, _DEEPSPEED) if (folder / layout.state).is_file()), _ONE)
