"""Where numbers stopped being finite: the weight, the layer's output or the gradient that shows it first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def find_nonfinite(model: nn.Module, forward: Callable[[], Any]) -> str:
    """Name what is not finite.

    Args:
        model: holds the gradients of the step.
        forward: runs the model on the step's batches again; every module's output is looked at.
    """
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"weight {name}"
    found: list[str] = []
    handles = [
        module.register_forward_hook(_watch(name, found))
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return f"output of {found[0]}"
    named: Sequence[tuple[str, nn.Parameter]] = list(model.named_parameters())
    for name, parameter in reversed(named):  # gradients are made from the last layer to the first
        if parameter.grad is not None and not _finite(parameter.grad):
            return f"gradient of {name}"
    return "the loss alone"


def _watch(name: str, found: list[str]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if not found and not all(_finite(item) for item in tree_leaves(output) if isinstance(item, Tensor)):
            found.append(name)

    return hook


def _finite(tensor: Tensor) -> bool:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return bool(torch.isfinite(local).all())
