"""The linears of a transformers model that training adapts or rounds, and putting others in their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from optc.compiler.analysis.module_linears import expert_stacks, model_linears


def quantizable_linears(model: Any, *, head: bool = False) -> dict[str, nn.Linear]:
    """Every nn.Linear that quantization takes, by name, in the model's order; see `model_linears`."""
    found = model_linears(model, head=head)
    return {name: module for name, module in found.items() if type(module) is nn.Linear}


def expert_weights(model: nn.Module) -> dict[str, int]:
    """How many weights each parameter holds that is a stack of experts' linears, by name; no `quantizable_linears`."""
    return {
        name: experts * rows * columns
        for name, (experts, rows, columns) in expert_stacks(model).items()
        if not type(model.get_submodule(name.rpartition(".")[0])).__module__.startswith("torch.")
    }


def replace_modules(model: nn.Module, made: Mapping[int, nn.Module]) -> None:
    """Put modules in place of others wherever these stand.

    Args:
        made: id of a module -> what replaces it.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in made:
                setattr(parent, name, made[id(child)])
