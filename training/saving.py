"""Which checkpoint a run writes and reads: one process in its own layout, several processes sharded, DeepSpeed its own."""

from __future__ import annotations

from pathlib import Path

import msgspec

from optc.compiler.diagnostics import InputError, os_errors
from optc.training import checkpoint
from optc.training.checkpoint import RunState
from optc.training.deepspeed_checkpoint import STATE as _DEEPSPEED
from optc.training.deepspeed_checkpoint import load_deepspeed, save_deepspeed
from optc.training.deepspeed_zero import EngineOptimizer
from optc.training.setup import Run
from optc.training.sharded_checkpoint import load_sharded, save_sharded

_SHARDED = "state.json"  # what only a sharded checkpoint has
_ONE, _SEVERAL = "one process", "several processes"
_WRITERS = {"none": _ONE, "deepspeed": "DeepSpeed"}
_KINDS = {_ONE: "none", _SEVERAL: "ddp, zero1 or fsdp", "DeepSpeed": "deepspeed"}


class _ShardedState(msgspec.Struct, frozen=True):
    """The part of a sharded checkpoint's state.json that is about the run."""

    extra: RunState


def save_run(run: Run, start: RunState, folder: Path) -> Path:
    """Write the checkpoint of a run's step; every rank calls it.

    Args:
        start: the state that the run started or resumed from.
        folder: the run's folder.

    Raises:
        InputError, ResourceError: it cannot be written.
    """
    keep = run.config.saving.keep
    state = msgspec.structs.replace(
        start, step=run.step, position=run.reader.position, skipped=run.skipped, scaler=run.scaler.state_dict(),
        optimizer=checkpoint.OptimizerValues(),
    )  # fmt: skip
    if run.config.parallel.kind == "none":
        return checkpoint.save(folder, state, run.model, run.optimizer, keep=keep)
    place = checkpoint.folder_of(folder, run.step)
    if isinstance(run.optimizer, EngineOptimizer):
        save_deepspeed(place, run.model, run.optimizer, msgspec.to_builtins(state))
    else:
        save_sharded(place, run.model, run.optimizer, msgspec.to_builtins(state))
    if run.world.rank == 0:
        checkpoint.remove_oldest(folder, keep)
    return place


def resume_run(run: Run, now: RunState, folder: Path) -> RunState | None:
    """Bring a run to the state of its newest checkpoint; None when there is none.

    Raises:
        InputError: damaged, of another run, or of one process where there are several now (or the reverse).
    """
    found = checkpoint.checkpoints(folder)
    if not found:
        return None
    state = read_state(found[-1])
    checkpoint.check_same_run(found[-1], state, now)
    written, kind = _written_by(found[-1]), run.config.parallel.kind
    if written != _WRITERS.get(kind, _SEVERAL):
        raise InputError(
            f"the checkpoint was written by {written}", where=str(found[-1]),
            remedy=f"resume with parallel.kind={_KINDS[written]}",
        )  # fmt: skip
    if isinstance(run.optimizer, EngineOptimizer):
        load_deepspeed(found[-1], run.model, run.optimizer)
    elif written == _SEVERAL:
        load_sharded(found[-1], run.model, run.optimizer)
    else:
        checkpoint.restore(found[-1], state, run.model, run.optimizer)
    run.step, run.skipped, run.reader.position = state.step, state.skipped, state.position
    if run.scaler.is_enabled():
        run.scaler.load_state_dict(state.scaler)
    return state


def read_state(folder: Path) -> RunState:
    """The plain part of a checkpoint of either layout.

    Raises:
        InputError: missing, malformed, or of another format.
    """
    written = _written_by(folder)
    if written == _ONE:
        return checkpoint.read_state(folder)
    path = folder / (_DEEPSPEED if written == "DeepSpeed" else _SHARDED)
    with os_errors("reading the checkpoint", str(path)):
        data = path.read_bytes()
    return checkpoint.check_format(checkpoint.decode(data, _ShardedState, path).extra, path)


def _written_by(folder: Path) -> str:
    if (folder / _DEEPSPEED).is_file():
        return "DeepSpeed"
    return _SEVERAL if (folder / _SHARDED).is_file() else _ONE
