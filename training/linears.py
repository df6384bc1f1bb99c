"""The linears of a transformers model that are quantized or adapted, found in the module tree; no model is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def quantizable_linears(model: Any, *, head: bool = False) -> dict[str, nn.Linear]:
    """Every nn.Linear by name, in the model's order.

    Left out: the linear that makes the logits unless `head` (its errors reach the output undamped), and the routers
    of experts (a changed choice is no small error).
    """
    last = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and (module is not last or head) and not _routes(model, name, module)
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


def _routes(model: nn.Module, name: str, linear: nn.Linear) -> bool:
    """Whether a linear chooses experts: beside it stand as many experts as it has outputs, as a list or stacked."""
    parent = model.get_submodule(name.rpartition(".")[0])
    for child in parent.children():
        stacked = any(
            item.dim() == 3 and item.shape[0] == linear.out_features
            for item in child.parameters(recurse=False)
        )
        listed = isinstance(child, nn.ModuleList) and len(child) == linear.out_features
        if child is not linear and (stacked or listed):
            return True
    return False
