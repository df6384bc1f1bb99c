"""The two products of attention: q k^T and weights v, as matmul, bmm or einsum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy as sp
from torch.fx import Node

from optc.compiler.analysis.dataflow import VIEWS, aten, is_tensor, value_of
from optc.compiler.analysis.masks.elements import operator_name, shape_of


@dataclass(frozen=True)
class Operand:
    """A tensor and the order of its axes that makes it [B, (H,) positions, features]."""

    node: Node
    axes: tuple[int, ...]

    @property
    def plain(self) -> bool:
        """Whether the axes are in order already."""
        return self.axes == tuple(range(len(self.axes)))

    @property
    def shape(self) -> tuple[Any, ...]:
        """Sizes in order, as sympy expressions."""
        sizes = shape_of(self.node)
        return tuple(sizes[axis] for axis in self.axes)


@dataclass(frozen=True)
class _Product:
    """A product of two activations: einsum letters of its operands and of the result."""

    left: Node
    right: Node
    letters: tuple[str, str, str]


def _product(node: Node) -> _Product | None:
    """`node` as a batched product of two activations, else None."""
    name = operator_name(node)
    if name in ("matmul", "bmm", "baddbmm"):
        left, right = node.args[-2:]
        batch = "abcdefgh"[: value_of(node).dim() - 2] if is_tensor(node) else ""
        letters = (f"{batch}xy", f"{batch}yz", f"{batch}xz")
    elif name == "einsum":
        equation: Any = node.args[0]
        operands: Any = node.args[1]
        inputs, arrow, output = equation.replace(" ", "").partition("->")
        parts = inputs.split(",")
        if len(parts) != 2 or not arrow or len(node.args) > 2 or not (inputs + output).replace(",", "").isalpha():
            return None
        (left, right), letters = operands, (parts[0], parts[1], output)
    else:
        return None
    if not (isinstance(left, Node) and isinstance(right, Node) and len(letters[2]) >= 2):
        return None
    fits = all(
        value_of(item).dim() == len(part) == len(set(part)) for item, part in zip((left, right), letters, strict=False)
    )
    return _Product(left, right, letters) if fits else None


def score_factors(node: Node) -> tuple[Operand, Operand] | None:
    """q and k of the scores [B, (H,) S, T] that a product computes, else None."""
    product = _product(node)
    if product is None:
        return None
    left, right, out = product.letters
    batch, query, key = out[:-2], out[-2], out[-1]
    first, second = product.left, product.right
    if key in left and query in right:
        left, right, first, second = right, left, second, first
    summed = set(left) & set(right) - set(out)
    if len(summed) != 1:
        return None
    feature = summed.pop()
    if set(left) != {*batch, query, feature} or set(right) != {*batch, key, feature}:
        return None
    q = Operand(first, tuple(left.index(letter) for letter in batch + query + feature))
    k = Operand(second, tuple(right.index(letter) for letter in batch + key + feature))
    return q, _through_transpose(k)


def weighted_values(node: Node, weights: Node) -> tuple[Operand, tuple[int, ...]] | None:
    """v, and the order of the result's axes, of the product of `weights` [B, (H,) S, T] with v."""
    product = _product(node) if operator_name(node) != "baddbmm" else None
    if product is None or weights not in (product.left, product.right):
        return None
    left, right, out = product.letters
    value = product.right
    if product.left is not weights:
        if operator_name(node) != "einsum":
            return None
        left, right, value = right, left, product.left
    batch, query, key = left[:-2], left[-2], left[-1]
    feature = set(right) - set(left)
    if len(feature) != 1 or value is weights:
        return None
    letter = feature.pop()
    if set(right) != {*batch, key, letter} or set(out) != {*batch, query, letter}:
        return None
    v = Operand(value, tuple(right.index(item) for item in batch + key + letter))
    return _through_transpose(v), tuple((batch + query + letter).index(item) for item in out)


def splits_heads(node: Node) -> bool:
    """Whether a view parts [B * H, S, T] into [B, H, S, T]."""
    return node.target in VIEWS and _is_merged(shape_of(node.all_input_nodes[0]), shape_of(node))


def merges_heads(node: Node) -> bool:
    """Whether a view joins [B, H, S, T] to [B * H, S, T]."""
    return node.target in VIEWS and _is_merged(shape_of(node), shape_of(node.all_input_nodes[0]))


def _is_merged(merged: tuple[Any, ...], apart: tuple[Any, ...]) -> bool:
    fits = len(merged) == 3 and len(apart) == 4 and merged[1:] == apart[2:]
    return fits and sp.expand(apart[0] * apart[1] - merged[0]) == 0


def before_merge(operand: Operand) -> Operand | None:
    """[B, H, positions, features] whose heads were joined to make `operand` [B * H, positions, features], else None."""
    node = operand.node
    if not (operand.plain and merges_heads(node)):
        return None
    source = node.args[0]
    assert isinstance(source, Node)
    return Operand(source, (0, 1, 2, 3))


def _through_transpose(operand: Operand) -> Operand:
    """The operand before a transposition of its last two axes, when that puts them in order."""
    node, rank = operand.node, len(operand.axes)
    swapped = (*range(rank - 2), rank - 1, rank - 2)
    if operand.axes != swapped or node.target is not aten.transpose.int:
        return operand
    axes = {int(axis) % rank for axis in node.args[1:3]}
    if axes != {rank - 2, rank - 1}:
        return operand
    source = node.args[0]
    assert isinstance(source, Node)
    return Operand(source, tuple(range(rank)))
