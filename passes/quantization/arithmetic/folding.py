"""Where a scale on the input of linears can go: into the weights of what produces it, found by dataflow.

linear(x, W) = linear(x / s, W * s) for any positive s per channel. Dividing x is free when what makes x ends in
something linear with weights of its own: the weight of a norm, the rows of an earlier linear, the value path
through attention. `trace` walks back from x and says which weights would be divided, or why none can be.

A channel's scale is known by its label. Moves (view, transpose, slice, split) move labels; attention with fewer
key/value heads than query heads ties the labels of all heads that read one value head.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.dataflow import VIEWS, aten, is_tensor, peel, value_of, value_readers
from optc.compiler.analysis.linears import linear_site
from optc.compiler.ir.program import Program

_NORMS = (aten.rms_norm.default, aten.layer_norm.default)
_ATTENTION = (torch.ops.optc.attention.default, aten.scaled_dot_product_attention.default)
_PICKS = (aten.slice.Tensor, aten.narrow.default, aten.select.int)
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
_HOMOGENEOUS = (aten.relu.default, aten.leaky_relu.default)


@dataclass(frozen=True)
class Division:
    """One weight to divide: `weight[index]` along `axis` by the scales of `labels` (-1: stays).

    Attributes:
        placeholder: the weight.
        index: the expert of a stacked weight, else None.
        axis: of the weight (after the expert is selected).
        labels: int64 [size of the axis].
    """

    placeholder: Node
    index: int | None
    axis: int
    labels: Tensor


@dataclass
class Fold:
    """How the channels [K] of a node can be divided.

    Attributes:
        labels: int64 [K], the free scale that each channel has; equal labels must get equal scales.
        divisions: the weights that change.
        reason: why it is not possible; empty when it is.
        widths: channels of a value head, of each attention on the way.
    """

    labels: Tensor
    divisions: list[Division] = field(default_factory=list)
    reason: str = ""
    widths: tuple[int, ...] = ()

    @property
    def free(self) -> int:
        """How many scales can be chosen."""
        return int(self.labels.max()) + 1


def trace(program: Program, node: Node, allowed: Sequence[Node], *, moves_only: bool = False) -> Fold:
    """How to divide the channels (last axis) of `node`, whose readers `allowed` are made up for elsewhere.

    Args:
        allowed: the readers of `node` that multiply their own weights by the scale.
        moves_only: stop at whatever works channel by channel (norms, products, relu), which a mixture of channels
            cannot pass; attention and moves are left, and biases.
    """
    channels = int(value_of(node).shape[-1])
    rank = value_of(node).dim()
    walk = _Walk(program, channels, moves_only)
    try:
        walk.back(node, torch.arange(channels).reshape((1,) * (rank - 1) + (channels,)), frozenset(allowed))
    except _BlockedError as blocked:
        return Fold(torch.arange(channels), reason=str(blocked), widths=tuple(walk.widths))
    return walk.finish()


class _BlockedError(Exception):
    """The walk met something that a scale cannot pass."""


class _Walk:
    """Walks back from a node with a tensor of labels that broadcasts to each node's value."""

    def __init__(self, program: Program, channels: int, moves_only: bool) -> None:
        self.program = program
        self.moves_only = moves_only
        self.widths: list[int] = []
        self.parent = list(range(channels))
        self.found: list[Division] = []

    def back(self, node: Node, labels: Tensor, allowed: frozenset[Node]) -> None:
        """Divide the value of `node` by the scales of `labels`; only `allowed` may read it besides."""
        if is_tensor(node):
            self._check_readers(node, allowed)
        target = node.target
        if self.program.weight_of(node) is not None:
            raise _BlockedError(f"{self.program.weight_of(node)} itself is read")
        inner = peel(node)
        if inner is not node:
            self.back(node.args[0], labels, frozenset([node]))
        elif self.moves_only and target in (*_NORMS, *_HOMOGENEOUS, aten.mul.Tensor):
            raise _BlockedError(f"{node.name} ({target}) makes the input: it works channel by channel")
        elif target in _NORMS:
            self._norm(node, labels)
        elif linear_site(self.program, node) is not None:
            self._linear(node, labels)
        elif target in VIEWS:
            self.back(node.args[0], _unview(node, labels), frozenset([node]))
        elif target in (aten.transpose.int, aten.permute.default, aten.t.default):
            self.back(node.args[0], _unpermute(node, labels), frozenset([node]))
        elif target in _PICKS or target is operator.getitem:
            self._pick(node, labels)
        elif target in _ATTENTION:
            self._attention(node, labels)
        elif target in _HOMOGENEOUS:
            self.back(node.args[0], labels, frozenset([node]))
        elif target is aten.mul.Tensor:
            self._product(node, labels)
        elif target is aten.add.Tensor and not node.kwargs:
            self._sum(node, labels)
        else:
            raise _BlockedError(f"{node.name} ({target}) makes the input: a scale cannot pass through it")

    def finish(self) -> Fold:
        """Number the tied labels and check that no weight is divided twice."""
        roots = torch.tensor([self._root(i) for i in range(len(self.parent))])
        kept, numbers = torch.unique(roots, return_inverse=True)
        del kept
        keys = [(item.placeholder, item.index, item.axis) for item in self.found]
        if len(set(keys)) < len(keys):
            return Fold(numbers, reason="a weight would be divided twice")
        table = torch.cat([numbers, torch.tensor([-1])])
        return Fold(
            numbers,
            [Division(item.placeholder, item.index, item.axis, table[item.labels]) for item in self.found],
            widths=tuple(self.widths),
        )

    # -- what a scale can pass ----------------------------------------------------------------

    def _check_readers(self, node: Node, allowed: frozenset[Node]) -> None:
        others = [user for user in value_readers(node) if user not in allowed]
        if others:
            raise _BlockedError(f"{others[0].name} ({others[0].target}) reads {node.name} too")

    def _divide(self, node: Any, axis: int, labels: Tensor, index: int | None = None, *, reader: Node) -> None:
        """Note the division of a weight that only `reader` may read."""
        name = self.program.weight_of(node)
        if name is None:
            raise _BlockedError(f"the weight of {reader.name} is computed")
        if [user for user in value_readers(node) if user is not reader] and index is None:
            raise _BlockedError(f"{name} is read elsewhere too")
        self.found.append(Division(node, index, axis, labels))

    def _norm(self, node: Node, labels: Tensor) -> None:
        if len(node.args[1]) != 1 or len(node.args) < 3 or node.args[2] is None:
            raise _BlockedError(f"the norm {node.name} has no weight")
        flat = _last_axis(labels, node)
        self._divide(node.args[2], 0, flat, reader=node)
        if node.target is aten.layer_norm.default and len(node.args) > 3 and node.args[3] is not None:
            self._divide(node.args[3], 0, flat, reader=node)

    def _linear(self, node: Node, labels: Tensor) -> None:
        site = linear_site(self.program, node)
        assert site is not None
        if site.placeholder is None:
            raise _BlockedError(f"the weight of {node.name} is already quantized")
        flat = _last_axis(labels, node)
        # A stacked weight is selected first; the readers of the selection are checked instead.
        reader = node if site.index is None else site.weight
        if site.index is not None and value_readers(site.weight) != [node]:
            raise _BlockedError(f"{self.program.weight_of(site.placeholder)} is read elsewhere too")
        self._divide(site.placeholder, 1 if site.transposed else 0, flat, site.index, reader=reader)
        if site.bias is not None:
            self._divide(site.bias, 0, flat, reader=node)

    def _pick(self, node: Node, labels: Tensor) -> None:
        """slice, narrow, select or one part of a split: the other parts of the source are read by others."""
        source = node.args[0]
        if node.target is operator.getitem:
            if source.target not in _SPLITS:
                raise _BlockedError(f"{node.name} comes from {source.target}")
            base, axis = source.args[0], _split_axis(source)
            places = _part(source, int(node.args[1]), axis)
            siblings = frozenset([source])
        else:
            base, axis = source, _axis_of(node)
            places = _picked(node, axis)
            siblings = frozenset(user for user in value_readers(base) if user is node or _apart(user, axis, places))
        rank = value_of(base).dim()
        axis %= rank
        size = value_of(base).shape[axis]
        if not isinstance(size, int):
            raise _BlockedError(f"{node.name} slices an axis of tokens")
        moved = labels.unsqueeze(axis) if node.target is aten.select.int else labels
        shape = list(moved.shape)
        shape[axis] = size
        whole = torch.full(shape, -1, dtype=torch.int64)
        wide = [len(places) if i == axis else extent for i, extent in enumerate(moved.shape)]
        whole.index_copy_(axis, torch.tensor(places), moved.expand(wide).contiguous())
        self.back(base, whole, siblings)

    def _attention(self, node: Node, labels: Tensor) -> None:
        """out[B,H,S,D] is linear in v[B,Hkv,T,D]; heads of one value head share their scales."""
        value = node.args[2]
        heads, kv_heads = (int(value_of(item).shape[1]) for item in (node, value))
        width = int(value_of(value).shape[3])
        self.widths.append(width)
        grouped = labels.expand(1, heads, 1, width).reshape(kv_heads, heads // kv_heads, width)
        for other in range(1, grouped.shape[1]):
            for left, right in zip(grouped[:, 0].flatten().tolist(), grouped[:, other].flatten().tolist(), strict=True):
                self._tie(left, right)
        self.back(value, grouped[:, 0].reshape(1, kv_heads, 1, width), frozenset([node]))

    def _product(self, node: Node, labels: Tensor) -> None:
        """A product is divided when one of its factors is: a weight per channel, or either activation."""
        first, second = node.args
        for factor in (second, first):
            if isinstance(factor, Node) and self.program.weight_of(factor) is not None:
                return self._vector(factor, labels, node)
        reasons = []
        for factor in (second, first):
            if not is_tensor(factor) or value_of(factor).shape[-1] != value_of(node).shape[-1]:
                continue
            mark, parents = len(self.found), list(self.parent)
            try:
                return self.back(factor, labels, frozenset([node]))
            except _BlockedError as blocked:
                del self.found[mark:]
                self.parent = parents
                reasons.append(str(blocked))
        raise _BlockedError("; ".join(reasons) or f"{node.name} has no factor with channels")

    def _sum(self, node: Node, labels: Tensor) -> None:
        first, second = node.args
        for bias, other in ((second, first), (first, second)):
            if isinstance(bias, Node) and self.program.weight_of(bias) is not None and isinstance(other, Node):
                self._vector(bias, labels, node)
                return self.back(other, labels, frozenset([node]))
        raise _BlockedError(f"{node.name} adds activations: both would have to be divided")

    def _vector(self, weight: Node, labels: Tensor, reader: Node) -> None:
        if tuple(value_of(weight).shape) != (labels.shape[-1],):
            raise _BlockedError(f"{self.program.weight_of(weight)} is not a vector over the channels")
        self._divide(weight, 0, _last_axis(labels, reader), reader=reader)

    # -- tied labels ----------------------------------------------------------------------------

    def _root(self, label: int) -> int:
        while self.parent[label] != label:
            label = self.parent[label]
        return label

    def _tie(self, left: int, right: int) -> None:
        if left < 0 or right < 0:
            if left != right:
                raise _BlockedError("heads that share a value head are read separately")
            return
        self.parent[self._root(right)] = self._root(left)


# -- moving labels back through moves -----------------------------------------------------------------


def _last_axis(labels: Tensor, node: Node) -> Tensor:
    """Labels that depend on the last axis alone, as a vector."""
    if any(size != 1 for size in labels.shape[:-1]):
        raise _BlockedError(f"{node.name} has channels on several axes")
    return labels.reshape(-1).expand(int(value_of(node).shape[-1])).contiguous()


def _unview(node: Node, labels: Tensor) -> Tensor:
    """Labels of a view's source; token axes come first and stay whole."""
    source, value = value_of(node.args[0]), value_of(node)
    count = 1
    sizes: list[int] = []
    first = next((i for i, size in enumerate(labels.shape) if size != 1), labels.dim())
    for size in value.shape[first:]:
        if not isinstance(size, int):
            raise _BlockedError(f"{node.name} mixes tokens and channels")
        sizes.append(size)
        count *= size
    flat = labels.reshape(labels.shape[first:]).expand(sizes).reshape(-1)
    taken, axis = 1, source.dim()
    while axis and taken < count:
        axis -= 1
        size = source.shape[axis]
        if not isinstance(size, int):
            raise _BlockedError(f"{node.name} mixes tokens and channels")
        taken *= size
    if taken % count:
        raise _BlockedError(f"{node.name} regroups channels")
    if taken > count:  # channels beside leading axes that the view split off
        flat = flat.repeat(taken // count)
    return flat.reshape((1,) * axis + tuple(int(size) for size in source.shape[axis:]))


def _unpermute(node: Node, labels: Tensor) -> Tensor:
    if node.target is aten.transpose.int:
        return labels.transpose(int(node.args[1]), int(node.args[2]))
    if node.target is aten.t.default:
        return labels.t()
    order = [int(axis) % labels.dim() for axis in node.args[1]]
    return labels.permute([order.index(axis) for axis in range(len(order))])


def _apart(user: Node, axis: int, places: list[int]) -> bool:
    """Whether a reader takes only other places of the same axis."""
    if user.target not in _PICKS or _axis_of(user) != axis:
        return False
    return not set(_picked(user, axis)) & set(places)


def _split_axis(split: Node) -> int:
    axis = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
    assert isinstance(axis, int)
    return axis % value_of(split.args[0]).dim()


def _axis_of(node: Node) -> int:
    axis = int(node.args[1] if len(node.args) > 1 else 0)
    return axis % value_of(node.args[0]).dim()


def _picked(node: Node, axis: int) -> list[int]:
    """The places along `axis` of its source that a slice, narrow or select reads."""
    size = value_of(node.args[0]).shape[axis]
    if not isinstance(size, int):
        raise _BlockedError(f"{node.name} slices an axis of tokens")
    places = torch.arange(size)
    if node.target is aten.select.int:
        return [int(places[int(node.args[2])])]
    if node.target is aten.narrow.default:
        start = int(node.args[2])
        return places[start : start + int(node.args[3])].tolist()
    start, end, step = (*node.args[2:], None, None, None)[:3]
    return places[slice(start, end, step)].tolist()


def _part(split: Node, index: int, axis: int) -> list[int]:
    """The places of one part of a split."""
    parts = split.meta["val"]
    sizes = [part.shape[axis] for part in parts]
    if not all(isinstance(size, int) for size in sizes):
        raise _BlockedError(f"{split.name} slices an axis of tokens")
    start = sum(sizes[:index])
    return list(range(start, start + sizes[index]))
