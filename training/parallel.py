"""Data parallel training over torch.distributed: DDP, FSDP2, ZeRO.

DDP: Li et al. 2020, https://arxiv.org/abs/2006.15704. FSDP: Zhao et al. 2023, https://arxiv.org/abs/2304.11277, here
in its second form, `fully_shard`, over parameters as DTensors. ZeRO: Rajbhandari et al. 2019,
https://arxiv.org/abs/1910.02054.

All kinds average gradients over the ranks. A step that backpropagates `scale_loss(sum of token losses, tokens)` in
each micro-batch gets the gradient of the mean over all label tokens of all ranks, as one process would.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from optc.compiler.model_folder.dtypes import DTYPES
from optc.training.blocks import transformer_blocks
from optc.training.settings import ParallelConfig


def start_processes(device: torch.device, config: ParallelConfig) -> None:
    """Join the process group that torchrun describes (nccl on CUDA, else gloo); alone without torchrun.

    Does nothing when the process is in a group already. `dist.destroy_process_group()` ends it.
    """
    if dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=config.timeout_s)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)


def apply_data_parallel(model: Any, config: ParallelConfig) -> Any:
    """Prepare the model, on its device already, for data parallel training; returns the module to call.

    fsdp works in place (the model's class changes, its parameters become DTensors); ddp and zero1 return a wrapper.
    For deepspeed the optimizer comes first: see `optc.training.deepspeed_zero.connect`.

    Raises:
        UsageError: fsdp for a model without repeated blocks.
    """
    if config.kind == "none":
        return model
    device = next(model.parameters()).device
    start_processes(device, config)
    if config.kind == "fsdp":
        return _shard(model, device, config)
    if config.kind == "deepspeed":
        return model
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def _shard(model: nn.Module, device: torch.device, config: ParallelConfig) -> nn.Module:
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=None if config.param_dtype == "fp32" else DTYPES[config.param_dtype],
        reduce_dtype=DTYPES[config.reduce_dtype],
    )
    for block in transformer_blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
    # The root's own weights (embeddings, norm, head) are needed again at once: they stay gathered.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return model


def shard_optimizer(optimizer: torch.optim.Optimizer, config: ParallelConfig) -> torch.optim.Optimizer:
    """The optimizer to step: with zero1 one of the same class and groups, whose state is split over the ranks.

    An fsdp optimizer is sharded by its parameters already.
    """
    if config.kind != "zero1":
        return optimizer
    groups = [dict(group) for group in optimizer.param_groups]
    taken = inspect.signature(type(optimizer)).parameters
    options = {name: value for name, value in optimizer.defaults.items() if name in taken}
    split = ZeroRedundancyOptimizer(groups, type(optimizer), **options)
    # Readers of `state` (metrics, checkpoints) find this rank's part where every optimizer has it.
    split.state = split.optim.state
    return split


def synchronizing(module: nn.Module, *, last: bool) -> AbstractContextManager[object]:
    """Around the forward and backward of a micro-batch: gradients cross ranks with the last one only."""
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    return contextlib.nullcontext()


def scale_loss(loss_sum: Tensor, tokens: int) -> Tensor:
    """What to backpropagate in a micro-batch.

    Args:
        loss_sum: sum of the token losses of this rank's micro-batch.
        tokens: label tokens of the whole step: all micro-batches of all ranks.
    """
    return loss_sum * (world_size() / tokens)


def world_size() -> int:
    """Ranks in the group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(value: float, device: torch.device) -> float:
    """The sum of one number over the ranks, in fp64."""
    if world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total)


def clip_grad_norm(parameters: Iterable[Tensor], limit: float) -> float:
    """Scale gradients so that the L2 norm over all parameters, and all shards, is at most `limit`.

    Returns the norm before. With DDP and ZeRO-1 the gradients are whole on each rank; with FSDP the norm of shards is
    reduced over the ranks.
    """
    norm = nn.utils.clip_grad_norm_(list(parameters), limit, foreach=True)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
