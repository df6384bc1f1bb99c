"""Activation checkpointing: what a backward pass keeps from the forward pass, and what it computes again."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec
from torch import nn

M = TypeVar("M", bound=nn.Module)


class CheckpointingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which activations are kept. Losses and gradients are the same under every policy."""

    policy: Literal["none", "full", "every-n", "selective", "budget"] = "none"
    """none: keep all; full: recompute every transformer block; every-n: recompute every n-th block; selective:
    keep the outputs of the ops in `keep`, recompute the rest of the block; budget: stay below `budget`."""
    every_n: Annotated[int, msgspec.Meta(ge=1)] = 2
    """For every-n: block 0, n, 2n, ... are recomputed."""
    keep: tuple[str, ...] = ("matmul", "attention")
    """For selective: kinds of op whose outputs are kept (see `op_kinds`)."""
    budget: float = 0.5
    """For budget: above 1, bytes of activations per micro-batch; up to 1, the fraction of what `none` keeps."""


def apply_activation_checkpointing(model: M, config: CheckpointingConfig) -> M:
    """Make the model's transformer blocks recompute activations in the backward pass; returns the model."""
    raise NotImplementedError  # follows in the next commit
