"""Which module of a model is the first whose output its captured program does not reproduce."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from optc.compiler.rewriting.retrace import Replay


def first_difference(
    model: nn.Module,
    run_model: Callable[[], object],
    replay: Replay,
    inputs: list[Tensor],
    mask: Tensor | None,
    tolerance: float,
) -> str | None:
    """The path of the first module that the program computes otherwise, with the relative difference.

    Both are run again, watched: the first tensor that a module returns is compared with the values of its shape that
    the program made inside the module and used outside, and the closest counts. Modules without one are passed over.

    Args:
        run_model: runs the model's own forward on what `inputs` are for the program.
        mask: [B, S], the tokens that count; None where all do.
        tolerance: relative L2 difference that does not count.
    """
    theirs = list(_module_outputs(model, run_model))
    ours = _program_outputs(replay, inputs)
    for path, wanted in theirs:
        found = [value for value in ours.get(path, ()) if value.shape == wanted.shape]
        if not found or not wanted.is_floating_point():
            continue
        gap = min(_gap(_real(wanted, mask).float(), _real(value, mask).float()) for value in found)
        if not gap <= tolerance:
            name = type(model.get_submodule(path)).__name__
            return f"{path} ({name}), relative difference {gap:.2e}"
    return None


def _gap(old: Tensor, new: Tensor) -> float:
    """Relative L2 difference; infinite where it is not a number."""
    gap = float((new - old).norm() / old.norm().clamp(min=1e-12))
    return gap if gap == gap else math.inf


def first_overflow(model: nn.Module, run_model: Callable[[], object], mask: Tensor | None) -> str | None:
    """The first weight that is NaN or infinite, else the path of the first module whose output is; `mask` as above."""
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            return f"weight {name}"
    for path, value in _module_outputs(model, run_model):
        if value.is_floating_point() and not bool(torch.isfinite(_real(value, mask)).all()):
            return f"{path} ({type(model.get_submodule(path)).__name__})"
    return None


def _module_outputs(model: nn.Module, run_model: Callable[[], object]) -> Iterator[tuple[str, Tensor]]:
    """(path, first tensor returned) of every module but the whole model, in the order in which they return."""
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            value = _first_tensor(output)
            if value is not None:
                seen.setdefault(path, value.detach().clone())

        return hook

    with _hooked(model, keep):
        run_model()
    yield from seen.items()


@contextmanager
def _hooked(model: nn.Module, make: Callable[[str], Callable[..., None]]) -> Iterator[None]:
    hooks = [module.register_forward_hook(make(path)) for path, module in model.named_modules() if path]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _real(value: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of real tokens of a value [B, S, ...]; another value, such as one with flattened tokens, counts whole
    where there is no padding, and not at all where there is."""
    if mask is None or bool(mask.all()):
        return value
    return value[mask.bool()] if value.shape[:2] == mask.shape else value[:0]


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return next((value for value in values if isinstance(value, Tensor)), None)


def _paths(node: Node) -> list[str]:
    """The modules that a node was traced in, outermost first."""
    return [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


def _program_outputs(replay: Replay, inputs: list[Tensor]) -> dict[str, list[Tensor]]:
    """Module path -> the values that the program makes inside the module and uses outside it."""
    leaving: dict[Node, list[str]] = {}
    for node in replay.module.graph.nodes:
        outside = [set(_paths(user)) for user in node.users]
        paths = [path for path in _paths(node) if any(path not in user for user in outside)]
        if paths:
            leaving[node] = paths
    found: dict[str, list[Tensor]] = defaultdict(list)
    run_node = replay.run_node

    def watched(node: Node) -> Any:
        value = run_node(node)
        if isinstance(value, Tensor):
            for path in leaving.get(node, ()):
                found[path].append(value)
        return value

    replay.run_node = watched
    replay.outputs(*inputs)
    return found
