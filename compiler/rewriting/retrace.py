"""Re-tracing: the same computation under a new signature.

Passes that change what a program takes (KV caches) cannot patch inputs into an ExportedProgram: the
call signature and every shape derived from it would be stale. They replay the graph, node by node,
inside a module with the new signature, answer some of its calls differently, and export that.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler import compat
from optc.compiler.ir.asserts import is_assert
from optc.compiler.ir.contract import Contract
from optc.compiler.ir.export import run_export
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import drop_dead

Handler = Callable[[tuple[Any, ...], dict[str, Any]], Any]
"""Answers one call of the replayed graph: (args, kwargs) -> result."""


class Replay(torch.fx.Interpreter):
    """Runs a program's graph with the calls of some operators answered by `handlers`.

    Used eagerly (to record or to cut an operator) and under torch.export (to re-trace).
    """

    def __init__(self, program: Program, handlers: Mapping[Any, Handler]) -> None:
        super().__init__(program.module(), garbage_collect_values=True)
        self._handlers = handlers

    def _set_current_node(self, node: Node) -> AbstractContextManager[None]:
        return compat.node_meta(node)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_assert(target):
            return None
        handler = self._handlers.get(target)
        return super().call_function(target, args, kwargs) if handler is None else handler(args, kwargs)

    def outputs(self, *args: Any) -> list[Any]:
        """Run on flat user inputs and return the flat outputs."""
        result = self.run(*args)
        return list(result) if isinstance(result, tuple | list) else [result]


class NamedForward(torch.nn.Module):
    """A new forward, of tensors by name, over the weights of a module, under their old names."""

    def __init__(self, inner: torch.nn.Module, forward: Callable[..., Any], names: Sequence[str]) -> None:
        super().__init__()
        self._modules, self._parameters, self._buffers = inner._modules, inner._parameters, inner._buffers
        self._non_persistent_buffers_set = inner._non_persistent_buffers_set
        self.training = inner.training

        def positional(*args: Any) -> Any:
            return forward(*args)

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        positional.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(name.replace(".", "_"), kind) for name in names]
        )
        object.__setattr__(self, "forward", positional)


def retrace(
    program: Program,
    forward: Callable[..., Any],
    args: Sequence[Tensor],
    dynamic_shapes: Sequence[Mapping[int, Any]],
    contract: Contract,
) -> Program:
    """Export `forward`, which replays `program`, and return it as a Program under `contract`.

    Args:
        forward: called with one tensor per input of `contract`; runs a `Replay` of `program`.
        args: example inputs. Sizes of different dynamic axes must differ, or they count as equal.
        dynamic_shapes: axis -> torch.export Dim, per input.
        contract: of the result; its input names (with dots as underscores) name the placeholders.

    Raises:
        CaptureError: the graph cannot be traced with the new inputs.
    """
    names = [spec.name for spec in contract.inputs]
    shell = NamedForward(program.module(), forward, names)
    with torch.fx.traceback.preserve_node_meta():
        exported = run_export(shell, tuple(args), tuple(dynamic_shapes), where="re-tracing")
    for node in [node for node in exported.graph.nodes if is_assert(node.target)]:
        exported.graph.erase_node(node)
    result = Program(exported, contract, work_file=program.work_file)
    drop_dead(result)
    return result.changed()


def axis_limit(node: Node, program: Program, axis: int) -> int | None:
    """The largest size that a dynamic axis of a placeholder may have, None when it has no limit."""
    size = node.meta["val"].shape[axis]
    if isinstance(size, int):
        return size
    import sympy

    found = program.exported.range_constraints.get(size.node.expr)
    return int(found.upper) if found is not None and isinstance(found.upper, sympy.Integer) else None
