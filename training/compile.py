"""torch.compile over a model that is to be trained."""

from __future__ import annotations

from typing import Any, TypeVar

import torch._functorch.config
from torch import nn

from optc.compiler.diagnostics import UsageError
from optc.compiler.settings.fields import check_struct
from optc.training.blocks import transformer_blocks
from optc.training.settings import CompileConfig

M = TypeVar("M", bound=nn.Module)


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
