"""Data parallel training over torch.distributed: DDP, FSDP2, ZeRO."""

from __future__ import annotations

from typing import Literal, TypeVar

import msgspec
from torch import nn

M = TypeVar("M", bound=nn.Module)
Dtype = Literal["fp32", "bf16", "fp16"]


class ParallelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the ranks that torchrun started share the work. Each rank takes its own part of every batch."""

    kind: Literal["none", "ddp", "fsdp", "zero1", "deepspeed"] = "none"
    """none: one process; ddp: every rank holds everything; zero1: DDP with the optimizer state split; fsdp:
    weights, gradients and optimizer state split by transformer block; deepspeed: ZeRO `zero_stage`."""
    zero_stage: Literal[1, 2, 3] = 2
    """For deepspeed: 1 splits optimizer state, 2 gradients as well, 3 weights as well."""
    reshard_after_forward: bool = True
    """For fsdp: free the gathered weights of a block after its forward (as ZeRO-3); false keeps them until the
    backward (as ZeRO-2: less communication, more memory)."""
    param_dtype: Dtype = "fp32"
    """For fsdp: dtype in which weights are gathered and blocks compute; the shards stay fp32."""
    reduce_dtype: Dtype = "fp32"
    """For fsdp: dtype in which gradients are summed over ranks."""
    timeout_s: int = 1800
    """Seconds after which a collective that does not finish ends the run."""


def apply_data_parallel(model: M, config: ParallelConfig) -> M:
    """Prepare the model for data parallel training; returns the module to call."""
    raise NotImplementedError  # follows in the next commit
