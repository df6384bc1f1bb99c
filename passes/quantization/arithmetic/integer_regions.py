"""Which tensors of a graph are held in 8-bit codes, so that an engine computes convolutions and linears in integers.

An engine takes a convolution in integers where its input, its weight and its result are in codes; a linear where its
input and its weight are. What stands between convolutions (sums, products, pools, views) is taken along where all that
it reads and what it gives are in codes. Normalizations, softmax and attention stay in floating point.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from optc.compiler.analysis.convolutions import Convolution, clipped_at_zero, unpadded
from optc.compiler.analysis.dataflow import COPIES, VIEWS, aten, is_tensor, peel, value_of, value_readers
from optc.compiler.analysis.linears import Linear
from optc.compiler.ir.program import Program
from optc.passes.quantization.arithmetic.gated_activations import GATED

_SAME_GRID = VIEWS | frozenset(
    (
        aten.permute.default,
        aten.transpose.int,
        aten.max_pool1d.default,
        aten.max_pool2d.default,
    )
)
"""Ops whose results are elements of their input: they have its codes."""
_OWN_GRID = frozenset(
    (
        aten.add.Tensor,
        aten.mul.Tensor,
        aten.cat.default,
        aten.avg_pool2d.default,
        aten.adaptive_avg_pool2d.default,
        *GATED,
    )
)
_POINTWISE = frozenset(
    (
        aten.relu.default,
        aten.relu6.default,
        aten.clamp.default,
        aten.clamp_min.default,
        aten.hardtanh.default,
        aten.hardsigmoid.default,
        aten.sigmoid.default,
        aten.gelu.default,
        aten.leaky_relu.default,
        aten.elu.default,
        aten.tanh.default,
        aten.mish.default,
    )
)
"""Functions of one tensor, element by element: computed in floating point between codes."""


@dataclass(frozen=True)
class Coded:
    """A tensor that is held in codes.

    Attributes:
        node: of the program. source: what is rounded. It is `node`, or its argument where the node is a clipping at
            zero, which the range of the codes does as well.
        bound: the most that a clipped one can be, infinite for relu; None where it is not clipped at zero.
        like: the coded tensor whose grid it has; None where it has its own.
        readers: calls in integers that read it, each with the argument that stands for it.
        everywhere: it is made in integers, so that all its readers take the codes.
    """

    node: Node
    source: Node
    bound: float | None
    like: Node | None
    readers: tuple[tuple[Node, Node], ...]
    everywhere: bool


@dataclass(frozen=True)
class Regions:
    """What is computed in integers.

    Attributes:
        coded: in graph order. inner: the calls between convolutions and linears, in graph order.
    """

    coded: tuple[Coded, ...]
    inner: tuple[Node, ...]


def integer_regions(program: Program, convolutions: Sequence[Convolution], linears: Sequence[Linear]) -> Regions:
    """The tensors that are coded so that these convolutions and linears are taken in integers."""
    made = {site.node for site in convolutions}
    near = _near(program, made)
    sites: list[Convolution | Linear] = [*convolutions, *linears]
    read = {site.node: _read(site) for site in sites}
    wanted = dict.fromkeys(peel(argument) for _, argument in read.values())
    inner: list[Node] = []
    for node in reversed(program.graph.nodes):
        if node in near and _in_integers(program, node) and outcome(node) in wanted:
            inner.append(node)
            wanted |= dict.fromkeys(map(peel, _tensors(node)))
    inner.reverse()
    makers = {outcome(node): node for node in (*made, *inner)}
    readers: dict[Node, list[tuple[Node, Node]]] = {}
    for call, argument in (*read.values(), *((node, item) for node in inner for item in _tensors(node))):
        readers.setdefault(peel(argument), []).append((call, argument))
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    nodes = sorted({*wanted, *makers}, key=order.__getitem__)
    return Regions(tuple(_coded(node, makers, readers) for node in nodes), tuple(inner))


def _read(site: Convolution | Linear) -> tuple[Node, Node]:
    """The call that reads the codes for a site, and the argument that stands for them: in front of zeros around it.

    Zeros are among the values of every grid, and engines take such a padding into the convolution.
    """
    padding = peel(site.input)
    source = unpadded(padding) if isinstance(site, Convolution) else padding
    alone = all(user is site.node for user in value_readers(padding)) and padding is site.input
    return (padding, source) if source is not padding and alone else (site.node, site.input)


def outcome(node: Node) -> Node:
    """What a call in integers gives: its result, behind a clipping at zero where that alone reads it."""
    if node.target in _SAME_GRID:
        return node
    following = value_readers(node)
    return following[0] if len(following) == 1 and clipped_at_zero(following[0]) is not None else node


def _coded(node: Node, makers: Mapping[Node, Node], readers: Mapping[Node, Sequence[tuple[Node, Node]]]) -> Coded:
    bound, maker = clipped_at_zero(node), makers.get(node)
    like = peel(_tensors(maker)[0]) if maker is not None and maker.target in _SAME_GRID else None
    source = node if bound is None else _tensors(node)[0]
    return Coded(node, source, bound, like, tuple(readers.get(node, ())), maker is not None)


def _tensors(node: Node) -> list[Node]:
    """The tensors that a call reads: no sizes."""
    return [item for item in node.all_input_nodes if is_tensor(item)]


def _near(program: Program, convolutions: Iterable[Node]) -> set[Node]:
    """What convolutions give, and all that is made of it element by element, by views, pools, sums and products."""
    found = set(convolutions)
    for node in program.graph.nodes:
        if node.target in _POINTWISE | _SAME_GRID | _OWN_GRID | COPIES and any(
            x in found for x in node.all_input_nodes
        ):
            found.add(node)
    return found


def _in_integers(program: Program, node: Node) -> bool:
    """Whether engines can compute a call in codes: of activations alone, without factors."""
    if node.target not in _SAME_GRID | _OWN_GRID:
        return False
    read = _tensors(node)
    if any(program.weight_of(item) is not None or value_of(item).dtype is not torch.float32 for item in read):
        return False
    if node.target in (aten.add.Tensor, aten.mul.Tensor):
        return (
            not node.kwargs
            and all(isinstance(item, Node) for item in node.args[:2])
            and len(read) == len(set(node.args[:2]))
        )
    return is_tensor(node)
