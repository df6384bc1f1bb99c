"""Reading a graph: what a node really reads, what it is made from, what it comes to.

Passes find their sites by dataflow. Nothing in this file looks at a name of a model or of a weight.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.ir.asserts import is_assert
from optc.compiler.ir.program import Program

aten = torch.ops.aten

CASTS = frozenset(
    (
        aten.to.dtype,
        aten.to.device,
        aten.to.dtype_layout,
        aten.to.other,
        aten._to_copy.default,
        aten.type_as.default,
    )
)
COPIES = frozenset(
    (
        aten.alias.default,
        aten.contiguous.default,
        aten.clone.default,
        aten.detach.default,
        aten.lift_fresh_copy.default,
        aten.dropout.default,
    )
)
VIEWS = frozenset(
    (
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.squeeze.dim,
    )
)
"""Ops whose result holds the elements of their input in the same order."""
MOVES = VIEWS | frozenset(
    (
        aten.slice.Tensor,
        aten.select.int,
        aten.narrow.default,
        aten.cat.default,
        aten.stack.default,
        aten.transpose.int,
        aten.permute.default,
        aten.expand.default,
        aten.repeat_interleave.self_int,
        aten.chunk.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        operator.getitem,
    )
)
"""Ops whose result holds elements of their inputs, rearranged."""
ELEMENTWISE = frozenset(
    (
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.tanh.default,
        aten.clamp.default,
        aten.neg.default,
        aten.softmax.int,
        aten._softmax.default,
        aten.sigmoid.default,
    )
)


def value_of(node: Node) -> Tensor:
    """The fake tensor of a node."""
    value = node.meta["val"]
    assert isinstance(value, Tensor), f"{node.name} is no tensor"
    return value


def is_tensor(node: object) -> bool:
    """Whether a node computes one tensor."""
    return isinstance(node, Node) and isinstance(node.meta.get("val"), Tensor)


def peel(node: Node) -> Node:
    """The node whose very values this one has: behind casts to the same type, aliases, inactive dropout."""
    while node.target in CASTS | COPIES:
        source = node.args[0]
        assert isinstance(source, Node)
        dropping = node.target is aten.dropout.default and node.args[2]
        if dropping or value_of(source).dtype != value_of(node).dtype:
            return node
        node = source
    return node


def truncates(node: Node) -> bool:
    """Whether a node casts real numbers to integers: a change of value, not of precision."""
    if node.target not in CASTS:
        return False
    source = value_of(node.args[0])
    return source.is_floating_point() and not value_of(node).is_floating_point()


def peel_casts(node: Node) -> Node:
    """Like `peel`, but through casts to other precisions too."""
    while (inner := peel(node)).target in CASTS and not truncates(inner):
        node = inner.args[0]
    return inner


def readers(node: Node) -> list[Node]:
    """The nodes that read this one, in graph order; asserts on its type do not count."""
    return sorted(user for user in node.users if not is_assert(user.target))


SHAPE_ONLY = frozenset(
    (
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.empty_like.default,
        aten.full_like.default,
        aten.new_zeros.default,
        aten.new_ones.default,
        aten.sym_size.int,
    )
)
"""Ops that read the shape of their input, not its values."""


def value_readers(node: Node) -> list[Node]:
    """The readers of a node's values."""
    return [user for user in readers(node) if user.target not in SHAPE_ONLY]


def sole_user(node: Node) -> Node | None:
    """The one node that reads this one, or None when there are several or none."""
    users = readers(node)
    return users[0] if len(users) == 1 else None


def scalar(argument: object) -> float | None:
    """A Python number as a float, else None."""
    return float(argument) if isinstance(argument, int | float) and not isinstance(argument, bool) else None


def inputs_of(node: Node) -> list[Node]:
    """The nodes whose values a call reads: `type_as` reads its second tensor for the type alone."""
    return node.all_input_nodes[:1] if node.target in CASTS else node.all_input_nodes


def leaves(node: Node, through: Callable[[Node], bool], stop: frozenset[Node] = frozenset()) -> list[Node]:
    """What `node` is made from, walking back through nodes that `through` accepts; in first-seen order."""
    found: dict[Node, None] = {}
    seen: set[Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen or isinstance(current.meta.get("val"), torch.SymInt):
            continue
        seen.add(current)
        if current in stop or current.op != "call_function" or not through(current):
            found[current] = None
        else:
            stack += reversed(inputs_of(current))
    return list(found)


@dataclass
class Sizes:
    """Small numbers in place of the symbolic sizes of a graph, a different prime for each symbol."""

    numbers: dict[Any, int] = field(default_factory=dict)

    def number(self, size: int | torch.SymInt) -> int:
        """An int for a size that may be symbolic."""
        if isinstance(size, int):
            return size
        import sympy

        expression = size.node.expr
        for symbol in sorted(expression.free_symbols, key=str):
            self.numbers.setdefault(symbol, int(sympy.prime(len(self.numbers) + 1)))
        return int(expression.subs(self.numbers))

    def shape(self, node: Node) -> tuple[int, ...]:
        """The shape of a node's value with numbers in place of symbols."""
        return tuple(self.number(size) for size in value_of(node).shape)


def evaluate(node: Node, values: Mapping[Node, Any], sizes: Sizes | None = None) -> Any:
    """Compute `node` from the values of the nodes it is made from.

    With `sizes`, symbolic sizes become its numbers and casts are skipped, so that an expression can be
    probed in float64 at small shapes; without, the graph is run as it is.
    """
    memo = dict(values)

    def run(current: Node) -> Any:
        if current not in memo:
            number = current.meta.get("val")
            if sizes and isinstance(number, int | torch.SymInt):
                memo[current] = sizes.number(number)
            elif sizes and (current.target in CASTS or current.target in COPIES):
                memo[current] = run(current.args[0])
            else:
                assert callable(current.target), f"{current.name} has no given value"
                args, kwargs = torch.fx.node.map_arg((current.args, current.kwargs), run)
                if sizes and kwargs.get("device") is not None:
                    kwargs = {**kwargs, "device": torch.device("cpu")}  # where the probed values are
                memo[current] = current.target(*args, **kwargs)
        return memo[current]

    with torch.no_grad():
        result = run(node)
    memo.clear()  # `run` refers to itself: what it holds would stay until the next collection of cycles
    return result


def constant(program: Program, node: Node) -> Tensor | None:
    """The value of an expression over weights alone, or None when it reads anything else."""
    roots = constant_roots(program, node)
    values = {root: program.weight(name) for root, name in roots.items()}
    return evaluate(node, values) if roots else None


def constant_roots(program: Program, node: Node) -> dict[Node, str]:
    """The weights of an expression over weights alone; empty when it reads anything else."""
    roots = {
        root: program.weight_of(root)
        for root in leaves(node, lambda current: current.target in CASTS | COPIES | MOVES | ELEMENTWISE)
    }
    named = {root: name for root, name in roots.items() if name is not None}
    return named if len(named) == len(roots) else {}


def pointwise_source(program: Program, node: Node) -> Node | None:
    """The one activation that a cast, a move or an elementwise call with constants reads, else None."""
    if node.op != "call_function" or node.target not in CASTS | COPIES | MOVES | ELEMENTWISE:
        return None
    read = [item for item in inputs_of(node) if is_tensor(item) and program.weight_of(item) is None]
    return read[0] if len(read) == 1 else None
