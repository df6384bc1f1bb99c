"""Checkpoints of sharded runs: every rank writes its part, and any number of ranks reads it back.

A checkpoint is a folder, whole or absent, of safetensors files (torch.distributed.checkpoint's layout: each file's
header says which slice of which tensor it holds; no pickle) and state.json with what is no tensor. Tensors are
`model::NAME` and `optimizer::NAME::KEY`. DDP, ZeRO-1 and FSDP write the same layout, and read each other's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.optim import ZeroRedundancyOptimizer

from optc.compiler.artifact.publishing import write_folder
from optc.compiler.diagnostics import InputError, os_errors
from optc.compiler.files import write_sums
from optc.training.optimizers import counter_device, plain_values, restore_groups
from optc.training.state_file import another_model, read_state_file

_STATE = "state.json"


class _State(msgspec.Struct, frozen=True):
    """What is no tensor."""

    groups: list[dict[str, Any]]
    extra: dict[str, Any]


def save_sharded(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, extra: dict[str, Any] | None = None
) -> None:
    """Write model and optimizer; every rank calls it, in a process group.

    Args:
        model: the model, not its DDP wrapper.
        extra: plain values to keep beside (step, data position); rank 0's count.

    Raises:
        InputError, ResourceError: the folder exists or cannot be written; then nothing of it is left.
    """
    tensors = {f"model::{name}": item.detach() for name, item in model_tensors(model).items()}
    for name, parameter in _owned(model, optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer::{name}::{key}"] = value
    with shared_folder(folder) as place:
        with _failures("writing the checkpoint", folder):
            dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(place), save_distributed=True))
        if dist.get_rank() == 0:
            groups = [plain_values(group) for group in optimizer.param_groups]
            text = msgspec.json.encode({"groups": groups, "extra": extra or {}})
            (place / _STATE).write_bytes(text)
    dist.barrier()  # published


@contextmanager
def shared_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that all ranks write into; rank 0 renames it to `folder` when its block ends.

    Raises:
        InputError, ResourceError: the folder exists or cannot be made.
    """
    with ExitStack() as stack:
        place: list[Any] = [None]
        try:
            if dist.get_rank() == 0:
                place[0] = str(stack.enter_context(write_folder(folder, force=False)))
        finally:
            dist.broadcast_object_list(place)  # None: rank 0 could not
        if place[0] is None:
            raise InputError(
                "rank 0 could not make the checkpoint's folder",
                where=str(folder),
                remedy="look into the messages of rank 0",
            )
        yield Path(place[0])
        dist.barrier()  # all files are there
        if dist.get_rank() == 0:
            with os_errors("writing the checkpoint", str(folder)):
                write_sums(Path(place[0]))


def load_sharded(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Read a checkpoint into a model and a fresh optimizer, each rank its own part; returns `extra`.

    The number of ranks, and the kind of data parallelism, may differ from those that wrote it.

    Raises:
        InputError: missing, damaged, or of another model.
    """
    saved = _saved_shapes(folder)
    wanted: dict[str, Any] = {f"model::{name}": item.detach() for name, item in model_tensors(model).items()}
    _compare(folder, saved, {name: tuple(item.shape) for name, item in wanted.items()})
    parts = [name.split("::") for name in saved if name.startswith("optimizer::")]
    if strange := [names for names in parts if len(names) != 3]:
        raise another_model(folder, f"{'::'.join(strange[0])[:200]!r} is the name of no state of an optimizer")
    keys = sorted({key for _, _, key in parts})
    for name, parameter in _owned(model, optimizer):
        for key in keys:
            shape = saved.get(f"optimizer::{name}::{key}")
            if shape is None:
                continue
            same = shape == tuple(parameter.shape)
            count = torch.zeros(shape, dtype=torch.float32, device=counter_device(optimizer, parameter))
            value = torch.zeros_like(parameter) if same else count
            optimizer.state[parameter][key] = wanted[f"optimizer::{name}::{key}"] = value.detach()
    with torch.no_grad(), _failures("reading the checkpoint", folder):
        dcp.load(wanted, storage_reader=HuggingFaceStorageReader(str(folder)))
    state = read_state_file(folder / _STATE, _State)
    try:
        restore_groups(optimizer, state.groups)
    except ValueError as error:
        raise another_model(folder, str(error)) from error
    return state.extra


@contextmanager
def _failures(action: str, folder: Path) -> Iterator[None]:
    """Turn the failures that torch gathers from all ranks into a typed error; every rank raises it."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        with os_errors(action, str(folder)):
            if isinstance(cause, OSError | MemoryError):
                raise cause from error
        raise InputError(
            f"failed while {action}",
            where=str(folder),
            why=f"rank {rank}: {cause}",
            remedy="look into the messages of that rank",
        ) from error


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, a tied weight once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, item in model.state_dict(keep_vars=True).items():
        if id(item) not in seen:
            seen.add(id(item))
            found[name] = item
    return found


def _owned(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """The named parameters whose optimizer state this rank holds (its shards of them)."""
    local = optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer
    mine = {id(item) for group in local.param_groups for item in group["params"]}
    for name, parameter in model.named_parameters():
        if id(parameter) in mine:
            yield name, parameter


def _saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    if not folder.is_dir():
        raise InputError("there is no such checkpoint", where=str(folder), remedy="give the folder of a checkpoint")
    with os_errors("reading the checkpoint", str(folder)):
        try:
            found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                "the checkpoint is damaged",
                where=str(folder),
                why=str(error),
                remedy="remove this checkpoint's folder; the one before it is used then",
            ) from error
    return {name: tuple(row.size) for name, row in found.items() if hasattr(row, "size")}


def _compare(folder: Path, saved: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    model = {name for name in saved if name.startswith("model::")}
    different = sorted(model ^ wanted.keys()) or [name for name in wanted if saved[name] != wanted[name]]
    if different:
        name = different[0]
        raise another_model(
            folder,
            f"{name.removeprefix('model::')} is {saved.get(name, 'absent')} in the checkpoint, "
            f"{wanted.get(name, 'absent')} in the model",
        )
