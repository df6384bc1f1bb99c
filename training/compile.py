"""torch.compile over a model that is to be trained."""

from __future__ import annotations

from typing import Literal, TypeVar

import msgspec
from torch import nn

from optc.training.blocks import transformer_blocks

M = TypeVar("M", bound=nn.Module)


class CompileConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is compiled. Needs a C++ compiler on the CPU and Triton on a GPU."""

    scope: Literal["none", "blocks", "model"] = "none"
    """none: eager; blocks: each transformer block (equal blocks share one compilation); model: the whole forward."""
    mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"
    """torch.compile's mode."""
    dynamic: bool = False
    """Compile once for all shapes of batches instead of once per shape."""


def apply_compile(model: M, config: CompileConfig) -> M:
    """Compile the model, or each of its blocks, in place; returns the model. Names of parameters stay.

    Raises:
        UsageError: scope `blocks` for a model without repeated blocks.
    """
    options = {"mode": None if config.mode == "default" else config.mode, "dynamic": config.dynamic}
    if config.scope == "blocks":
        for block in transformer_blocks(model):
            block.compile(**options)
    elif config.scope == "model":
        model.compile(**options)
    return model
