"""Rules of operators that give the same elements at other places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy as sp
import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.masks.elements import (
    Elements,
    Index,
    Rule,
    UnprovenError,
    number,
    registrar,
    shape_of,
)

MOVES: dict[str, Rule] = {}
_rule = registrar(MOVES)


def first_tensor(node: Node) -> Node:
    """The first argument of a call, which must be a tensor."""
    source = node.args[0]
    if not isinstance(source, Node) or not isinstance(source.meta["val"], Tensor):
        raise UnprovenError(f"{node.name} ({node.target}) reads no tensor")
    return source


@_rule("alias", "contiguous", "clone", "detach", "lift_fresh_copy", "lift_fresh")
def _same(elements: Elements, node: Node, index: Index) -> Any:
    return elements.at(first_tensor(node), index, node)


@_rule("expand", "expand_as")
def _expand(elements: Elements, node: Node, index: Index) -> Any:
    return elements.operand(first_tensor(node), index, node)


@_rule("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "flatten", "unflatten", "view_as", "reshape_as")
def _reshape(elements: Elements, node: Node, index: Index) -> Any:
    source = first_tensor(node)
    if source.meta["val"].dtype != node.meta["val"].dtype:
        raise UnprovenError(f"{node.name} reads the bits of {source.name} as another type")
    return elements.at(source, regroup(index, shape_of(node), shape_of(source), elements.extents, node), node)


@_rule("transpose", "swapaxes")
def _transpose(elements: Elements, node: Node, index: Index) -> Any:
    moved = list(index)
    a, b = (int(axis) % len(index) for axis in node.args[1:3])
    moved[a], moved[b] = moved[b], moved[a]
    return elements.at(first_tensor(node), tuple(moved), node)


@_rule("t")
def _matrix_transpose(elements: Elements, node: Node, index: Index) -> Any:
    return elements.at(first_tensor(node), index[::-1], node)


@_rule("permute")
def _permute(elements: Elements, node: Node, index: Index) -> Any:
    moved = list(index)
    axes: Any = node.args[1]
    for position, axis in enumerate(axes):
        moved[axis % len(index)] = index[position]
    return elements.at(first_tensor(node), tuple(moved), node)


@_rule("repeat")
def _repeat(elements: Elements, node: Node, index: Index) -> Any:
    source = first_tensor(node)
    shape = shape_of(source)
    tail = index[len(index) - len(shape) :]
    same = zip(tail, shape, shape_of(node)[len(index) - len(shape) :], strict=True)
    found = [sp.Integer(0) if size == 1 else i if size == out else None for i, size, out in same]
    if None in found:
        raise UnprovenError(f"{node.name} repeats an axis of more than one element")
    return elements.at(source, tuple(found), node)


@_rule("slice", "narrow")
def _slice(elements: Elements, node: Node, index: Index) -> Any:
    source = first_tensor(node)
    given: list[Any] = [*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :]]
    axis, start, _, step = given
    axis = int(axis) % len(index)
    first = elements.size(start or 0, node)
    if first.is_negative:
        first = sp.expand(first + shape_of(source)[axis])
    if not first.is_nonnegative:
        raise UnprovenError(f"{node.name} starts at {first}, which may count from the end")
    place = first + index[axis] * elements.size(step, node)
    return elements.at(source, (*index[:axis], place, *index[axis + 1 :]), node)


@_rule("select")
def _select(elements: Elements, node: Node, index: Index) -> Any:
    source = first_tensor(node)
    axis = int(node.args[1]) % (len(index) + 1)
    place = elements.size(node.args[2], node)
    if place.is_negative:
        place = sp.expand(place + shape_of(source)[axis])
    if not place.is_nonnegative:
        raise UnprovenError(f"{node.name} takes element {place}, which may count from the end")
    return elements.at(source, (*index[:axis], place, *index[axis:]), node)


@_rule("index")
def _index(elements: Elements, node: Node, index: Index) -> Any:
    source, places = first_tensor(node), node.args[1]
    assert isinstance(places, list | tuple)
    if len(places) != len(shape_of(source)) or any(not isinstance(item, Node) for item in places):
        raise UnprovenError(f"{node.name} indexes some axes only")
    if any(item.meta["val"].dtype not in (torch.int64, torch.int32) for item in places):
        raise UnprovenError(f"{node.name} selects by a mask")
    found = tuple(number(elements.operand(item, index, node)) for item in places)
    for place in found:
        if not place.is_nonnegative:
            raise UnprovenError(f"{node.name} indexes with {place}, which may count from the end")
    return elements.at(source, found, node)


def regroup(index: Index, shape: Sequence[Any], source: Sequence[Any], extents: Mapping[Any, Any], node: Node) -> Index:
    """The index into a tensor of shape `source` behind an index into its reshaping to `shape`."""
    outer = [(i, n) for i, n in zip(index, shape, strict=True) if n != 1]
    inner = [(axis, n) for axis, n in enumerate(source) if n != 1]
    found: list[Any] = [sp.Integer(0)] * len(source)
    while outer and inner and sp.expand(outer[-1][1] - inner[-1][1]) == 0:
        found[inner.pop()[0]] = outer.pop()[0]
    while outer and inner and sp.expand(outer[0][1] - inner[0][1]) == 0:
        found[inner.pop(0)[0]] = outer.pop(0)[0]
    flat: Any = sp.Integer(0)
    for i, n in outer:
        flat = flat * n + i
    for axis, n in reversed(inner[1:]):
        flat, found[axis] = _divide(flat, n, extents, node)
    if inner:
        found[inner[0][0]] = flat
    return tuple(found)


def _divide(value: Any, divisor: Any, extents: Mapping[Any, Any], node: Node) -> tuple[Any, Any]:
    """Quotient and remainder of an index, when the remainder is plainly below the divisor."""
    quotient = remainder = sp.Integer(0)
    for term in sp.Add.make_args(sp.expand(value)):
        ratio = sp.cancel(term / divisor)
        if ratio.as_numer_denom()[1] == 1:
            quotient += ratio
        else:
            remainder += term
    bounded = remainder == 0 or (remainder in extents and sp.expand(extents[remainder] - divisor) == 0)
    if not bounded:
        raise UnprovenError(f"{node.name} slices an axis in a way that is not supported")
    return quotient, remainder
