"""Checkpoints of one process: whole or absent, without pickle, and resumed to the same numbers.

A checkpoint is a folder RUN/checkpoints/step-00000040 with

    checkpoint.json        step, data position, loss scale, the optimizer's plain values, what the run is about
    model.safetensors      trainable parameters and persistent buffers, by name (frozen weights are the model folder's)
    optimizer.safetensors  the optimizer's tensors, as PARAMETER::KEY
    SHA256SUMS             hashes of these, checked before one of them is read

Random numbers need no state: every generator is seeded at the beginning of each step from seed, step and rank.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from optc.compiler.artifact.publishing import write_folder
from optc.compiler.diagnostics import InputError, os_errors
from optc.compiler.files import damage, write_sums
from optc.training.data import Position
from optc.training.optimizers import place_state, plain_values, restore_groups
from optc.training.state_file import another_model, read_state_file

FORMAT = 2
_NAME = re.compile(r"step-(\d{8,12})")
_FREE = (
    "model",
    "output",
    "max_steps",
    "epochs",
    "gradient_accumulation",
    "device",
    "on_nan",
    "peak_tflops",
    "tensorboard",
    "saving",
    "validation",
    "checkpointing",
    "compile",
    "parallel",
)
"""Keys of the config that a resumed run may change: they do not change what is computed, but by rounding."""


Plain = float | int | bool


class OptimizerValues(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an optimizer keeps beside tensors.

    Attributes:
        parameters: name of a parameter -> key -> value.
        groups: key -> value of each group.
    """

    parameters: dict[str, dict[str, Plain]] = {}
    groups: list[dict[str, Plain]] = []


class ValidationState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the measurements of a validation set have said so far.

    Attributes:
        text: digest of its tokens.
        first, first_perplexity: before the first step; None where they were not finite.
        best, best_step: the least loss behind a step, and the step; 0 before there was one.
        waited: measurements since then.
    """

    text: str
    first: float | None = None
    best: float | None = None
    best_step: int = 0
    waited: int = 0
    first_perplexity: float | None = None


class RunState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything about a run that is not a tensor.

    Attributes:
        step: optimizer steps done.
        position: the next unit to read.
        skipped: steps in a row that were left out for a loss that is not finite.
        scaler: state of the loss scale; empty without one.
        optimizer: plain values of the optimizer.
        model: digests of config.json and of the weights that the run started from.
        corpus: digest of the tokens.
        validation: None without a validation set.
        sample: what the model wrote before the first step, see `training.sample`; None where it writes no text.
        config: the run's config.
        run: identity of the run, made when it started.
    """

    step: int
    position: Position
    skipped: int = 0
    scaler: dict[str, float | int] = {}
    optimizer: OptimizerValues = OptimizerValues()
    model: str
    corpus: str
    config: dict[str, Any]
    run: str
    validation: ValidationState | None = None
    sample: list[int] | None = None
    format: int = FORMAT


def folder_of(run: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return run / "checkpoints" / f"step-{step:08d}"


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run folder, oldest first."""
    folder = run / "checkpoints"
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name[5:]))


def save(run: Path, state: RunState, model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    """Write a checkpoint of one process.

    Raises:
        InputError, ResourceError: it cannot be written; then nothing of it is left.
    """
    folder = folder_of(run, state.step)
    tensors, plain = _optimizer_state(model, optimizer)
    state = msgspec.structs.replace(state, optimizer=plain)
    with write_folder(folder, force=False) as directory:
        save_file(_model_tensors(model), directory / "model.safetensors")
        save_file(tensors, directory / "optimizer.safetensors")
        (directory / "checkpoint.json").write_bytes(msgspec.json.format(msgspec.json.encode(state)))
        write_sums(directory)
    return folder


def remove_oldest(run: Path, keep: int, also: Container[int] = ()) -> None:
    """Keep the newest checkpoints of a run folder. One that goes is renamed first: never is there half of one.

    Args:
        also: steps whose checkpoints stay, too.
    """
    with os_errors("removing an old checkpoint", str(run)):
        for path in checkpoints(run)[:-keep]:
            if int(path.name[5:]) in also:
                continue
            path.rename(path.with_name(f".{path.name}.old"))
        for path in (run / "checkpoints").glob(".step-*.old"):
            shutil.rmtree(path, ignore_errors=True)  # what cannot be removed costs only space


def read_state(folder: Path) -> RunState:
    """The plain part of a checkpoint.

    Raises:
        InputError: missing, malformed, or of another format.
    """
    path = folder / "checkpoint.json"
    return check_format(read_state_file(path, RunState), path)


def check_whole(folder: Path) -> None:
    """Hold a checkpoint to the hashes that were written with it.

    Raises:
        InputError: a file is missing, was changed, or cannot be read.
    """
    with os_errors("reading the checkpoint", str(folder)):
        why = damage(folder)
    if why is not None:
        raise InputError(
            "the checkpoint is damaged",
            where=str(folder),
            why=why,
            remedy="remove this checkpoint's folder; the one before it is used then",
        )


def check_format(state: RunState, path: Path) -> RunState:
    """The state, when this version reads its format.

    Raises:
        InputError: another format.
    """
    if state.format != FORMAT:
        raise InputError(
            f"the checkpoint has format {state.format}, this optc reads {FORMAT}",
            where=str(path),
            remedy="resume with the version that wrote it",
        )
    return state


def check_same_run(folder: Path, found: RunState, now: RunState) -> None:
    """Refuse a checkpoint of another model, text or config.

    Raises:
        InputError: names what differs.
    """
    if found.model != now.model:
        raise InputError(
            "the checkpoint belongs to another model",
            where=str(folder),
            why=f"it was trained from weights {found.model[:12]}, the model has {now.model[:12]}",
            remedy="give the model folder that the run started from, or another output",
        )
    if found.corpus != now.corpus:
        raise InputError(
            "the checkpoint was trained on another text",
            where=str(folder),
            why=f"its tokens have digest {found.corpus[:12]}, those given {now.corpus[:12]}",
            remedy="give the same --text files, or another output",
        )
    old_set, new_set = (None if state.validation is None else state.validation.text for state in (found, now))
    if old_set != new_set:
        raise InputError(
            "the checkpoint belongs to a run with another validation set",
            where=str(folder),
            why=" and ".join(
                f"{whose} has {'none' if digest is None else 'tokens with digest ' + digest[:12]}"
                for whose, digest in (("it", old_set), ("the run now", new_set))
            ),
            remedy="give the same --validation files, or another output",
        )
    old, new = dict(_flat(_bound(found.config))), dict(_flat(_bound(now.config)))
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if changed:
        rows = ", ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in changed[:4])
        raise InputError(
            "the checkpoint was made with another config",
            where=str(folder),
            why=rows,
            remedy="resume with the same recipe and flags, or choose another output",
        )


def restore(folder: Path, state: RunState, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read a checkpoint of one process into the model and the optimizer.

    Raises:
        InputError: damaged, or tensors of another model.
    """
    expected = _model_tensors(model)
    found = read_tensors(folder / "model.safetensors")
    compare_shapes(folder, {name: tuple(item.shape) for name, item in expected.items()}, found)
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(found[name])
    _restore_optimizer(folder, state.optimizer, model, optimizer)


def _restore_optimizer(
    folder: Path, values: OptimizerValues, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    named = {name: item for name, item in model.named_parameters() if item.requires_grad}
    tensors = read_tensors(folder / "optimizer.safetensors")
    for name in {key.partition("::")[0] for key in tensors} | values.parameters.keys():
        if name not in named:
            raise another_model(folder, f"it has optimizer state of {name}")
    for key, tensor in tensors.items():
        name, _, field = key.partition("::")
        parameter = named[name]
        if tensor.dim() and tensor.shape != parameter.shape:
            raise another_model(
                folder,
                f"{key} is {tuple(tensor.shape)} in the checkpoint, {tuple(parameter.shape)} in the model",
            )
        optimizer.state[parameter][field] = place_state(optimizer, parameter, tensor)
    for name, row in values.parameters.items():
        optimizer.state[named[name]].update(row)
    try:
        restore_groups(optimizer, values.groups)
    except ValueError as error:
        raise another_model(folder, str(error)) from error


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters and persistent buffers by name, each storage once."""
    kept = model.state_dict(keep_vars=True)
    trained = {name for name, item in model.named_parameters() if item.requires_grad}
    buffers = {name for name, _ in model.named_buffers()}
    return {name: item.detach().contiguous() for name, item in kept.items() if name in trained or name in buffers}


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], OptimizerValues]:
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}::{key}"] = value.detach().contiguous()
            else:
                plain.setdefault(name, {})[key] = value
    groups = [plain_values(group) for group in optimizer.param_groups]
    return tensors, OptimizerValues(parameters=plain, groups=groups)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's file, on the CPU.

    Raises:
        InputError: missing or damaged.
    """
    with os_errors("reading the checkpoint", str(path)):
        try:
            return load_file(path)
        except SafetensorError as error:
            raise InputError(
                "the checkpoint is damaged",
                where=str(path),
                why=str(error),
                remedy="remove this checkpoint's folder; the one before it is used then",
            ) from error


def compare_shapes(folder: Path, expected: dict[str, tuple[int, ...]], found: dict[str, Tensor]) -> None:
    """Refuse tensors that are not those of the model.

    Args:
        expected: name -> shape in the model.

    Raises:
        InputError: names the first that differs.
    """
    for name in sorted(expected.keys() ^ found.keys()):
        raise another_model(folder, f"{name} is only in the {'model' if name in expected else 'checkpoint'}")
    for name, shape in expected.items():
        if tuple(found[name].shape) != shape:
            raise another_model(folder, f"{name} is {tuple(found[name].shape)} in the checkpoint, {shape} in the model")


def _bound(config: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in _FREE}
    data = config.get("data")
    return (
        {**kept, "data": {key: value for key, value in data.items() if key != "text"}}
        if isinstance(data, dict)
        else kept
    )


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict):
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from _flat(value, f"{prefix}.{key}" if prefix else key)
