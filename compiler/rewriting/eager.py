"""A program's graph, run call by call on its own weights.

It computes what `Replay` computes: the same operators on the same arguments in the same order. A `Replay` is for tracing
too, and needs the module that torch makes of a program; to make it, and torch's own interpreter, take a fifth of the
time of a small model's stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node
from torch.fx.node import map_arg

from optc.compiler.ir.asserts import is_assert
from optc.compiler.ir.program import Program
from optc.compiler.ir.weight_table import WEIGHT_KINDS
from optc.compiler.ops.library import OpSpec, find
from optc.compiler.rewriting.known_products import KnownProducts, MarkedWeights
from optc.compiler.rewriting.made_weights import MadeWeights, made_by_rows
from optc.compiler.rewriting.retrace import Handler, Replay

_INPUTS = (*WEIGHT_KINDS, InputKind.USER_INPUT)


def runs_eagerly(program: Program) -> bool:
    """Whether a graph is calls on weights and inputs alone, and gives what its user gets and nothing else."""
    signature = program.exported.graph_signature
    return (
        all(spec.kind in _INPUTS for spec in signature.input_specs)
        and all(spec.kind is OutputKind.USER_OUTPUT for spec in signature.output_specs)
        and all(node.op in ("placeholder", "call_function", "output") for node in program.graph.nodes)
    )


def runner(
    program: Program,
    handlers: Mapping[Any, Handler],
    replay: type[Replay] = Replay,
    made: MadeWeights | None = None,
    products: KnownProducts | None = None,
) -> Callable[..., list[Any]]:
    """A function of flat user inputs that gives the flat outputs, as fast as this program and way of replaying allow.

    Args:
        handlers: answer the calls of some operators.
        made: keeps what is made of codes; None keeps it between the calls of this function.
        products: those of the program that was run before, so that what is the same is not computed again.
    """
    if replay is Replay and runs_eagerly(program):
        return EagerGraph(program, handlers, made or MadeWeights(), products)

    def run(*inputs: Any) -> list[Any]:
        with torch.no_grad():
            return replay(program, handlers).outputs(*inputs)

    return run


class EagerGraph:
    """Runs a program, for which `runs_eagerly` holds, as often as it is called.

    Args:
        handlers: answer the calls of some operators.
        made: keeps what is made of codes.
        products: of the program that was run before.
    """

    def __init__(
        self,
        program: Program,
        handlers: Mapping[Any, Handler],
        made: MadeWeights,
        products: KnownProducts | None = None,
    ) -> None:
        self._made, self._marked = made, MarkedWeights(products)
        table = program.weight_names()
        nodes = list(program.graph.nodes)
        self._weights: dict[Node, Any] = {
            node: program.weight(table[node.name]) for node in nodes if node.op == "placeholder" and node.name in table
        }
        self._inputs = program.user_inputs()
        self._output = next(node for node in nodes if node.op == "output")
        calls = [node for node in nodes if node.op == "call_function" and not is_assert(node.target)]
        last: dict[Node, Node] = {used: node for node in (*calls, self._output) for used in node.all_input_nodes}
        freed: dict[Node, list[Node]] = {}
        for used, node in last.items():
            if used not in self._weights:
                freed.setdefault(node, []).append(used)
        self._calls = [(node, self._caller(node, handlers), freed.get(node, ())) for node in calls]

    def __call__(self, *inputs: Any) -> list[Any]:
        """Flat outputs of flat user inputs."""
        values = {**self._weights, **dict(zip(self._inputs, inputs, strict=True))}
        with torch.no_grad():
            for node, call, freed in self._calls:
                args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = call(args, kwargs)
                for item in freed:
                    del values[item]
        return list(map_arg(self._output.args[0], values.__getitem__))

    def _caller(self, node: Node, handlers: Mapping[Any, Handler]) -> Handler:
        handler, spec = handlers.get(node.target), find(node.target)
        if handler is not None:
            return handler
        if spec is not None and spec.makes_weight and self._are_weights(node.args):
            return self._makes(node.target)
        if (
            spec is not None
            and spec.product is not None
            and self._are_weights([node.args[i] for i in spec.product.parts])
        ):
            return self._multiplies(spec)
        if node.target is torch.ops.aten.linear.default and self._is_made(node.args[1]):
            return lambda args, kwargs: self._marked.linear(*args, **kwargs)
        target: Callable[..., Any] = node.target
        return lambda args, kwargs: target(*args, **kwargs)

    def _are_weights(self, parts: Sequence[Any]) -> bool:
        return all(part in self._weights for part in parts if isinstance(part, Node))

    def _is_made(self, part: Any) -> bool:
        """Whether it is a weight, or made of codes alone."""
        spec = find(part.target) if isinstance(part, Node) and part.op == "call_function" else None
        return self._are_weights([part]) or (spec is not None and spec.makes_weight and self._are_weights(part.args))

    def _makes(self, target: Any) -> Handler:
        def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            return self._made.get(target, args, kwargs, lambda: made_by_rows(target, args, kwargs))

        return call

    def _multiplies(self, spec: OpSpec) -> Handler:
        product = spec.product
        assert product is not None

        def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            parts = [args[place] for place in product.parts]
            shape = {name: value for name, value in kwargs.items() if name not in product.apart}
            weight = self._made.get(spec.op, parts, shape, lambda: made_by_rows(product.weight, parts, kwargs))
            return self._marked.linear(product.multiplied(args[0], **kwargs), weight, args[product.bias])

        return call
