"""From a graph of torch.compile to a Program: traced anew by torch.export, and held to the graph itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor
from torch._subclasses import FakeTensor
from torch.export import Dim
from torch.fx import GraphModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from optc.compiler import compat
from optc.compiler.analysis.aliases import Storage
from optc.compiler.capture.dynamo_graph import (
    Argument,
    Arguments,
    Outputs,
    placeholders,
    read_arguments,
    read_outputs,
    standalone,
)
from optc.compiler.capture.exported import module_contract
from optc.compiler.capture.proof.modules import prove_module, resize
from optc.compiler.diagnostics import TargetError
from optc.compiler.execution.stage_driver import written_inputs
from optc.compiler.ir.export import run_export
from optc.compiler.ir.program import Program

WHERE = "torch.compile's graph"


@dataclass(frozen=True)
class CapturedGraph:
    """A graph as a Program.

    Attributes:
        program: inputs are `arguments.tensors`, then `arguments.numbers`; outputs are `outputs.nodes`.
        examples: the program's inputs in the call that was captured.
        sizes: what Dynamo knows of each input's axes: numbers, or sizes that it may guard.
        written: inputs of the program that the graph writes into.
    """

    program: Program
    arguments: Arguments
    outputs: Outputs
    examples: tuple[Tensor, ...]
    sizes: tuple[tuple[Any, ...], ...]
    written: tuple[int, ...]


def capture_graph(graph: GraphModule, examples: Sequence[Argument], *, prove: bool = True) -> CapturedGraph:
    """Capture a graph as Dynamo gives it to a backend.

    What the module holds becomes weights of the program, unless the graph writes into it; sizes are read off the tensors
    that have them; axes that Dynamo keeps dynamic stay so.

    Args:
        examples: the arguments of the call that made Dynamo compile; tensors are real.
        prove: run the program and compare it with the graph, also with every dynamic axis one longer.

    Raises:
        TargetError: training, tensors without numbers, tensor subclasses, several devices, arguments that share memory.
        CaptureError: torch.export cannot trace the graph.
        GateError: the program is not what the graph computes.
    """
    _check(graph, examples)
    outputs = read_outputs(graph)
    written: frozenset[int] = frozenset()
    with outside_dynamo():
        while True:
            arguments = read_arguments(graph, examples, written)
            program, inputs, module, sizes = _export(graph, arguments, outputs, examples)
            found = _written_weights(program, arguments)
            if not found:
                break
            written |= found
        if prove:
            program.proof = prove_module(program, module, inputs, _cases(inputs, sizes))
    return CapturedGraph(program, arguments, outputs, inputs, sizes, tuple(written_inputs(program)))


@contextmanager
def outside_dynamo() -> Iterator[None]:
    """Without gradients and outside of what Dynamo traces, as what runs in here is not part of the user's call."""
    with ExitStack() as stack:
        stack.enter_context(torch._guards.tracing(None))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        yield


def _check(graph: GraphModule, examples: Sequence[Argument]) -> None:
    nodes, tensors = placeholders(graph), [item for item in examples if isinstance(item, Tensor)]
    if torch.is_grad_enabled():
        wanting = [node.name for node, item in zip(nodes, examples, strict=True) if _wants_gradient(item)]
        if wanting:
            raise TargetError(
                'torch.compile(backend="optc") does not train',
                where=wanting[0],
                why=f"gradients are recorded, and {len(wanting)} of the graph's tensors require one",
                remedy="call the model under torch.inference_mode() or torch.no_grad(), or model.requires_grad_(False)",
            )
    for node, item in zip(nodes, examples, strict=True):
        if isinstance(item, FakeTensor) or _is_wrapped(item):
            raise TargetError(
                "the graph takes tensors that cannot be run",
                where=node.name,
                why=f"it is a {type(item).__name__}",
                remedy="call the compiled model with plain tensors",
            )
    devices = {str(item.device) for item in tensors}
    if len(devices) > 1:
        raise TargetError(
            "the graph runs on several devices",
            where=", ".join(sorted(devices)),
            remedy="move the model and its inputs to one device",
        )


def _wants_gradient(item: Argument) -> bool:
    return isinstance(item, Tensor) and item.requires_grad


def _is_wrapped(item: Argument) -> bool:
    """Whether an argument is a tensor whose numbers lie in other tensors."""
    return isinstance(item, Tensor) and is_traceable_wrapper_subclass(item)


def _export(
    graph: GraphModule, arguments: Arguments, outputs: Outputs, examples: Sequence[Argument]
) -> tuple[Program, tuple[Tensor, ...], GraphModule, tuple[tuple[Any, ...], ...]]:
    """(program, its example inputs, the module that was traced, what Dynamo knows of the inputs' axes)."""
    nodes = placeholders(graph)
    module = standalone(graph, arguments, outputs, examples)
    inputs = [examples[index].detach() for index in arguments.tensors]  # type: ignore[union-attr]
    sizes = [tuple(nodes[index].meta["example_value"].shape) for index in arguments.tensors]
    for index in arguments.numbers:
        number = compat.size_hint(examples[index])  # type: ignore[arg-type]
        if number < 0:
            raise TargetError(
                "the graph takes a negative number that changes from call to call",
                where=nodes[index].name,
                why=f"it is {number}, and only sizes may be dynamic",
                remedy="pass it as a tensor, or compile with dynamic=False",
            )
        inputs.append(number_carrier(number))
        sizes.append((examples[index], 0))
    shapes = tuple({a: Dim.AUTO for a, size in enumerate(row) if isinstance(size, SymInt)} for row in sizes)
    with torch.fx.traceback.preserve_node_meta():
        exported = run_export(module, tuple(inputs), shapes, where=WHERE)
    program = Program(exported, module_contract(exported, WHERE))
    return program, tuple(inputs), module, tuple(sizes)


def number_carrier(number: int) -> Tensor:
    """A tensor [number, 0] without memory: how a program takes a size that no other tensor has."""
    return torch.empty((number, 0))


def _written_weights(program: Program, arguments: Arguments) -> frozenset[int]:
    storage, numbers = Storage(program.graph), {name: index for index, name in arguments.weights.items()}
    named = ((program.weight_of(node), node) for node in program.graph.nodes)
    return frozenset(numbers[name] for name, node in named if name in numbers and storage.written(node))


def _cases(inputs: Sequence[Tensor], sizes: Sequence[Sequence[Any]]) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """(what it is, inputs): those of the call, and where sizes are dynamic, each of those one longer."""
    yield "the inputs of the call", tuple(inputs)
    symbolic = [size for row in sizes for size in row if isinstance(size, SymInt)]
    hints = {symbol: hint for size in symbolic for symbol, hint in compat.size_symbols(size).items()}
    if hints:
        longer = {symbol: hint + 1 for symbol, hint in hints.items()}
        text = ", ".join(f"{symbol} = {size}" for symbol, size in longer.items())
        yield text, tuple(_resized(item, row, longer) for item, row in zip(inputs, sizes, strict=True))


def _resized(tensor: Tensor, sizes: Sequence[Any], values: dict[sympy.Symbol, int]) -> Tensor:
    shape = [int(size.node.expr.subs(values)) if isinstance(size, SymInt) else size for size in sizes]
    return resize(tensor, shape)
