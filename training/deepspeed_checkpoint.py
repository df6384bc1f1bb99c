"""Checkpoints of DeepSpeed runs: the whole weights once, and each rank's flat part of master weights and moments.

A folder, whole or absent, of safetensors files and deepspeed.json; no pickle. The same number of ranks and the same
stage read it back: how parameters lie in a flat part depends on both.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from optc.compiler.diagnostics import InputError, OptcError, os_errors
from optc.training.deepspeed_zero import EngineOptimizer, check_deepspeed, gather_parameters
from optc.training.optimizers import counter_device
from optc.training.sharded_checkpoint import plain_values, shared_folder

STATE = "deepspeed.json"
_WEIGHTS = "model.safetensors"


class _State(msgspec.Struct, frozen=True):
    ranks: int
    stage: int
    groups: list[dict[str, Any]]
    extra: dict[str, Any]


def save_deepspeed(folder: Path, model: nn.Module, optimizer: EngineOptimizer, extra: dict[str, Any]) -> None:
    """Write model and optimizer after a step; every rank calls it.

    Raises:
        InputError, ResourceError: the folder exists or cannot be written; then nothing of it is left.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    weights = gather_parameters(model, keep=rank == 0)
    with shared_folder(folder) as place:
        failure: OptcError | None = None
        try:
            with os_errors("writing the checkpoint", str(folder)):
                save_file(_flat_tensors(optimizer), place / _part(rank, size))
                if rank == 0:
                    save_file({name: item.contiguous() for name, item in weights.items()}, place / _WEIGHTS)
                    groups = [plain_values(group) for group in optimizer.param_groups]
                    state = _State(ranks=size, stage=_stage(optimizer), groups=groups, extra=extra)
                    (place / STATE).write_bytes(msgspec.json.encode(state))
        except OptcError as error:
            failure = error
        _raise_together(failure, folder)
    dist.barrier()  # published


def load_deepspeed(folder: Path, model: nn.Module, optimizer: EngineOptimizer) -> dict[str, Any]:
    """Read a checkpoint into a model and a fresh engine; every rank calls it. Returns `extra`.

    Raises:
        InputError: missing, damaged, of another model, number of ranks or stage.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    state = read_deepspeed_state(folder)
    if (state.ranks, state.stage) != (size, _stage(optimizer)):
        raise InputError(
            f"the checkpoint is of {state.ranks} rank(s) and ZeRO stage {state.stage}, the run of {size} and "
            f"{_stage(optimizer)}",
            where=str(folder), remedy="resume with the same number of processes and parallel.zero_stage",
        )  # fmt: skip
    weights, flat = _read(folder / _WEIGHTS), _read(folder / _part(rank, size))
    shapes = {name: tuple(getattr(item, "ds_shape", item.shape)) for name, item in model.named_parameters()}
    _compare(folder, shapes, {name: tuple(item.shape) for name, item in weights.items()})
    parts = dict(_flat_parts(optimizer))
    found = {key: tuple(item.shape) for key, item in flat.items() if "::" not in key}
    _compare(folder, {key: tuple(item.shape) for key, item in parts.items()}, found)
    deepspeed = check_deepspeed()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters(
                [parameter], modifier_rank=0
            ):  # of stage 3: sent by rank 0
                if parameter.shape == weights[name].shape:
                    parameter.copy_(weights[name])
        for key, part in parts.items():
            part.data.copy_(flat[key])
    for key, item in flat.items():
        name, _, field = key.partition("::")
        if field:
            part = parts[name]
            optimizer.state[part][field] = item.to(
                part.device if item.dim() else counter_device(optimizer, part)
            )
    for group, values in zip(optimizer.param_groups, state.groups, strict=True):
        group.update(values)
    return state.extra


def read_deepspeed_state(folder: Path) -> _State:
    """What is no tensor.

    Raises:
        InputError: missing or damaged.
    """
    path = folder / STATE
    with os_errors("reading the checkpoint", str(path)):
        data = path.read_bytes()
    try:
        return msgspec.json.decode(data, type=_State)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InputError("the checkpoint is damaged", where=str(path), why=str(error)) from error


def _part(rank: int, size: int) -> str:
    return f"rank-{rank:05d}-of-{size:05d}.safetensors"


def _stage(optimizer: EngineOptimizer) -> int:
    return int(optimizer.engine.zero_optimization_stage())


def _flat_parts(optimizer: EngineOptimizer) -> Iterator[tuple[str, Tensor]]:
    """This rank's fp32 master weights, one vector per group, as DeepSpeed 0.19 holds them."""
    inner = optimizer.engine.optimizer
    parts = (
        inner.fp32_partitioned_groups_flat
        if _stage(optimizer) == 3
        else inner.single_partition_of_fp32_groups
    )
    for number, part in enumerate(parts):
        yield str(number), part


def _flat_tensors(optimizer: EngineOptimizer) -> dict[str, Tensor]:
    found = {}
    for key, part in _flat_parts(optimizer):
        found[key] = part.detach().contiguous()
        for field, value in optimizer.state.get(part, {}).items():
            found[f"{key}::{field}"] = value.detach().contiguous()
    return {key: item.clone() for key, item in found.items()}  # safetensors wants storages of their own


def _raise_together(failure: OptcError | None, folder: Path) -> None:
    """A rank that fails takes the others with it, so that none waits."""
    texts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for rank, text in enumerate(texts):
        if text is not None:
            raise InputError(f"rank {rank} could not write the checkpoint", where=str(folder), why=text)


def _read(path: Path) -> dict[str, Tensor]:
    with os_errors("reading the checkpoint", str(path)):
        try:
            return load_file(path)
        except SafetensorError as error:
            raise InputError("the checkpoint is damaged", where=str(path), why=str(error)) from error


def _compare(folder: Path, wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise InputError(
                "the checkpoint is of another model", where=str(folder),
                why=f"{name} is {found.get(name, 'absent')} there, {wanted.get(name, 'absent')} in the model",
                remedy="give the model that the run started from",
            )  # fmt: skip
