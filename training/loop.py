"""A training run from config to model folder: steps, log, checkpoints, resume, and the folder that is published."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from optc.compiler.artifact.publishing import check_output, remove_abandoned, remove_folder, write_folder
from optc.compiler.diagnostics import JSON_ERRORS, GateError, InputError, UsageError, ran_out_of_memory
from optc.compiler.files import read_plain
from optc.compiler.nesting import check_nesting
from optc.training import checkpoint
from optc.training.checkpoint import RunState
from optc.training.config import TrainConfig
from optc.training.deepspeed_zero import gather_state
from optc.training.export import write_trained
from optc.training.held_run import held_run, unfinished
from optc.training.metrics import MetricsLog, StepRecord
from optc.training.out_of_memory import out_of_memory
from optc.training.result import SUMMARY, TrainResult, validation_result
from optc.training.sample import can_sample, continuation, sample_of
from optc.training.saving import SaveClock, read_state, restore_best, resume_run, save_run
from optc.training.setup import Run, build_model, check_config, model_identity, prepare
from optc.training.state_file import MOST_BYTES
from optc.training.step import train_step
from optc.training.train_report import write_train_report
from optc.training.validation import is_best, is_due, measure_start, measured_step, stops_early
from optc.training.world import World

OnStep = Callable[[StepRecord], None]
OnNote = Callable[[str], None]
OnStart = Callable[[int, int], None]


class _Watch(NamedTuple):
    """Who is told of a run, on its first rank; on the others nobody."""

    on_start: OnStart | None = None
    on_step: OnStep | None = None
    on_note: OnNote | None = None

    def start(self, step: int, steps: int) -> None:
        if self.on_start is not None:
            self.on_start(step, steps)

    def step(self, record: StepRecord) -> None:
        if self.on_step is not None:
            self.on_step(record)

    def note(self, note: str | None) -> None:
        if self.on_note is not None and note is not None:
            self.on_note(note)


def plain_config(config: TrainConfig) -> dict[str, Any]:
    """The config as JSON has it."""
    return msgspec.json.decode(msgspec.json.encode(config), type=dict[str, Any])


def run_folder(output: Path) -> Path:
    """Where the log and the checkpoints of a run stand until it is done."""
    return output.with_name(output.name + ".run")


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    on_start: OnStart | None = None,
    on_step: OnStep | None = None,
    on_note: OnNote | None = None,
) -> TrainResult | None:
    """Train, and write a Hugging Face model folder to `config.output`. Every rank calls it; only the first has a result.

    Args:
        resume: go on from the newest checkpoint of the run for this output; without one, start.
        on_start: told there, before the first step, the step that the run stands at and how many it will make.
        on_step: called after each step on the first rank.
        on_note: told there, before the first step, what is done otherwise than asked for; it is in the result, too.

    Raises:
        UsageError: a contradicting config.
        InputError: unusable model or text; the output exists, or an unfinished run of it and not `resume`; a
            checkpoint of another run.
        GateError: a loss that is not finite, or no step changed a weight.
        ResourceError: out of memory or disk.
    """
    world = World.from_environment()
    check_config(config, world)
    if not config.output:
        raise UsageError("no output given", remedy="-o OUT")
    output = Path(config.output)
    folder = run_folder(output)
    if resume and (done := _finished(output, folder)) is not None:
        _check_updates(done)
        return done
    if world.rank == 0:
        check_output(output, force=False)
        if not resume and folder.exists():
            raise unfinished(folder)
    ours = not dist.is_initialized()
    with _memory_errors(config, world):
        result = _run(
            config, world, folder, resume, _Watch(on_start, on_step, on_note) if world.rank == 0 else _Watch()
        )
    if ours and dist.is_initialized():
        dist.barrier()  # the first rank writes the output while the others wait here
        dist.destroy_process_group()
    _check_updates(result)
    return result


def _run(config: TrainConfig, world: World, folder: Path, resume: bool, watch: _Watch) -> TrainResult | None:
    run = prepare(config, world)
    for note in run.notes:
        watch.note(note)
    start = _initial_state(run)
    with held_run(folder, new=not resume) if world.rank == 0 else nullcontext():
        resumed = resume_run(run, start, folder) if resume else None
        if run.validation is not None and resumed is None:
            watch.note(measure_start(run))
        if resumed is None and can_sample(run):
            start = msgspec.structs.replace(start, sample=continuation(run))
        watch.start(run.step, run.config.max_steps)
        records = _steps(run, resumed or start, folder, watch)
        if run.validation is not None and config.validation.keep_best and 0 < run.validation.best_step < run.step:
            restore_best(run, folder)
        whole = _whole_model(run)
        if world.rank > 0:
            return None
        assert whole is not None
        result = _result(run, resumed or start, records, resumed)
        _publish(run, whole, result, records, folder)
        return result


def _initial_state(run: Run) -> RunState:
    return RunState(
        step=0,
        position=run.reader.position,
        model=model_identity(run.config),
        corpus=run.reader.digest,
        config=plain_config(run.config),
        validation=run.validation,
        run=secrets.token_hex(8),
    )


def _steps(run: Run, state: RunState, folder: Path, watch: _Watch) -> list[StepRecord]:
    """All steps that are left. The first rank keeps the log."""
    config, clock = run.config, SaveClock(run.config.saving.minutes)
    log = MetricsLog(folder, step=run.step, tensorboard=config.tensorboard) if run.world.rank == 0 else None
    first = run.step
    last_good: str | None = None if state.step == 0 else str(checkpoint.folder_of(folder, state.step))
    try:
        while run.step < config.max_steps and not stops_early(run):
            ends = run.step in (first, config.max_steps - 1)
            record = train_step(run, last_good=last_good, with_memory=ends)
            if is_due(run):
                record = measured_step(run, record)
            if run.step == first + 1 and first > 0:
                record = msgspec.structs.replace(record, resumed=True)
            if log is not None:
                log.add(record)
            watch.step(record)
            if _saves(run, clock):
                if log is not None:
                    log.sync()
                with clock.saving():
                    last_good = str(save_run(run, state, folder))
        return [] if log is None else log.records
    finally:
        if log is not None:
            log.close()


def _saves(run: Run, clock: SaveClock) -> bool:
    """Whether a checkpoint is written behind the step that was made; every rank calls it."""
    every, last = run.config.saving.every, run.config.max_steps
    if is_best(run):
        return True
    return every > 0 and (run.step % every == 0 or run.step == last or stops_early(run) or clock.due(run))


def _check_updates(result: TrainResult | None) -> None:
    """Refuse a model that no step has changed; its folder is written, with the log that tells it."""
    if result is None or result.skipped < result.steps:
        return
    overflow = result.last.skipped == "overflow"
    raise GateError(
        f"none of the {result.steps} steps changed a weight",
        where=f"{Path(result.output) / 'log.jsonl'}: skipped",
        why=f"each was left out: {result.last.skipped}; the folder holds the weights that the run started from",
        remedy=f"set scaler.initial below {result.config['scaler']['initial']:g}, or precision=bf16"
        if overflow
        else "set a smaller optimizer.lr",
    )


def _result(run: Run, state: RunState, records: list[StepRecord], resumed: RunState | None) -> TrainResult:
    parameters = list(run.model.parameters())
    return TrainResult(
        output=run.config.output,
        run=state.run,
        steps=run.step,
        resumed_from=resumed.step if resumed else None,
        first_loss=records[0].loss,
        last_loss=records[-1].loss,
        tokens=sum(row.tokens for row in records),
        seconds=sum(row.seconds for row in records),
        parameters=sum(item.numel() for item in parameters),
        trainable=sum(item.numel() for item in parameters if item.requires_grad),
        config=plain_config(run.config),
        last=records[-1],
        skipped=sum(row.skipped is not None for row in records),
        validation=validation_result(run.validation, run.config, records),
        sample=None if state.sample is None else sample_of(run, state.sample, continuation(run)),
        notes=run.notes,
    )


def _whole_model(run: Run) -> nn.Module | None:
    """The model with all its weights on the first rank (of shards: a copy on the CPU); None on the others."""
    first = run.world.rank == 0
    state: Mapping[str, Any]
    if run.config.parallel.kind == "fsdp":
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(run.model, options=options)
    elif run.config.parallel.kind == "deepspeed":
        state = gather_state(run.model, keep=first)
    else:
        return run.model if first else None
    if not first:
        return None
    whole: nn.Module = build_model(run.config)
    whole.load_state_dict(state)
    return whole


def _publish(run: Run, model: nn.Module, result: TrainResult, records: list[StepRecord], folder: Path) -> None:
    """The model folder with log, report and summary, in one rename; then the run's folder goes."""
    output = Path(run.config.output)
    with write_folder(output, force=False) as directory:
        write_trained(model, Path(run.config.model), directory, run.config.saving.dtype, run.strays)
        shutil.copyfile(folder / "log.jsonl", directory / "log.jsonl")
        if (folder / "tensorboard").is_dir():
            shutil.copytree(folder / "tensorboard", directory / "tensorboard")
        write_train_report(directory, result, records)
        (directory / SUMMARY).write_bytes(msgspec.json.format(msgspec.json.encode(result)))
    if not run.config.saving.keep_run:
        remove_folder(folder)


def _finished(output: Path, folder: Path) -> TrainResult | None:
    """The result of a run that was killed after it had published its output, or None."""
    path = output / SUMMARY
    found = checkpoint.checkpoints(folder)
    if not path.is_file():
        return None
    data = read_plain(path, "reading the summary of the run", most=MOST_BYTES)
    try:
        result = msgspec.json.decode(data, type=TrainResult)
        check_nesting(result.config)
    except JSON_ERRORS as error:
        raise InputError(
            "the summary of the run is damaged",
            where=str(path),
            why=str(error),
            remedy="remove the output, and resume the run from its checkpoints",
        ) from error
    if found and read_state(found[-1]).run != result.run:
        return None
    if folder.is_dir():
        remove_folder(folder)
    remove_abandoned(folder)  # the kill may have come while it was removed
    return result


@contextmanager
def _memory_errors(config: TrainConfig, world: World) -> Iterator[None]:
    """Exhausted memory as a ResourceError that says what would need less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        raise out_of_memory(config, world.size, error) from error
