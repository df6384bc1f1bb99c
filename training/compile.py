"""torch.compile over a model that is to be trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
import torch._functorch.config
from msgspec import Meta
from torch import nn

from optc.compiler.diagnostics import UsageError
from optc.compiler.settings.fields import check_struct
from optc.training.blocks import transformer_blocks

M = TypeVar("M", bound=nn.Module)


class CompileConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is compiled. Needs a C++ compiler on the CPU and Triton on a GPU."""

    scope: Annotated[
        Literal["none", "blocks", "model"],
        Meta(
            description="torch.compile: of each transformer block (equal blocks share one compilation), or of the "
            "whole forward pass."
        ),
    ] = "none"
    mode: Annotated[Literal["default", "max-autotune-no-cudagraphs"], Meta(description="torch.compile's mode.")] = (
        "default"
    )
    dynamic: Annotated[bool, Meta(description="Compile once for all shapes of batches instead of once per shape.")] = (
        False
    )
    activation_budget: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            description="Share of the activations that each compiled graph may keep; torch's solver chooses what is "
            "computed again, 1 recomputes only what is free.",
        ),
    ] = 1.0


def apply_compile(model: M, config: CompileConfig) -> M:
    """Compile the model, or each of its blocks, in place; returns the model. Names of parameters stay.

    Raises:
        UsageError: scope `blocks` for a model without repeated blocks; a budget out of range or without compile.
    """
    check_struct(config)
    if config.scope == "none":
        if config.activation_budget < 1:
            raise UsageError(
                "compile.activation_budget without compile",
                why="torch's compiler chooses what is recomputed",
                remedy="use --set compile.scope=blocks, or checkpointing.policy=budget",
            )
        return model
    torch._functorch.config.activation_memory_budget = config.activation_budget
    options: dict[str, Any] = {"mode": config.mode, "dynamic": config.dynamic}
    for module in transformer_blocks(model) if config.scope == "blocks" else [model]:
        module.compile(**options)
    return model
