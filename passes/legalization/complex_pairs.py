"""complex64[..., n]  ->  f32[..., n, 2], real parts beside imaginary ones

Engines of graphs know no complex numbers. Rotary embeddings that are spelled as products with exp(i * angle) (DeepSeek V2,
Llama 4) and Fourier transforms (FNet) become what they are of pairs: products, sums, sines and cosines.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.ir.asserts import is_assert
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import drop_dead
from optc.compiler.rewriting.inlining import InliningError, inline_call
from optc.compiler.rewriting.passes import Miss, Pass, PassContext, PassResult

_aten = torch.ops.aten
Paired = Callable[..., Any]
"""Takes what its operator takes, with pairs [..., 2] where that has complex tensors."""


@dataclass(frozen=True, kw_only=True)
class ComplexPairs(Pass):
    """complex64[..., n] -> f32[..., n, 2], all of a program or none

    Attributes:
        transforms: Fourier transforms become products with matrices of sines and cosines: n^2 products for n numbers, on
            engines that have no transform of an axis of any size.
    """

    name: ClassVar[str] = "complex-pairs"
    transforms: bool = True

    def run(self, program: Program, context: PassContext) -> PassResult:
        edited = program.clone()
        pairs: set[Node] = set()
        count: collections.Counter[str] = collections.Counter()
        for node in list(edited.graph.nodes):
            if is_assert(node.target):  # of types that are no more
                if holds_complex(node.args[0]) or node.args[0] in pairs:
                    edited.graph.erase_node(node)
                continue
            if node.op == "output" and pairs.intersection(node.all_input_nodes):
                return _left(program, Miss(node.name, "an output is complex"))
            if not (holds_complex(node) or pairs.intersection(node.all_input_nodes)):
                continue
            function = None if node.op != "call_function" else self._paired(node, pairs)
            if function is None:
                return _left(program, Miss(node.name, f"{node.target} of complex numbers has no form of pairs"))
            name, complex_result = str(node.target), holds_complex(node)
            try:
                made = inline_call(edited, node, function, composite=True)
            except InliningError as error:
                return _left(
                    program, Miss(node.name, f"{name} of complex numbers cannot be written with pairs: {error}")
                )
            assert made is not None, "one result"
            count[name] += 1
            if complex_result:
                pairs.add(made)
        if not count:
            return PassResult(program, 0, 0)
        drop_dead(edited)
        return PassResult(edited.changed(), count.total(), count.total())

    def _paired(self, node: Node, pairs: set[Node]) -> Paired | None:
        if node.target in _TRANSFORMS:
            return _transform(pairs, node) if self.transforms else None
        make = _TABLE.get(node.target)
        return None if make is None else make(pairs, node)


def holds_complex(node: object) -> bool:
    """Whether a node's value is complex."""
    val = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(val, Tensor) and val.is_complex()


def has_complex(program: Program) -> bool:
    """Whether any value of a program is complex."""
    return any(holds_complex(node) for node in program.graph.nodes)


def _left(program: Program, miss: Miss) -> PassResult:
    return PassResult(program, 0, 1, (miss,))


# -- one operator at a time ------------------------------------------------------------------------


def _multiply(pairs: set[Node], node: Node) -> Paired | None:
    flags = [item in pairs for item in node.args[:2]]

    def function(left: Any, right: Any) -> Tensor:
        if not all(flags):
            pair, other = (left, right) if flags[0] else (right, left)
            return pair * (other[..., None] if isinstance(other, Tensor) else other)
        (a, b), (c, d) = left.unbind(-1), right.unbind(-1)
        return torch.stack([a * c - b * d, a * d + b * c], -1)

    return None if any(isinstance(item, complex) for item in node.args) else function


def _add(sign: int) -> Callable[[set[Node], Node], Paired | None]:
    def make(pairs: set[Node], node: Node) -> Paired | None:
        flags = [item in pairs for item in node.args[:2]]
        if not all(flags) or node.kwargs.get("alpha", 1) != 1:
            return None
        return lambda left, right, **_: left + right if sign > 0 else left - right

    return make


def _polar(pairs: set[Node], node: Node) -> Paired:
    return lambda size, angle: torch.stack([size * torch.cos(angle), size * torch.sin(angle)], -1)


def _complex(pairs: set[Node], node: Node) -> Paired:
    return lambda real, imaginary: torch.stack(torch.broadcast_tensors(real, imaginary), -1)


def _part(index: int) -> Callable[[set[Node], Node], Paired]:
    return lambda pairs, node: lambda x: x.select(-1, index)


def _absolute(pairs: set[Node], node: Node) -> Paired:
    return lambda x: x.square().sum(-1).sqrt()


def _conjugate(pairs: set[Node], node: Node) -> Paired:
    return lambda x: torch.stack([x.select(-1, 0), -x.select(-1, 1)], -1)


def _same(pairs: set[Node], node: Node) -> Paired | None:
    """Casts between complex types, copies, and views of a complex tensor as pairs: another name for the same pairs, as
    what reads it may take it for real numbers, and what reads the other may not."""
    target = node.kwargs.get("dtype")
    casts = target is not None and not target.is_complex
    return None if casts else lambda x, *_, **__: _aten.alias.default(x)


def _negated(pairs: set[Node], node: Node) -> Paired:
    return lambda x: -x


def _along(*places: int) -> Callable[[set[Node], Node], Paired]:
    """A view whose arguments at these places are axes of what it takes (of its result: unsqueeze)."""

    def make(pairs: set[Node], node: Node) -> Paired:
        def shifted(axis: Any) -> Any:
            return [shifted(item) for item in axis] if isinstance(axis, list | tuple) else axis - (axis < 0)

        def function(*args: Any, **kwargs: Any) -> Any:
            return node.target(*(shifted(item) if i in places else item for i, item in enumerate(args)), **kwargs)

        return function

    return make


def _permute(pairs: set[Node], node: Node) -> Paired:
    rank = len(node.args[1])
    return lambda x, axes: x.permute(*(axis % rank for axis in axes), rank)


def _sized(pairs: set[Node], node: Node) -> Paired:
    return lambda x, sizes: node.target(x, [*sizes, 2])


_TABLE: dict[Any, Callable[[set[Node], Node], Paired | None]] = {
    _aten.polar.default: _polar,
    _aten.complex.default: _complex,
    _aten.view_as_complex.default: _same,
    _aten.view_as_real.default: _same,
    _aten.real.default: _part(0),
    _aten.imag.default: _part(1),
    _aten.abs.default: _absolute,
    _aten.neg.default: _negated,
    _aten.conj.default: _conjugate,
    _aten._conj.default: _conjugate,
    _aten.conj_physical.default: _conjugate,
    _aten.mul.Tensor: _multiply,
    _aten.add.Tensor: _add(1),
    _aten.sub.Tensor: _add(-1),
    **dict.fromkeys(
        (
            _aten.to.dtype,
            _aten.to.device,
            _aten.to.dtype_layout,
            _aten._to_copy.default,
            _aten.clone.default,
            _aten.contiguous.default,
            _aten.alias.default,
            _aten.detach.default,
            _aten.resolve_conj.default,
        ),
        _same,
    ),
    _aten.unsqueeze.default: _along(1),
    _aten.squeeze.dim: _along(1),
    _aten.slice.Tensor: _along(1),
    _aten.select.int: _along(1),
    _aten.transpose.int: _along(1, 2),
    _aten.flatten.using_ints: _along(1, 2),
    _aten.index_select.default: _along(1),
    _aten.permute.default: _permute,
    _aten.view.default: _sized,
    _aten.reshape.default: _sized,
    _aten.expand.default: lambda pairs, node: lambda x, sizes, **_: x.expand(*sizes, 2),
}


# -- transforms ------------------------------------------------------------------------------------

_TRANSFORMS = (_aten.fft_fft.default, _aten.fft_fftn.default, _aten.fft_fft2.default)


def _transform(pairs: set[Node], node: Node) -> Paired | None:
    """The discrete Fourier transform along axes of whole length, one after the other, without scaling."""
    is_pair = node.args[0] in pairs
    val = node.args[0].meta["val"]
    rank = val.dim() - is_pair
    given = dict(zip(("self", "s", "dim", "norm"), node.args, strict=False)) | node.kwargs
    size = given.get("s", given.get("n"))
    default: Any = {_aten.fft_fft.default: [-1], _aten.fft_fft2.default: [-2, -1]}.get(node.target, list(range(rank)))
    axes = given.get("dim", default)
    axes = list(range(rank)) if axes is None else [axes] if isinstance(axes, int) else list(axes)
    if (
        size is not None
        or given.get("norm") not in (None, "backward")
        or val.dtype not in (torch.float32, torch.float64)
    ):
        return None

    def function(x: Tensor, *_: Any, **__: Any) -> Tensor:
        real, imaginary = x.unbind(-1) if is_pair else (x, None)
        for axis in axes:
            real, imaginary = _along_axis(real, imaginary, axis % rank)
        assert imaginary is not None, "there is an axis"
        return torch.stack([real, imaginary], -1)

    return function


def _along_axis(real: Tensor, imaginary: Tensor | None, axis: int) -> tuple[Tensor, Tensor]:
    """exp(-2 pi i k n / N) = cos - i sin, as products with [N, N]; the angle is made of k * n mod N, which is exact."""
    count = real.shape[axis]
    step = torch.arange(count, device=real.device)
    turn = (step[:, None] * step).remainder(count).to(real.dtype) / count * (2 * math.pi)
    cosine, sine = torch.cos(turn), torch.sin(turn)

    def product(x: Tensor, matrix: Tensor) -> Tensor:
        return torch.matmul(x.transpose(axis, -1), matrix).transpose(axis, -1)

    if imaginary is None:
        return product(real, cosine), -product(real, sine)
    return (
        product(real, cosine) + product(imaginary, sine),
        product(imaginary, cosine) - product(real, sine),
    )
