"""What one element of a tensor is, as a function of its index.

Masks and index tensors are small programs over positions. Here such a subgraph is interpreted at
symbolic indices, with sympy, so that what it computes can be proved for every shape at once. What is
not understood raises; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy as sp
import torch
from sympy.logic.boolalg import BooleanAtom, BooleanFunction
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.aliases import Storage
from optc.compiler.ir.program import Program

BATCH, HEAD, QUERY, KEY = sp.symbols("b h q k", integer=True, nonnegative=True)

Index = tuple[Any, ...]
"""One sympy integer per axis."""

Rule = Callable[["Elements", Node, Index], Any]
"""Computes an element of a call from the elements of its arguments."""

RuleFinder = Callable[[Node], Rule | None]

_NARROW = (torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16)
_MAX_NODES, _MAX_DEPTH, _MAX_SIZE, _MAX_STEPS = 1000, 100, 2000, 4


class UnprovenError(Exception):
    """What stands in the way of a proof; the text names the node."""


class Where(sp.Function):
    """Where(condition, a, b), kept as it is until the condition is known."""

    nargs = 3

    @classmethod
    def eval(cls, condition: Any, then: Any, other: Any) -> Any:
        if condition == sp.true or then == other:
            return then
        return other if condition == sp.false else None


@dataclass(frozen=True)
class Leaf:
    """A tensor of zeros and ones, read per batch row and key. `axes` are those of b (or None) and k."""

    node: Node
    axes: tuple[int | None, int]


def operator_name(node: Node) -> str:
    """The name of an ATen operator without its overload; an in-place one is called like its plain twin.

    Empty for anything else.
    """
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.name.startswith("aten::"):
        return ""
    name: str = schema.name.removeprefix("aten::")
    return name.removesuffix("_") if schema.is_mutable and not name.endswith("__") else name


def registrar(table: dict[str, Rule]) -> Callable[..., Callable[[Rule], Rule]]:
    """A decorator that enters a rule into `table` under the names of operators."""

    def names(*operators: str) -> Callable[[Rule], Rule]:
        def register(rule: Rule) -> Rule:
            table.update(dict.fromkeys(operators, rule))
            return rule

        return register

    return names


def is_truth(value: Any) -> bool:
    """Whether an element is a truth value (a sympy Symbol is a Boolean to sympy, and a number here)."""
    return isinstance(value, BooleanFunction | BooleanAtom | sp.core.relational.Relational)


def truth(value: Any) -> Any:
    """An element as a truth value: numbers are true unless 0."""
    return value if is_truth(value) else sp.Ne(value, 0)


def number(value: Any) -> Any:
    """An element as a number: true is 1."""
    return Where(value, sp.Integer(1), sp.Integer(0)) if is_truth(value) else value


def size_of(size: int | torch.SymInt) -> Any:
    """A size as a sympy expression in the symbols of the graph."""
    return sp.Integer(size) if isinstance(size, int) else size.node.expr


def shape_of(node: Node) -> Index:
    """The shape of a node's tensor as sympy expressions."""
    return tuple(size_of(size) for size in node.meta["val"].shape)


def constant_element(value: bool | int | float) -> Any:
    """A Python number as an element; floats that are whole become integers."""
    if isinstance(value, bool):
        return sp.true if value else sp.false
    return sp.Integer(int(value)) if float(value).is_integer() else sp.sympify(value)


def bare_symbols(value: Any) -> set[Any]:
    """The symbols of a number outside the conditions in it."""
    if is_truth(value):
        return set()
    if isinstance(value, Where):
        return bare_symbols(value.args[1]) | bare_symbols(value.args[2])
    if isinstance(value, sp.Symbol):
        return {value}
    return {symbol for part in value.args for symbol in bare_symbols(part)}


class Elements:
    """The elements of a program's tensors.

    Args:
        find_rule: the rule of a call, or None when there is none (`element_rules.find_rule`).
        extents: the size that each index symbol runs up to.

    Attributes:
        leaves: the symbols that stand for zeros and ones of a tensor, and what they read.
    """

    def __init__(self, program: Program, storage: Storage, find_rule: RuleFinder, extents: Mapping[Any, Any]) -> None:
        self.program, self.storage, self.extents = program, storage, dict(extents)
        self._find_rule = find_rule
        self.leaves: dict[Any, Leaf] = {}
        self._weights = program.weight_names()
        specs = program.contract.inputs
        self._roles = {node: spec.role for node, spec in zip(program.user_inputs(), specs, strict=True)}
        self._memo: dict[tuple[Node, Index], Any] = {}
        self._sizes: dict[Any, int] = {}
        self._depth = 0

    def at(self, node: Node, index: Index, reader: Node) -> Any:
        """The element of `node` that `reader` reads: a sympy number or truth value.

        Raises:
            UnprovenError: it is not known, or too complicated.
        """
        written = self.storage.overwritten(node, reader)
        if written is not None:
            raise UnprovenError(f"{written.name} overwrites {node.name} before {reader.name} reads it")
        key = (node, index)
        if key not in self._memo:
            if len(self._memo) > _MAX_NODES or self._depth > _MAX_DEPTH:
                raise UnprovenError(f"too many operations lead to {reader.name}")
            self._depth += 1
            try:
                found = self._element(node, index)
            finally:
                self._depth -= 1
            self._check(node, found)
            self._memo[key] = found
        return self._memo[key]

    def operand(self, argument: Any, index: Index, reader: Node) -> Any:
        """An argument of an elementwise call, broadcast to the call's shape."""
        if isinstance(argument, bool | int | float):
            return constant_element(argument)
        if not isinstance(argument, Node):
            raise UnprovenError(f"{reader.name} has an argument of type {type(argument).__name__}")
        value = argument.meta["val"]
        if not isinstance(value, Tensor):
            return self.size(argument, reader)
        if value.dim() > len(index):
            raise UnprovenError(f"{argument.name} has more axes than {reader.name}")
        tail = index[len(index) - value.dim() :]
        return self.at(argument, tuple(_clip(i, n) for i, n in zip(tail, shape_of(argument), strict=True)), reader)

    def size(self, argument: Any, reader: Node) -> Any:
        """An integer argument, symbolic or not."""
        value = argument.meta["val"] if isinstance(argument, Node) else argument
        if isinstance(value, int | torch.SymInt) and not isinstance(value, bool):
            return size_of(value)
        raise UnprovenError(f"{reader.name} has an argument that is not an integer")

    def _element(self, node: Node, index: Index) -> Any:
        if node.op == "placeholder":
            return self._input(node, index)
        try:
            rule = self._find_rule(node)
            if rule is None:
                raise UnprovenError(f"{node.name} ({node.target}) is not supported")
            return rule(self, node, index)
        except UnprovenError:
            leaf = self._leaf(node, index, binary=node.meta["val"].dtype == torch.bool)
            if leaf is None:
                raise
            return leaf

    def _input(self, node: Node, index: Index) -> Any:
        name = self._weights.get(node.name)
        if name is not None:
            mutated = self.program.exported.graph_signature.buffers_to_mutate.values()
            if self.storage.written(node) or name in mutated:
                raise UnprovenError(f"the weight {name} is written")
            return _constant(name, self.program.weight(name), index)
        role = self._roles.get(node, "input")
        if role == "position_ids" and self.program.contract.position_rule and len(index) == 2:
            return sp.Function("base", integer=True)(index[0]) + index[1]
        binary = role == "attention_mask" or node.meta["val"].dtype == torch.bool
        leaf = self._leaf(node, index, binary=binary)
        if leaf is None:
            raise UnprovenError(f"it depends on {node.name}[{', '.join(map(str, index))}], an input")
        return leaf

    def _leaf(self, node: Node, index: Index, *, binary: bool) -> Any | None:
        """A tensor of zeros and ones that says which keys of a row count, as a symbol of its own."""
        rows = [axis for axis, item in enumerate(index) if item == BATCH]
        keys = [axis for axis, item in enumerate(index) if item == KEY]
        one_row = self.extents.get(BATCH) == 1
        if not binary or len(keys) != 1 or len(rows) > 1 or not (rows or one_row) or rows > keys:
            return None
        if any(item not in (BATCH, KEY, 0) for item in index):
            return None
        shape = shape_of(node)
        if any(sp.expand(shape[axis] - self.extents[index[axis]]) != 0 for axis in (*rows, *keys)):
            return None
        symbol = sp.Symbol(f"{node.name}[{', '.join(map(str, index))}]", integer=True, nonnegative=True)
        self.leaves[symbol] = Leaf(node, (rows[0] if rows else None, keys[0]))
        return sp.Eq(symbol, 1) if node.meta["val"].dtype == torch.bool else symbol

    def _check(self, node: Node, found: Any) -> None:
        if self._size(found) > _MAX_SIZE:
            raise UnprovenError(f"{node.name} is too complicated")
        dtype = node.meta["val"].dtype
        if dtype in _NARROW and bare_symbols(found) - set(self.leaves):
            raise UnprovenError(f"{node.name} has positions in {str(dtype).removeprefix('torch.')}, which rounds")

    def _size(self, value: Any) -> int:
        if value not in self._sizes:
            self._sizes[value] = 1 + sum(self._size(part) for part in value.args)
        return self._sizes[value]


def _clip(index: Any, size: Any) -> Any:
    """The index of a broadcast axis."""
    return sp.Integer(0) if size == 1 else index


def _constant(name: str, weight: Tensor, index: Index) -> Any:
    """An element of a weight: a number, arithmetic in its index, or steps along a difference of indices."""
    for axis in reversed([axis for axis, item in enumerate(index) if item.is_Integer]):
        if not 0 <= index[axis] < weight.shape[axis]:
            raise UnprovenError(f"the weight {name} has no element {index[axis]} along axis {axis}")
        weight = weight.select(axis, int(index[axis]))
    free = [item for item in index if not item.is_Integer]
    values = weight.detach().cpu()
    if values.numel() and bool((values == values.reshape(-1)[0]).all()):
        return constant_element(values.reshape(-1)[0].item())
    if len(free) == 1 and not values.is_floating_point() and values.dtype != torch.bool:
        step = values[1:].long() - values[:-1].long()
        if bool((step == step[0]).all()):
            return sp.Integer(int(values[0])) + sp.Integer(int(step[0])) * free[0]
    if len(free) == 2 and bool((values[1:, 1:] == values[:-1, :-1]).all()):
        diagonals = torch.cat([values[:, 0].flip(0), values[0, 1:]])
        levels, counts = torch.unique_consecutive(diagonals, return_counts=True)
        if len(levels) <= _MAX_STEPS:
            return _steps(levels, counts, free[1] - free[0], 1 - values.shape[0])
    raise UnprovenError(f"the weight {name} is not a bound on k - q")


def _steps(levels: Tensor, counts: Tensor, variable: Any, start: int) -> Any:
    """A step function: levels[i] holds for counts[i] consecutive values of `variable`, from `start` on."""
    ends = (counts.cumsum(0) + start - 1).tolist()
    found = constant_element(levels[-1].item())
    for level, end in zip(reversed(levels[:-1].tolist()), reversed(ends[:-1]), strict=True):
        condition, value = sp.Le(variable, end), constant_element(level)
        if is_truth(value):
            found = sp.Or(sp.And(condition, value), sp.And(sp.Not(condition), found))
        else:
            found = Where(condition, value, found)
    return found
