"""The linears of a model's module tree that are quantized or adapted; no model is named.

Of a captured graph the same choice is `passes/quantization/arithmetic/selection.py`; a test holds the two to each other.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def model_linears(model: Any, *, head: bool = False) -> dict[str, nn.Module]:
    """Every nn.Linear, and transformers' Conv1D, by module name.

    Left out: the linear that makes the logits unless `head` (its errors reach the output undamped), and the routers
    of experts (a changed choice is no small error). A router is a linear beside experts with one output for each.
    """
    last = output_head(model)
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
        and (module is not last or head)
        and not _routes(model, name, module)
    }


def output_head(model: Any) -> nn.Module | None:
    """The module that makes the logits of a transformers model, None where there is none."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D (GPT-2): a linear that keeps its weight as [K, N]."""
    return type(module).__name__ == "Conv1D"


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """(N, K), outputs and inputs, of an nn.Linear or a Conv1D, which keeps its weight the other way."""
    weight = linear.weight
    assert isinstance(weight, nn.Parameter)
    first, second = (int(size) for size in weight.shape)
    return (first, second) if isinstance(linear, nn.Linear) else (second, first)


def expert_stacks(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Shape [E, N, K] of every parameter that holds the linears of E experts, by name.

    A token or positions that a vision tower learns, [1, ., .], are none.
    """
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and parameter.shape[0] > 1:
            experts, rows, columns = map(int, parameter.shape)
            found[name] = (experts, rows, columns)
    return found


def _routes(model: nn.Module, name: str, linear: nn.Module) -> bool:
    """Whether a linear chooses experts: beside it stand as many experts as it has outputs, as a list or stacked."""
    outputs, _ = linear_shape(linear)
    siblings = model.get_submodule(name.rpartition(".")[0]).children()
    return any(outputs in _expert_counts(child) for child in siblings if child is not linear)


def _expert_counts(module: nn.Module) -> set[int]:
    """How many experts a module holds: stacked in parameters, or one by one in a list; empty when none."""
    if isinstance(module, nn.ModuleList):
        return {len(module)}
    return {int(item.shape[0]) for item in module.parameters(recurse=False) if item.dim() == 3}
