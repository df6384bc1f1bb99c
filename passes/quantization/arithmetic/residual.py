"""The residual stream of a program: which values may be held in another basis, and which weights that turns.

A model of RMSNorms is the same when every vector x of its residual stream is x R, R orthogonal: an RMSNorm without
weight gives norm(x R) = norm(x) R, linears that read the stream take W R for W, those that write into it R^T W (Ashkboos
et al. 2024, "SliceGPT", https://arxiv.org/abs/2401.15024, section 3). The norms' weights move into the linears that read
them first. `find_residual` follows the stream from the embedding on, in both directions, by dataflow; what it does not
know to keep the basis stops it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.dataflow import (
    CASTS,
    COPIES,
    VIEWS,
    aten,
    constant,
    constant_roots,
    evaluate,
    is_tensor,
    readers,
    truncates,
    value_of,
    value_readers,
)
from optc.compiler.analysis.linears import linear_site
from optc.compiler.analysis.rows import keeps_rows
from optc.compiler.ir.program import Program

_SUMS = (aten.add.Tensor, aten.sub.Tensor, aten.add_.Tensor)
_PRODUCTS = (aten.mul.Tensor, aten.div.Tensor)
_SQUARES = (aten.pow.Tensor_Scalar, aten.square.default)
_ZEROS = (aten.zeros_like.default, aten.zeros.default, aten.new_zeros.default)
_TOKENS = (aten.slice.Tensor, aten.select.int, aten.narrow.default, aten.index_select.default, aten.transpose.int)
"""Moves along axes that are named by their second argument, and the third of a transpose."""


@dataclass(frozen=True)
class Turn:
    """How a call wants one of its weights: channels along `axis` (from the end) scaled, then turned."""

    axis: int
    scale: Node | None = None


@dataclass
class Residual:
    """What holding the residual stream in another basis takes.

    Attributes:
        channels: D, its width.
        turns: weight -> call that reads it -> how.
        scales: weights of norms, as nodes, by the placeholder that they are made of -> its value that makes them 1.
    """

    channels: int
    turns: dict[Node, dict[Node, tuple[Turn, ...]]] = field(default_factory=dict)
    scales: dict[Node, float] = field(default_factory=dict)


class BlockedError(Exception):
    """Something reads or writes the residual stream that is not the same in another basis."""

    def __init__(self, node: Node, reason: str) -> None:
        super().__init__(reason)
        self.node = node


def find_residual(program: Program) -> Residual:
    """The residual stream that the program's embedding begins.

    Raises:
        BlockedError: there is none, or a call does something with it that depends on its basis; says which.
    """
    ids = program.contract.input_index("input_ids")
    starts = [node for node in program.calls(aten.embedding.default) if program.weight_of(node.args[0]) is not None]
    if ids is None or not starts:
        raise BlockedError(program.graph.output_node(), "no embedding of token ids begins a residual stream")
    walk = _Walk(program, int(value_of(starts[0]).shape[-1]))
    walk.join(starts[0], None)
    walk.run()
    walk.check_scales()
    return walk.found


class _Walk:
    """Values of the stream, each with the norm's weight that is still to be taken out of it (None: it is turned)."""

    def __init__(self, program: Program, channels: int) -> None:
        self.program, self.found = program, Residual(channels)
        self.scale: dict[Node, Node | None] = {}
        self.pending: list[Node] = []

    def join(self, node: Node, scale: Node | None) -> None:
        """A value of the stream, to be looked at."""
        if node in self.scale:
            if self.scale[node] is not scale:
                raise BlockedError(node, f"{node.name} is read behind a norm and without it")
        elif value_of(node).shape[-1] != self.found.channels:
            raise BlockedError(node, f"{node.name} ({node.target}) takes the channels of the residual stream apart")
        else:
            self.scale[node] = scale
            self.pending.append(node)

    def run(self) -> None:
        """Follow the stream to all that writes and reads it."""
        while self.pending:
            node = self.pending.pop()
            self._written(node, self.scale[node])
            for user in value_readers(node):
                self._read(user, node, self.scale[node])

    def check_scales(self) -> None:
        """Note which values make the norms' weights 1.

        Raises:
            BlockedError: none does, or something else reads them.
        """
        for scale in dict.fromkeys(item for item in self.scale.values() if item is not None):
            roots = [root for root in constant_roots(self.program, scale) if value_of(root).dim() == 1]
            neutral = [value for value in (1.0, 0.0) if len(roots) == 1 and self._is_one(scale, roots[0], value)]
            if not neutral:
                raise BlockedError(scale, f"{scale.name} cannot be made 1 by one weight")
            self._check_readers(roots[0], scale)
            self.found.scales[roots[0]] = neutral[0]

    # -- what writes the stream ---------------------------------------------------------------

    def _written(self, node: Node, scale: Node | None) -> None:
        """What `node` is made from has to be turned, so that it is."""
        target, site = node.target, linear_site(self.program, node)
        if site is not None:
            self._unscaled(node, scale)
            self._turn(node, site.placeholder, Turn(-1 if site.transposed else -2))
            if site.bias is not None:
                self._turn(node, site.bias, Turn(-1))
        elif target is aten.embedding.default:
            self._unscaled(node, scale)
            self._turn(node, node.args[0], Turn(-1))
        elif self._keeps_channels(node):
            self.join(_first(node), scale)
        elif target in _SUMS:
            for item in node.args[:2]:
                self._summand(node, item, scale)
        elif target in _PRODUCTS:
            channels, other = self._factors(node)
            if not self._uniform(other):
                self._check_scale(node, other, scale)
                scale = None
            self.join(channels, scale)
        elif target is aten.rms_norm.default:
            if list(node.args[1]) != [self.found.channels]:
                raise BlockedError(node, f"the norm {node.name} does not run over the channels")
            self._check_scale(node, (*node.args, None)[2], scale)
            self.join(_first(node), None)
        else:
            raise BlockedError(node, f"{node.name} ({target}) writes into the residual stream")

    def _summand(self, node: Node, item: Any, scale: Node | None) -> None:
        if isinstance(item, Node) and self.program.weight_of(item) is not None:
            self._unscaled(node, scale)
            self._turn(node, item, Turn(-1))
        elif is_tensor(item) and item.target in _ZEROS:
            pass  # what the outputs of experts are summed into
        elif is_tensor(item):
            self.join(item, scale)
        else:
            raise BlockedError(node, f"{node.name} adds a number to the residual stream")

    def _check_scale(self, node: Node, weight: Any, scale: Node | None) -> None:
        """What comes out of a norm with a weight is scaled by it, and by nothing else."""
        if weight is not scale:
            reason = f"the weight of the norm at {node.name} acts on what is added to the residual stream"
            raise BlockedError(node, reason)

    def _unscaled(self, node: Node, scale: Node | None) -> None:
        if scale is not None:
            raise BlockedError(node, f"{node.name} is read behind a norm and without it")

    # -- what reads the stream ----------------------------------------------------------------

    def _read(self, user: Node, node: Node, scale: Node | None) -> None:
        target, site = user.target, linear_site(self.program, user)
        if user.op == "output":
            raise BlockedError(node, f"{node.name}, of the residual stream, is an output of the program")
        if site is not None and site.input is node:
            self._turn(user, site.placeholder, Turn(-2 if site.transposed else -1, scale))
        elif target in _SQUARES or (target in _PRODUCTS and user.args[0] is user.args[1]):
            self._check_square(user)
        elif target in CASTS and _first(user) is not node:
            pass  # it reads the type alone
        elif (self._keeps_channels(user) and _first(user) is node) or target in _SUMS:
            self.join(user, scale)
        elif target in _PRODUCTS:
            other = self._other_factor(user, node)
            if not self._uniform(other):
                self._unscaled(user, scale)
                scale = other
            self.join(user, scale)
        elif target is aten.rms_norm.default and _first(user) is node:
            self._unscaled(user, scale)
            self.join(user, (*user.args, None)[2])
        elif target is aten.layer_norm.default:
            raise BlockedError(
                user, "LayerNorm subtracts the mean of the channels, which a rotation of them does not keep"
            )
        else:
            raise BlockedError(user, f"{user.name} ({target}) reads the residual stream")

    def _check_square(self, square: Node) -> None:
        """A square may only be averaged over the channels: their length is the same in every basis."""
        rank = value_of(square).dim()
        for user in value_readers(square):
            axes = user.args[1] if user.target in (aten.mean.dim, aten.sum.dim_IntList) else None
            if not isinstance(axes, Sequence) or [int(axis) % rank for axis in axes] != [rank - 1]:
                raise BlockedError(user, f"{user.name} ({user.target}) reads squares of the residual stream")
        if square.target is aten.pow.Tensor_Scalar and square.args[1] != 2:
            raise BlockedError(square, f"{square.name} is a power of the residual stream, and not its square")

    # -- calls ------------------------------------------------------------------------------------

    def _factors(self, node: Node) -> tuple[Node, Any]:
        """(the factor that is of the stream, the other one) of a product or a quotient, by what the factors look like."""
        first, second = node.args[:2]
        swapped = node.target is aten.mul.Tensor and (self._uniform(first) or self._constant(first))
        channels, other = (second, first) if swapped else (first, second)
        known = is_tensor(channels) and (self._uniform(other) or self._constant(other))
        if not known:
            raise BlockedError(node, f"{node.name} ({node.target}) writes into the residual stream")
        return channels, other

    def _other_factor(self, node: Node, known: Node) -> Any:
        """The factor that a value of the stream is multiplied with, or divided by."""
        first, second = node.args[:2]
        other = second if first is known else first
        divides = first is not known and node.target is aten.div.Tensor
        if divides or not (self._uniform(other) or self._constant(other)):
            raise BlockedError(node, f"{node.name} ({node.target}) reads the residual stream")
        return other

    def _uniform(self, factor: Any) -> bool:
        """Whether a factor is the same for all channels of a token."""
        return not is_tensor(factor) or value_of(factor).dim() == 0 or value_of(factor).shape[-1] == 1

    def _constant(self, node: Any) -> bool:
        return self.program.weight_of(node) is not None or bool(constant_roots(self.program, node))

    def _keeps_channels(self, node: Node) -> bool:
        """Whether a call casts, copies or moves rows whose channels stay as they are."""
        if node.target in CASTS | COPIES:
            return not truncates(node) and not (node.target is aten.dropout.default and node.args[2])
        if node.target in VIEWS:
            return keeps_rows(node)
        if node.target not in _TOKENS:
            return False
        last = value_of(_first(node)).dim() - 1
        axes = node.args[1:3] if node.target is aten.transpose.int else node.args[1:2]
        return all(isinstance(axis, int) and axis % (last + 1) != last for axis in axes)

    # -- weights ----------------------------------------------------------------------------------

    def _turn(self, call: Node, weight: Node | None, turn: Turn) -> None:
        if weight is None or self.program.weight_of(weight) is None:
            raise BlockedError(call, f"a weight of {call.name} is computed or already quantized")
        known = self.found.turns.setdefault(weight, {})
        known[call] = tuple(dict.fromkeys((*known.get(call, ()), turn)))

    def _is_one(self, scale: Node, root: Node, value: float) -> bool:
        filled = torch.full_like(self.program.weight(self.program.weight_of(root) or ""), value)
        others = {
            node: self.program.weight(name)
            for node, name in constant_roots(self.program, scale).items()
            if node is not root
        }
        result: Tensor = filled if scale is root else evaluate(scale, {root: filled, **others})
        return bool((result == 1).all())

    def _check_readers(self, root: Node, scale: Node) -> None:
        """Nothing but norms of the stream may read a norm's weight."""
        pending = [root]
        while pending:
            node = pending.pop()
            for user in readers(node):
                if self.scale.get(user) is node:
                    continue
                if node is scale or user.op == "output" or user.target is operator.getitem or user in self.scale:
                    raise BlockedError(user, f"{user.name} reads the weight of a norm, {root.name}, too")
                pending.append(user)


def _first(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def scale_value(program: Program, scale: Node) -> Tensor:
    """The weight of a norm, [D] float64."""
    value = constant(program, scale)
    assert value is not None, f"{scale.name} is not a constant"
    return value.detach().double()
