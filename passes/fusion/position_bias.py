"""scale * q k^T + slope * position of the key  ->  scale * [q, slope / scale] [k, position]^T

A bias that says the same to every query, up to what a softmax does not see, is one more product of a feature of the query
with a feature of the key, so that every attention, cache and kernel that takes wider heads takes it. Keys hold their own
position, or what else the bias is made of, and a cache keeps it with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.dataflow import aten, value_of
from optc.compiler.analysis.masks.elements import UnprovenError
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import add_weight, insert_call

_MULTIPLE = 8
"""Of head sizes that kernels like."""
_FINE = 128
"""In 16 bits positions are held as a multiple of this and the rest, each without rounding (bfloat16: up to 32768)."""


@dataclass(frozen=True, eq=False)
class KeyBias:
    """A bias of keys.

    Attributes:
        factors: what it is multiplied with, over the scale of the attention, [H]; of positions the slopes.
        values: [B, Hkv, 1, T], or None: the positions.
    """

    factors: Tensor
    values: Node | None = None


class KeyFeatures:
    """Features behind those of queries, keys and values of one program."""

    def __init__(self) -> None:
        self._columns: dict[tuple[torch.dtype, int], Node] = {}

    def widen(
        self, program: Program, operands: tuple[Node, Node, Node], bias: KeyBias, before: Node
    ) -> tuple[Node, Node, Node]:
        """q [B,H,S,D], k and v [B,Hkv,T,D] with D' - D more features each; v gets zeros, where it is as wide as k."""
        q, k, v = operands
        width, dtype = int(value_of(q).shape[3]), value_of(q).dtype
        count = 2 if bias.values is None and dtype.itemsize < 4 else 1
        more = -(width + count) % _MULTIPLE + count
        factors = torch.zeros(bias.factors.shape[0], 1, more, dtype=dtype)
        factors[:, 0, :count] = bias.factors[:, None].to(dtype)
        if bias.values is None:
            column = self._positions(program, dtype, more)
        else:
            turned = insert_call(program, before, aten.transpose.int, (bias.values, 2, 3))
            column = insert_call(program, before, aten.mul.Tensor, (turned, _unit(program, more, 0, dtype)))
        wide_q = _behind(program, q, _weight(program, factors), before)
        wide_k = _behind(program, k, column, before)
        if value_of(v).shape[3] != width:
            return wide_q, wide_k, v
        return wide_q, wide_k, _behind(program, v, _weight(program, torch.zeros(more, dtype=dtype)), before)

    def _positions(self, program: Program, dtype: torch.dtype, more: int) -> Node:
        """[B, 1, T, W]: the positions of the keys, and zeros; made once, where the inputs end."""
        if (dtype, more) not in self._columns:
            place = next(node for node in program.graph.nodes if node.op != "placeholder")
            positions = program.user_inputs()[position_input(program)]
            parts = [positions]
            if dtype.itemsize < 4:
                fine = insert_call(program, place, aten.remainder.Scalar, (positions, _FINE))
                parts = [insert_call(program, place, aten.sub.Tensor, (positions, fine)), fine]
            column = None
            for number, part in enumerate(parts):
                value = insert_call(program, place, aten.to.dtype, (part, dtype))
                for axis in (1, 3):
                    value = insert_call(program, place, aten.unsqueeze.default, (value, axis))
                value = insert_call(program, place, aten.mul.Tensor, (value, _unit(program, more, number, dtype)))
                column = value if column is None else insert_call(program, place, aten.add.Tensor, (column, value))
            assert column is not None
            self._columns[dtype, more] = column
        return self._columns[dtype, more]


def position_input(program: Program) -> int:
    """Which input holds the positions of the tokens.

    Raises:
        UnprovenError: the program is not told positions.
    """
    index = program.contract.input_index("position_ids")
    if program.contract.kind != "decoder" or not program.contract.position_rule or index is None:
        raise UnprovenError("a bias that grows along the keys takes a decoder that is told positions")
    return index


def _behind(program: Program, heads: Node, features: Node, before: Node) -> Node:
    """[B, H, S, D] with features that broadcast to [B, H, S, W]."""
    sizes = [insert_call(program, before, aten.sym_size.int, (heads, axis)) for axis in (0, 2)]
    shape = [sizes[0], int(value_of(heads).shape[1]), sizes[1], value_of(features).shape[-1]]
    wide = insert_call(program, before, aten.expand.default, (features, shape))
    return insert_call(program, before, aten.cat.default, ([heads, wide], -1))


def _unit(program: Program, size: int, place: int, dtype: torch.dtype) -> Node:
    unit = torch.zeros(size, dtype=dtype)
    unit[place] = 1
    return _weight(program, unit)


def _weight(program: Program, value: Tensor) -> Node:
    held = program.exported.state_dict
    name = next(name for i in range(len(held) + 1) if (name := f"key_features_{i}") not in held)
    return add_weight(program, name, value)
