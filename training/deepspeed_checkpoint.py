"""Checkpoints of DeepSpeed runs: the whole weights once, and each rank's flat part of master weights and moments.

A folder, whole or absent, of safetensors files and deepspeed.json; no pickle. The same number of ranks and the same
stage read it back: how parameters lie in a flat part depends on both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from optc.compiler.artifact.publishing import disk_errors
from optc.compiler.diagnostics import InputError, OptcError
from optc.training.checkpoint import compare_shapes, read_tensors
from optc.training.deepspeed_zero import EngineOptimizer, check_deepspeed, gather_state
from optc.training.optimizers import place_state, plain_values, restore_groups
from optc.training.sharded_checkpoint import model_tensors, shared_folder
from optc.training.state_file import another_model, read_state_file

_STATE = "deepspeed.json"
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
    state = gather_state(model, keep=rank == 0)
    with shared_folder(folder) as place:
        failure: OptcError | SafetensorError | None = None
        try:
            with disk_errors(folder):
                save_file(_flat_tensors(optimizer), place / _part(rank, size))
                if rank == 0:
                    save_file({name: state[name].contiguous() for name in model_tensors(model)}, place / _WEIGHTS)
                    groups = [plain_values(group) for group in optimizer.param_groups]
                    plain = _State(ranks=size, stage=_stage(optimizer), groups=groups, extra=extra)
                    (place / _STATE).write_bytes(msgspec.json.encode(plain))
        except (OptcError, SafetensorError) as error:
            failure = error
        _raise_together(failure, folder)
    dist.barrier()  # published


def load_deepspeed(folder: Path, model: nn.Module, optimizer: EngineOptimizer) -> dict[str, Any]:
    """Read a checkpoint into a model and a fresh engine; every rank calls it. Returns `extra`.

    Raises:
        InputError: missing, damaged, of another model, number of ranks or stage.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    state = read_state_file(folder / _STATE, _State)
    if (state.ranks, state.stage) != (size, _stage(optimizer)):
        raise InputError(
            f"the checkpoint was written by {state.ranks} rank(s) with ZeRO stage {state.stage}, the run has "
            f"{size} with stage {_stage(optimizer)}",
            where=str(folder),
            remedy="resume with the same number of processes and parallel.zero_stage",
        )
    _load_weights(folder, model)
    _load_flat(folder, _part(rank, size), optimizer)
    try:
        restore_groups(optimizer, state.groups)
    except ValueError as error:
        raise another_model(folder, str(error)) from error
    return state.extra


def _load_weights(folder: Path, model: nn.Module) -> None:
    deepspeed = check_deepspeed()
    items, weights = model_tensors(model), read_tensors(folder / _WEIGHTS)
    compare_shapes(
        folder, {name: tuple(getattr(item, "ds_shape", item.shape)) for name, item in items.items()}, weights
    )
    with torch.no_grad():
        for name, item in items.items():
            split = item.shape != weights[name].shape  # stage 3: the first rank sets it for all
            with deepspeed.zero.GatheredParameters([item], modifier_rank=0):
                if not split or dist.get_rank() == 0:
                    item.copy_(weights[name])


def _load_flat(folder: Path, name: str, optimizer: EngineOptimizer) -> None:
    """This rank's master weights and moments."""
    parts, found = _flat_parts(optimizer), read_tensors(folder / name)
    shapes = {key: tuple(part.shape) for key, part in parts.items()}
    compare_shapes(folder, shapes, {key: item for key, item in found.items() if "::" not in key})
    for key, item in found.items():
        number, _, field = key.partition("::")
        if number not in parts or (item.dim() and item.shape != parts[number].shape):
            raise another_model(folder, f"{key} of {name} has no place in the optimizer")
        if field:
            optimizer.state[parts[number]][field] = place_state(optimizer, parts[number], item)
        else:
            parts[number].data.copy_(item)


def _part(rank: int, size: int) -> str:
    return f"rank-{rank:05d}-of-{size:05d}.safetensors"


def _stage(optimizer: EngineOptimizer) -> int:
    return int(optimizer.engine.zero_optimization_stage())


def _flat_parts(optimizer: EngineOptimizer) -> dict[str, Tensor]:
    """This rank's fp32 master weights, one vector per group, as DeepSpeed 0.19 holds them."""
    split = _stage(optimizer) == 3
    name = "fp32_partitioned_groups_flat" if split else "single_partition_of_fp32_groups"
    return {str(number): part for number, part in enumerate(getattr(optimizer.engine.optimizer, name))}


def _flat_tensors(optimizer: EngineOptimizer) -> dict[str, Tensor]:
    found = {}
    for key, part in _flat_parts(optimizer).items():
        found[key] = part
        found |= {f"{key}::{field}": value for field, value in optimizer.state.get(part, {}).items()}
    # safetensors wants storages of their own
    return {key: item.detach().to("cpu", copy=True) for key, item in found.items()}


def _raise_together(failure: OptcError | SafetensorError | None, folder: Path) -> None:
    """A rank that fails takes the others with it, so that none waits."""
    texts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for rank, text in enumerate(texts):
        if text is not None:
            raise InputError(
                f"rank {rank} could not write the checkpoint",
                where=str(folder),
                why=text,
                remedy="look into the messages of that rank; free space and resume",
            )
