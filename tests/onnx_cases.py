"""One or more small programs for every operator that the ONNX exporter lowers.

A case is a function and its example inputs; axis 0 of every input is the dynamic "batch" axis (3 rows).
Keys are operator names as torch prints them. Integers include negative ones, where signs matter.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import optc.compiler.ops  # noqa: F401  (registers the dialect)

Case = tuple[Callable[..., Any], *tuple[Tensor, ...]]
Cases = dict[str, list[Case]]

_generator = torch.Generator().manual_seed(0)
_aten, _optc = torch.ops.aten, torch.ops.optc
_I32, _I64, _F32 = torch.int32, torch.int64, torch.float32


def f(*shape: int, low: float = -3.0, high: float = 3.0) -> Tensor:
    return torch.rand(shape or (3, 4), generator=_generator) * (high - low) + low


def i(*shape: int, low: int = -7, high: int = 8, dtype: torch.dtype = _I64) -> Tensor:
    return torch.randint(low, high, shape or (3, 4), generator=_generator).to(dtype)


def b(*shape: int) -> Tensor:
    return torch.rand(shape or (3, 4), generator=_generator) < 0.5


def distinct(*shape: int) -> Tensor:
    """Floats without ties, so that orders are unique."""
    return torch.randperm(int(torch.Size(shape).numel()), generator=_generator).reshape(shape).float() - 5


P = f(3, 4, low=0.1, high=4.0)  # positive
NZ = i(3, 4, low=1, high=6) * torch.tensor([1, -1, 1, -1])  # integers of both signs without zero
BIG = torch.tensor([[2**24 + 1, -(2**31) - 3], [7, -7], [2**40 + 5, -1]])

_FLOAT_UNARY = ("sin", "cos", "tan", "tanh", "erf", "sigmoid", "exp", "silu", "gelu", "mish", "hardswish",
                "selu", "elu", "leaky_relu", "softplus")  # fmt: skip
_POSITIVE_UNARY = ("log", "log2", "log10", "sqrt", "rsqrt", "reciprocal")
_ROUNDING = ("floor", "ceil", "round")
_SIGNED = ("neg", "abs", "sign", "relu")


def _function(name: str) -> Callable[..., Any]:
    return getattr(_aten, name).default  # type: ignore[no-any-return]


UNARY: Cases = {
    **{f"aten.{name}.default": [(_function(name), f())] for name in _FLOAT_UNARY},
    **{f"aten.{name}.default": [(_function(name), P)] for name in _POSITIVE_UNARY},
    **{f"aten.{name}.default": [(_function(name), f()), (_function(name), i())] for name in _ROUNDING},
    **{f"aten.{name}.default": [(_function(name), f()), (_function(name), i())] for name in _SIGNED},
    "aten.square.default": [(torch.square, f()), (torch.square, i())],
    "aten.hardsigmoid.default": [(torch.nn.functional.hardsigmoid, f(low=-5.0, high=5.0))],
    "aten.hardtanh.default": [
        (torch.nn.functional.hardtanh, f()), (lambda x: _aten.hardtanh(x, max_val=2.5), f()),
    ],
    "aten.relu6.default": [(torch.nn.functional.relu6, f(low=-3.0, high=9.0))],
    "aten.hardtanh_.default": [(lambda x: _aten.hardtanh_(x + 1, 0, 2), f())],
    "aten.isnan.default": [(lambda x: torch.isnan(x.sqrt()), f()), (torch.isnan, i())],
    "aten.relu_.default": [(lambda x: (x + 1).relu_(), f())],
    "aten.silu_.default": [(lambda x: _aten.silu_(x + 1), f())],
    "aten.logical_not.default": [(torch.logical_not, b()), (torch.logical_not, i(low=-1, high=2))],
    "aten.bitwise_not.default": [(torch.bitwise_not, b()), (torch.bitwise_not, i())],
}  # fmt: skip
UNARY["aten.exp.default"] += [(torch.exp, i())]  # integers become float32
UNARY["aten.round.default"] += [(torch.round, torch.tensor([[0.5, 1.5], [2.5, -0.5], [-1.5, 7.3]]))]  # half to even
UNARY["aten.gelu.default"] += [(lambda x: torch.nn.functional.gelu(x, approximate="tanh"), f())]
UNARY["aten.elu.default"] += [(lambda x: torch.nn.functional.elu(x, 0.3), f()), (lambda x: _aten.elu(x, 2.0, 1.5, 0.5), f())]
UNARY["aten.leaky_relu.default"] += [(lambda x: torch.nn.functional.leaky_relu(x, 0.3), f())]
UNARY["aten.softplus.default"] += [(lambda x: torch.nn.functional.softplus(x, 2.0, 1.0), f()),
                                   (lambda x: torch.nn.functional.softplus(x), f(low=15.0, high=30.0))]  # fmt: skip
UNARY["aten.mish.default"] += [(torch.nn.functional.mish, f(low=-30.0, high=30.0))]



def _in_place_on_results(x: Tensor) -> Tensor:
    values, _ = x.topk(2)
    values /= values.sum(-1, keepdim=True)
    return values


def _written_twice(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    total = x * 2
    before = total * 3
    total += y
    total += 1
    return total, before


ARITHMETIC: Cases = {
    "aten.add.Tensor": [
        (torch.add, f(), f(3, 1)), (torch.add, i(), f()), (torch.add, b(), b()), (torch.add, b(), i()),
        (lambda x, y: torch.add(x, y, alpha=3), i(), i()),
        (lambda x, y: torch.add(x, y, alpha=0.5), f(), f()), (lambda x: x + 1, i(dtype=_I32)),
        (lambda x: x + 0.5, i()), (lambda x: x + x.shape[0], f()),
    ],
    "aten.add.Scalar": [
        (lambda x: _aten.add.Scalar(x, 2), i()), (lambda x: _aten.add.Scalar(x, 2, 3), i(dtype=_I32)),
    ],
    "aten.add_.Tensor": [(lambda x, y: (x * 2).add_(y), f(), f()), (_written_twice, f(), f())],
    "aten.sub.Tensor": [(torch.sub, f(), i()), (lambda x, y: torch.sub(x, y, alpha=2), i(), i())],
    "aten.sub.Scalar": [(lambda x: _aten.sub.Scalar(x, 2, 3), i())],
    "aten.sub_.Tensor": [(lambda x, y: (x * 2).sub_(y), f(), f())],
    "aten.mul.Tensor": [
        (torch.mul, f(), f()), (torch.mul, b(), b()), (torch.mul, b(), f()), (torch.mul, i(), i()),
    ],
    "aten.mul.Scalar": [(lambda x: _aten.mul.Scalar(x, 2.5), i())],
    "aten.mul_.Tensor": [(lambda x, y: (x + 2).mul_(y), f(), f())],
    "aten.maximum.default": [(torch.maximum, f(), i()), (torch.maximum, i(), i()), (torch.maximum, b(), b())],
    "aten.minimum.default": [(torch.minimum, f(), f()), (torch.minimum, b(), b())],
    "aten.div.Tensor": [(torch.div, f(), P), (torch.div, i(), NZ), (lambda x: x / 4, i())],
    "aten.div.Scalar": [(lambda x: _aten.div.Scalar(x, 4), i())],
    "aten.div_.Tensor": [(_in_place_on_results, P), (lambda x, y: (x + 2).div_(y), f(), P)],
    "aten.div.Tensor_mode": [
        (lambda x, y, m=m: torch.div(x, y, rounding_mode=m), x, y)
        for m in ("floor", "trunc") for x, y in ((i(), NZ), (f(), NZ), (f(), f(low=0.3)), (i(dtype=_I32), NZ.int()))
    ] + [(lambda x: torch.div(x, -3, rounding_mode="floor"), BIG), (lambda x: torch.div(x, 3, rounding_mode="trunc"), BIG),
         (lambda x: torch.div(x, 0.1, rounding_mode="floor"), torch.tensor([[1.0], [0.3], [-0.7]]))],
    "aten.floor_divide.default": [
        (lambda x: x // 3, BIG), (lambda x, y: x // y, i(), NZ), (lambda x: x // 0.7, f()),
        (lambda x: x // x.shape[0], i()),
    ],
    "aten.rsub.Scalar": [
        (lambda x: 1 - x, f()), (lambda x: 1.5 - x, i()), (lambda x: torch.rsub(x, 5, alpha=2), i()),
    ],
    "aten.div.Scalar_mode": [(lambda x: _aten.div.Scalar_mode(x, -2, rounding_mode="floor"), i())],
    "aten.fmod.Tensor": [(torch.fmod, i(), NZ), (torch.fmod, f(), f(low=0.5))],
    "aten.fmod.Scalar": [(lambda x: torch.fmod(x, 3), i()), (lambda x: torch.fmod(x, -0.7), f())],
    "aten.remainder.Tensor": [(torch.remainder, i(), NZ), (torch.remainder, f(), NZ.float())],
    "aten.remainder.Scalar": [
        (lambda x: x % 3, i()), (lambda x: x % -3, i()), (lambda x: x % -0.7, f()),
        (lambda x: x % 0.1, f(low=-900.0, high=900.0)),
    ],
    "aten.pow.Tensor_Scalar": [
        (lambda x: x**2, f()), (lambda x: x**2, i()), (lambda x: x**3, i()), (lambda x: x**0.5, P),
        (lambda x: x**2.0, i()), (lambda x: x**-1, f(low=0.5)),
    ],
    "aten.pow.Tensor_Tensor": [
        (torch.pow, P, f()), (torch.pow, i(low=-3, high=4), i(low=0, high=5)),
        (torch.pow, P, i(low=-2, high=3)),
    ],
    "aten.pow.Scalar": [(lambda x: 2**x, i(low=0, high=9)), (lambda x: 0.5**x, f()), (lambda x: 0.5**x, i())],
    "aten.clamp.default": [
        (lambda x: x.clamp(-1, 1), f()), (lambda x: x.clamp(-2, 3), i()), (lambda x: x.clamp(max=2), i()),
        (lambda x: x.clamp(min=0.5), i()), (lambda x: x.clamp(min=0), i(dtype=_I32)),
    ],
    "aten.clamp.Tensor": [
        (lambda x, y: x.clamp(y, y + 2), f(), f()), (lambda x, y: x.clamp(max=y), i(), i()),
    ],
    "aten.clamp_min.default": [(lambda x: torch.clamp_min(x, 1), i())],
    "aten.clamp_max.default": [(lambda x: torch.clamp_max(x, 1), f())],
}  # fmt: skip

_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
LOGIC: Cases = {
    **{f"aten.{n}.Tensor": [(getattr(torch, n), i(), i()), (getattr(torch, n), i(), f()), (getattr(torch, n), b(), b())]
       for n in _COMPARISONS},
    **{f"aten.{n}.Scalar": [(lambda x, n=n: getattr(torch, n)(x, 1), i()), (lambda x, n=n: getattr(torch, n)(x, 0.5), i()),
                            (lambda x, n=n: getattr(torch, n)(x, 1), b())] for n in _COMPARISONS},
    **{f"aten.{n}.default": [(_function(n), b(), b()), (_function(n), i(low=-1, high=2), f())]
       for n in ("logical_and", "logical_or", "logical_xor")},
    **{f"aten.{n}.Tensor": [(getattr(_aten, n).Tensor, b(), b()), (getattr(_aten, n).Tensor, i(), i(dtype=_I32))]
       for n in ("bitwise_and", "bitwise_or", "bitwise_xor", "__and__", "__or__", "__xor__")},
    **{f"aten.{n}.Scalar": [(lambda x, n=n: getattr(_aten, n).Scalar(x, 5), i())] for n in ("__and__", "__or__", "__xor__")},
    "aten.where.self": [
        (torch.where, b(), f(), f()), (torch.where, b(), i(), f()), (torch.where, b(), b(), b()),
        (torch.where, i(low=0, high=2).bool(), i(dtype=_I32), i(dtype=_I32)),
    ],
    "aten.where.ScalarOther": [
        (lambda c, x: torch.where(c, x, 0), b(), f()), (lambda c, x: torch.where(c, x, 1.5), b(), i()),
    ],
    "aten.where.ScalarSelf": [(lambda c, x: torch.where(c, -1, x), b(), i())],
    "aten.where.Scalar": [(lambda c: torch.where(c, 1.0, 0.0), b()), (lambda c: torch.where(c, 1, 2), b())],
    "aten.masked_fill.Scalar": [
        (lambda x, m: x.masked_fill(m, float("-inf")), f(), b()),
        (lambda x, m: x.masked_fill(m, 9), i(), b()),
        (lambda x, m: x.masked_fill(m, 0.0), f(3, 2, 4), b(3, 1, 4)),
    ],
    "aten.masked_fill.Tensor": [(lambda x, m: x.masked_fill(m, torch.tensor(2)), f(), b())],
    "aten.masked_fill_.Scalar": [(lambda x, m: (x + 1).masked_fill_(m, 4), f(), b())],
    "aten.to.dtype": [
        (lambda x: x.to(_I64), f()), (lambda x: x.float() / 2, i()), (lambda x: x.bool(), f()),
        (lambda x: x.to(_F32) + 1, f()), (lambda x: x.to(torch.uint8), i(low=0, high=200)),
    ],
    "aten.to.dtype_layout": [(lambda x: _aten.to.dtype_layout(x, dtype=_I32), f())],
    "aten.to.device": [(lambda x: _aten.to.device(x, torch.device("cpu"), _I64), f())],
    "aten.to.other": [(_aten.to.other, f(), i())],
    "aten._to_copy.default": [(lambda x: _aten._to_copy(x, dtype=_I32), f())],
    "aten.type_as.default": [(lambda x, y: x.type_as(y), i(), f())],
    "aten.contiguous.default": [(lambda x: x.transpose(0, 1).contiguous() * 2, f())],
    "aten.clone.default": [(lambda x: x.clone(), f())],
    "aten.alias.default": [(lambda x: _aten.alias(x) + 1, f())],
    "aten.detach.default": [(lambda x: x.detach() + 1, f())],
    "aten.detach_.default": [(lambda x: (x + 1).detach_(), f())],
    "aten.lift_fresh_copy.default": [(lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]), f())],
    "aten.dropout.default": [(lambda x: torch.nn.functional.dropout(x, 0.5, False), f())],
    "aten._assert_tensor_metadata.default": [(lambda x: x.to(_I64), f())],
}  # fmt: skip


def _cat_sizes(x: Tensor, make: Callable[[Any], Any]) -> Tensor:
    """x with a row of a number that is computed from the batch size."""
    return x.new_full((1, x.shape[1]), 0.0) + make(x.shape[0])


SIZES: Cases = {
    "operator.add": [(lambda x: torch.arange(x.shape[0] + 2), f())],
    "operator.sub": [
        (lambda x: torch.arange(x.shape[0] * 2 - 1), f()), (lambda x: _grown(x)[: x.shape[0] + 5 - 2], f()),
    ],
    "operator.neg": [(lambda x: _grown(x)[: -x.shape[0]], f())],
    "operator.mul": [(lambda x: torch.arange(x.shape[0] * 3), f())],
    "operator.floordiv": [
        (lambda x: torch.arange(2 + x.shape[0] // 2), f()),
        (lambda x: _cat_sizes(x, lambda n: (n - 8) // 3), f()),
    ],
    "operator.mod": [
        (lambda x: _cat_sizes(x, lambda n: n % 2), f()),
        (lambda x: _cat_sizes(x, lambda n: (n - 8) % 3), f()),
    ],
    "torch.sym_max": [(lambda x: torch.arange(torch.sym_max(x.shape[0], 2)), f())],
    "torch.sym_min": [(lambda x: torch.arange(torch.sym_min(x.shape[0], 2)), f())],
    "aten.sym_size.int": [(lambda x: x.sum(0) / x.shape[0], f())],
    "aten.scalar_tensor.default": [
        (lambda x: x * torch.scalar_tensor(2.5), f()), (lambda x: _aten.scalar_tensor(x.shape[0]) * x, f()),
        (lambda x: torch.scalar_tensor(x.shape[0], dtype=_I64), f()),
    ],
}  # fmt: skip



def _grown(x: Tensor) -> Tensor:
    """x with five more rows, so that a dynamic slice has no size that torch.export would specialize on."""
    return torch.cat([x, x.new_ones((5, x.shape[1]))])


def _cubed(x: Tensor) -> Tensor:
    """[n, n + 5, n + 5]: three dynamic axes."""
    grown = _grown(x)[:, 0]
    return x[:, :1, None] * grown[:, None] + grown


VIEWS: Cases = {
    "aten.view_as.default": [(lambda x, y: x.view_as(y), f(), f(3, 2, 2))],
    "aten.expand_as.default": [(lambda x, y: x.expand_as(y), f(3, 1), f())],
    "aten.pad.default": [
        (lambda x: torch.nn.functional.pad(x, (1, 2)), f()),
        (lambda x: torch.nn.functional.pad(x, (0, 0, 2, -1), value=1.5), f(3, 4, 2)),
        (lambda x: torch.nn.functional.pad(x, (-1, x.shape[0])), i()),
    ],
    "aten.view.default": [
        (lambda x: x.view(x.shape[0], 2, 6), f(3, 12)), (lambda x: x.view(-1, 4), f(3, 2, 4)),
        (lambda x: x.view(-1), f()), (lambda x: x.view(1, x.shape[0], 1, -1), f()),
    ],
    "aten.reshape.default": [
        (lambda x: x.transpose(1, 2).reshape(x.shape[0], 12), f(3, 4, 3)),
        (lambda x: x[:0].reshape(0, 2, 2), f()),
    ],
    "aten._unsafe_view.default": [(lambda x: _aten._unsafe_view(x, [x.shape[0], 2, 2]), f())],
    "aten.flatten.using_ints": [
        (lambda x: x.flatten(1), f(3, 2, 4)), (torch.flatten, f(3, 2, 4)),
        (lambda x: x.flatten(-2), f(3, 2, 4)), (lambda x: _cubed(x).flatten(1), f()),
        (lambda x: _cubed(x).flatten(), f()),
    ],
    "aten.unflatten.int": [
        (lambda x: x.unflatten(-1, (2, -1)), f(3, 6)), (lambda x: x.unflatten(0, (-1, 1)), f()),
        (lambda x: _cubed(x).unflatten(1, (1, -1)), f()), (lambda x: x.unflatten(1, (1, 4)), f()),
    ],
    "aten.transpose.int": [(lambda x: x.transpose(0, -1), f(3, 2, 4))],
    "aten.permute.default": [(lambda x: x.permute(2, 0, -2), f(3, 2, 4))],
    "aten.t.default": [(torch.t, f())],
    "aten.unsqueeze.default": [(lambda x: x.unsqueeze(-1), f()), (lambda x: x[None], f())],
    "aten.squeeze.default": [(lambda x: x.sum(0)[None, :, None].squeeze(), f())],
    "aten.squeeze.dim": [(lambda x: x.squeeze(-2), f(3, 1, 4)), (lambda x: x.squeeze(-1), f(3, 1, 4))],
    "aten.squeeze.dims": [(lambda x: x.squeeze((1, -1)), f(3, 1, 4, 1))],
    "aten.expand.default": [
        (lambda x: x.expand(-1, 5), f(3, 1)), (lambda x: x[:1].expand(x.shape[0], 4), f()),
        (lambda x: x.expand(2, -1, 4), f(3, 1)), (lambda x: x[:1].expand(x.shape[0] + 1, -1), b()),
    ],
    "aten.repeat.default": [(lambda x: x.repeat(2, 1, 3), f()), (lambda x: x[:1].repeat(x.shape[0], 1), i())],
    "aten.slice.Tensor": [
        (lambda x: x[:, -2:], f()), (lambda x: x[:, :-1], f()), (lambda x: x[:, 1:100], f()),
        (lambda x: x[..., 3:1], b()), (lambda x: x[:, ::2], i()), (lambda x: _grown(x)[x.shape[0] :], f()),
        (lambda x: _grown(x)[2:-1], f()), (lambda x: _grown(x)[: x.shape[0] + 2], f()),
        (lambda x: _grown(x)[-2:], f()),
    ],
    "aten.select.int": [
        (lambda x: x[:, -1], f()), (lambda x: x[0], f()), (lambda x: x[-1], i()),
        (lambda x: x[x.shape[0] - 1], f()),
    ],
    "aten.split.Tensor": [(lambda x: x.split(2, -1), f(3, 5)), (lambda x: x.split(4, 1), f())],
    "aten.split_with_sizes.default": [
        (lambda x: x.split([1, 0, 3], 1), f()), (lambda x: _grown(x).split([x.shape[0], 5]), f()),
        (lambda x: _grown(x).split([2, x.shape[0] + 3]), f()), (lambda x: x.split([4], 1), f()),
    ],
    "aten.chunk.default": [(lambda x: x.chunk(2, 1), f(3, 5)), (lambda x: x.chunk(3, 1), f())],
    "aten.unbind.int": [(lambda x: x.unbind(1), f(3, 3)), (lambda x: x.unbind(-1)[0], b())],
    "aten.cat.default": [
        (lambda x, y: torch.cat([x, y], -1), f(), i()), (lambda x: torch.cat([x, x[:1]]), b()),
        (lambda x: torch.cat([torch.tensor([]), x[:, 0]]), f()),
    ],
    "aten.stack.default": [
        (lambda x, y: torch.stack([x, y], -1), f(), f()), (lambda x, y: torch.stack([x, y]), i(), f()),
    ],
    "aten.triu.default": [(torch.triu, f()), (lambda x: x.triu(-1), b()), (lambda x: x.triu(1), i())],
    "aten.tril.default": [(torch.tril, b()), (lambda x: x.tril(1), f()), (lambda x: x.tril(), i(dtype=_I32))],
}  # fmt: skip

CONSTRUCTORS: Cases = {
    "aten.arange.default": [
        (lambda x: torch.arange(x.shape[0]), f()), (lambda x: torch.arange(5, dtype=_F32) + x[0, 0], f()),
        (lambda x: torch.arange(x.shape[0], dtype=_I32), f()), (lambda x: torch.arange(4.5) + x[0, 0], f()),
    ],
    "aten.arange.start": [
        (lambda x: torch.arange(1, x.shape[0] + 1), f()), (lambda x: torch.arange(0.5, 4) * x[0, 0], f()),
    ],
    "aten.arange.start_step": [
        (lambda x: torch.arange(0, 8, 2) + x.shape[0], f()),
        (lambda x: torch.arange(0, 1, 0.25) + x[0, 0], f()),
        (lambda x: torch.arange(x.shape[0], -2, -1), f()),
        (lambda x: torch.arange(0, 8, 2, dtype=_F32) / 8 * x[0, 0], f()),
    ],
    "aten.full.default": [
        (lambda x: torch.full((x.shape[0], 2), 1.5), f()),
        (lambda x: torch.full((2, 2), float("-inf")) + x[0, 0], f()),
        (lambda x: torch.full((x.shape[0],), True), f()), (lambda x: torch.full((2,), x.shape[0]), f()),
        (lambda x: torch.full((), x.shape[0], dtype=_F32), f()),
    ],
    "aten.zeros.default": [(lambda x: torch.zeros(x.shape[0], 2, dtype=_I64), f())],
    "aten.ones.default": [(lambda x: torch.ones(2, x.shape[0]), f())],
    "aten.empty.memory_format": [(lambda x: torch.where(x < 9, x, torch.empty(x.shape[0], 4)), f())],
    "aten.zeros_like.default": [
        (torch.zeros_like, f()), (lambda x: torch.zeros_like(x, dtype=torch.bool), f()),
    ],
    "aten.ones_like.default": [(torch.ones_like, i())],
    "aten.full_like.default": [
        (lambda x: torch.full_like(x, 2), f()), (lambda x: torch.full_like(x, 2.5, dtype=_F32), i()),
    ],
    "aten.new_zeros.default": [(lambda x: x.new_zeros(x.shape[0], 3), i())],
    "aten.new_ones.default": [(lambda x: x.new_ones((3, x.shape[0]), dtype=_F32), i())],
    "aten.new_full.default": [(lambda x: x.new_full((x.shape[0],), 7), f())],
}  # fmt: skip

REDUCTIONS: Cases = {
    "aten.sum.default": [
        (torch.sum, f()), (torch.sum, b()), (torch.sum, i(dtype=_I32)), (lambda x: x.sum(dtype=_F32), i()),
    ],
    "aten.sum.dim_IntList": [
        (lambda x: x.sum(-1), f()), (lambda x: x.sum(1), b()),
        (lambda x: x.sum((0, 2), keepdim=True), i(3, 2, 4)), (lambda x: x.sum(1, dtype=_F32), i()),
    ],
    "aten.mean.default": [(torch.mean, f()), (lambda x: x.mean(dtype=_F32), i())],
    "aten.mean.dim": [
        (lambda x: x.mean(-1, keepdim=True), f()), (lambda x: x.mean((1, 2)), f(3, 2, 4)),
        (lambda x: x.mean(0), f()),
    ],
    "aten.amax.default": [(lambda x: x.amax(1), f()), (lambda x: x.amax((0, 1)), i()), (torch.amax, f())],
    "aten.amin.default": [(lambda x: x.amin(-1, keepdim=True), f())],
    "aten.max.default": [(torch.max, f()), (torch.max, i())],
    "aten.min.default": [(torch.min, i())],
    "aten.prod.default": [(torch.prod, f()), (torch.prod, i(low=1, high=3)), (torch.prod, b())],
    "aten.max.dim": [
        (lambda x: x.max(1), f()), (lambda x: x.max(-1, keepdim=True), distinct(3, 4).long()),
        (lambda x: x.max(0)[0], f()),
    ],
    "aten.min.dim": [(lambda x: x.min(1), f())],
    "aten.any.default": [(torch.any, b()), (torch.any, f())],
    "aten.any.dim": [(lambda x: x.any(1), b()), (lambda x: x.any(-1, keepdim=True), i(low=0, high=2))],
    "aten.all.default": [(torch.all, b())],
    "aten.all.dim": [(lambda x: x.all(1), b())],
    "aten.argmax.default": [
        (torch.argmax, f()), (lambda x: x.argmax(-1), f()),
        (lambda x: x.argmax(1, keepdim=True), distinct(3, 4).long()),
    ],
    "aten.argmin.default": [(lambda x: x.argmin(1), f()), (torch.argmin, f())],
    "aten.softmax.int": [
        (lambda x: x.softmax(-1), f()), (lambda x: x.softmax(1), f(3, 2, 4)),
        (lambda x: torch.softmax(x, -1, dtype=_F32), i()),
    ],
    "aten._softmax.default": [(lambda x: _aten._softmax(x, 0, False), f())],
    "aten.log_softmax.int": [(lambda x: x.log_softmax(-1), f())],
    "aten._log_softmax.default": [(lambda x: _aten._log_softmax(x, 1, False), f())],
    "aten.cumsum.default": [
        (lambda x: x.cumsum(1), i()), (lambda x: x.cumsum(-1), b()), (lambda x: x.cumsum(0), f()),
        (lambda x: x.cumsum(1, dtype=_F32), i()), (lambda x: x.cumsum(1), i(dtype=_I32)),
    ],
    "aten.topk.default": [
        (lambda x: x.topk(2), distinct(3, 5)), (lambda x: x.topk(3, largest=False), distinct(3, 5)),
        (lambda x: x.topk(2, 1), distinct(3, 5, 2)), (lambda x: x.topk(2), distinct(3, 5).long()),
        (lambda x: torch.cat([x[:, 0], torch.arange(50.0, 55.0)]).topk(x.shape[0] + 1), distinct(3, 5)),
    ],
    "aten.sort.default": [
        (torch.sort, distinct(3, 5)), (lambda x: x.sort(1, descending=True), distinct(3, 5).long()),
        (lambda x: x.sort(0), distinct(3, 2)),
    ],
    "aten.gather.default": [
        (lambda x, n: x.gather(1, n), f(3, 5), i(3, 4, low=0, high=5)),
        (lambda x, n: x.gather(-1, n), i(), i(3, 2, low=0, high=4)),
    ],
    "aten.index_select.default": [
        (lambda x: x.index_select(1, torch.tensor([2, 0, 2])), f()),
        (lambda x, n: x.index_select(-1, n), f(), i(3, low=0, high=4, dtype=_I32)),
    ],
    "aten.one_hot.default": [(lambda x: torch.nn.functional.one_hot(x, 5), i(low=0, high=5))],
    "aten.index.Tensor": [
        (lambda x, n: x[n], f(), torch.tensor([0, -1, 0])), (lambda x, n: x[n], f(), i(3, 2, low=0, high=1)),
        (lambda x, n: x[torch.arange(x.shape[0]), n], f(), i(3, low=-4, high=4)),
        (lambda x, n: x[torch.arange(x.shape[0])[:, None], n], f(3, 4, 2), i(3, 2, low=0, high=4, dtype=_I32)),
        (lambda x, n: x[torch.arange(x.shape[0])[:, None], n, n[:, :1]], i(3, 4, 4), i(3, 2, low=0, high=4)),
    ],
}  # fmt: skip

_W, _IMAGE, _KERNEL = f(5, 4), f(3, 4, 9, 8), f(4, 4, 3, 3)
_nn = torch.nn.functional
LAYERS: Cases = {
    "aten.linear.default": [
        (lambda x: _nn.linear(x, _W), f()), (lambda x: _nn.linear(x, _W, _W[:, 0]), f(3, 2, 4)),
        (lambda x: _nn.linear(x, x * 2), f()),
    ],
    "aten.matmul.default": [
        (lambda x: x @ _W.t(), f()), (lambda x, y: x @ y.transpose(-1, -2), f(3, 2, 4), f(3, 5, 4)),
        (lambda x: x @ x[0], f()),
    ],
    "aten.mm.default": [(lambda x: torch.mm(x, x.t()), f())],
    "aten.bmm.default": [(lambda x, y: torch.bmm(x, y), f(3, 2, 4), f(3, 4, 5))],
    "aten.addmm.default": [(lambda x: torch.addmm(_W[:, 0], x, _W.t()), f())],
    "aten.einsum.default": [
        (lambda x, y: torch.einsum("b i j, b j k -> b k i", x, y), f(3, 2, 4), f(3, 4, 5)),
    ],
    "aten.embedding.default": [
        (lambda x: _nn.embedding(x, _W), i(low=0, high=5)),
        (lambda x: _nn.embedding(x, _W, padding_idx=0), i(low=0, high=5, dtype=_I32)),
    ],
    "aten.rms_norm.default": [
        (lambda x: _nn.rms_norm(x, [4], _W[0], 1e-6), f()), (lambda x: _nn.rms_norm(x, [4]), f(3, 2, 4)),
        (lambda x: _nn.rms_norm(x, [2, 4], eps=1e-3), f(3, 2, 4)),
    ],
    "aten.layer_norm.default": [
        (lambda x: _nn.layer_norm(x, [4], _W[0], _W[1]), f()),
        (lambda x: _nn.layer_norm(x, [2, 4], eps=1e-3), f(3, 2, 4)),
    ],
    "aten.group_norm.default": [
        (lambda x: _nn.group_norm(x, 2, _W[0], _W[1]), _IMAGE),
        (lambda x: _nn.group_norm(x, 4, eps=1e-3), _IMAGE),
    ],
    "aten.batch_norm.default": [
        (lambda x: _nn.batch_norm(x, _W[0], _W[1].abs(), _W[2], _W[3]), _IMAGE),
        (lambda x: _nn.batch_norm(x, _W[0], _W[1].abs(), eps=1e-3), f()),
    ],
    "aten.conv1d.default": [(lambda x: _nn.conv1d(x, _KERNEL[..., 0], _W[0], 2, 1, 2), f(3, 4, 11))],
    "aten.conv2d.default": [
        (lambda x: _nn.conv2d(x, _KERNEL[:, :, :3, :2], _W[0], (2, 1), (1, 0)), _IMAGE),
        (lambda x: _nn.conv2d(x, _KERNEL[:, :2], None, 1, 1, 1, 2), _IMAGE),
    ],
    "aten.conv1d.padding": [
        (lambda x: _nn.conv1d(x, _KERNEL[..., 0], padding="same", dilation=2), f(3, 4, 11)),
    ],
    "aten.conv2d.padding": [
        (lambda x: _nn.conv2d(x, _KERNEL[:, :, :2], padding="same"), _IMAGE),
        (lambda x: _nn.conv2d(x, _KERNEL, padding="valid", stride=2), _IMAGE),
    ],
    "aten.max_pool2d.default": [
        (lambda x: _nn.max_pool2d(x, 2), _IMAGE), (lambda x: _nn.max_pool2d(x, (3, 2), 2, 1), _IMAGE),
        (lambda x: _nn.max_pool2d(x, 2, 3, 1, ceil_mode=True), _IMAGE),
        (lambda x: _nn.max_pool2d(x, 2, 1, dilation=2), _IMAGE),
    ],
    "aten.avg_pool2d.default": [
        (lambda x: _nn.avg_pool2d(x, 2), _IMAGE), (lambda x: _nn.avg_pool2d(x, 3, 2, 1), _IMAGE),
        (lambda x: _nn.avg_pool2d(x, 3, 2, 1, count_include_pad=False), _IMAGE),
        (lambda x: _nn.avg_pool2d(x, (3, 1), (2, 1), ceil_mode=True), _IMAGE),
    ],
    "aten.adaptive_avg_pool2d.default": [(lambda x: _nn.adaptive_avg_pool2d(x, 1), _IMAGE)],
}  # fmt: skip

_INV = torch.tensor([1.0, 0.1])
_Q, _K, _V = f(3, 4, 5, 8), f(3, 2, 5, 8), f(3, 2, 5, 8)
_PLACES = torch.arange(5).repeat(3, 1) + torch.tensor([[0], [3], [9]])


def _attend(causal: bool, window: int, softcap: float = 0.0) -> Callable[..., Tensor]:
    knobs = {"scale": 0.3, "causal": causal, "window": window, "softcap": softcap}
    return lambda q, k, v, pad=None: _optc.attention(q, k, v, pad, None, **knobs)


def _attend_cache(total: int, window: int, softcap: float = 0.0) -> Callable[..., Any]:
    knobs = {"scale": 0.3, "window": window, "softcap": softcap}
    return lambda q, k, v, keys, values, past: _optc.cached_attention(q, k, v, keys, values, past, total, None, **knobs)


def _rotate(interleaved: bool) -> Callable[..., Tensor]:
    return lambda x, place: _optc.rotary(x, place, _INV, scaling=1.5, interleaved=interleaved)


DIALECT: Cases = {
    "optc.attention.default": [
        (_attend(True, 0), _Q, _K, _V), (_attend(False, 0), _Q, _K, _V), (_attend(True, 3, 2.0), _Q, _K, _V),
        (_attend(False, 2), _Q, _Q, _Q), (_attend(True, 0), _Q[:, :, :2], _K, _V),
        (_attend(True, 2), _Q, _K, _V, torch.tensor([[1, 1, 1, 1, 0], [1, 0, 0, 0, 0], [0, 1, 1, 0, 1]])),
        (_attend(False, 0), _Q, _K, _V, torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]).bool()),
    ],
    "optc.cached_attention.default": [
        (_attend_cache(5, 0), _Q, _K, _V, f(3, 2, 0, 8), f(3, 2, 0, 8), torch.zeros(3, dtype=_I64)),
        (_attend_cache(11, 3), _Q, _K, _V, f(3, 2, 6, 8), f(3, 2, 6, 8), torch.tensor([6, 2, 0])),
        (_attend_cache(9, 0, 2.0), _Q, _K, _V, f(3, 2, 14, 8), f(3, 2, 14, 8), torch.tensor([4, 0, 3])),
    ],
    "optc.rotary.default": [(_rotate(flag), x, _PLACES) for flag in (False, True) for x in (f(3, 2, 5, 4), f(3, 2, 5, 8))],
    "optc.skip_rms_norm.default": [
        (lambda x, y: _optc.skip_rms_norm(x, y, _INV.repeat(4), eps=1e-6), f(3, 2, 8), f(3, 2, 8)),
    ],
}  # fmt: skip

SEVERAL_AXES: list[Callable[[Tensor], Tensor]] = [  # of x [batch, seq, total], all dynamic
    lambda x: x.flatten(0, 1),
    lambda x: x.flatten(1),
    lambda x: x.view(x.shape[0] * x.shape[1], x.shape[2]),
    lambda x: x.view(x.shape[0], 1, x.shape[1], 1, -1),
    lambda x: x.view(x.shape[1], x.shape[2], x.shape[0]),
    lambda x: x.unflatten(1, (1, -1)).unflatten(-1, (-1, 1)),
    lambda x: x.transpose(0, 2).reshape(x.shape[2] * x.shape[1], x.shape[0]),
    lambda x: x.mean(-1) / x.shape[2] + x.shape[1],
]


def _in_place_on_view(x: Tensor) -> Tensor:
    total = x * 2
    total[:, 0].add_(1)
    return total


def _in_place_under_view(x: Tensor) -> Tensor:
    total = x * 2
    column = total[:, 0]
    total.mul_(3)
    return column


def _in_place_on_input(x: Tensor) -> Tensor:
    return x.relu_()


REFUSED: list[tuple[str, Case]] = [
    ("add_: aten.add_.Tensor: it writes to an input, a weight or a view", (lambda x: x.unbind(1)[0].add_(1), f())),
    ("add_: aten.add_.Tensor: it writes to an input, a weight or a view", (_in_place_on_view, f())),
    ("mul_: aten.mul_.Tensor: it writes to a tensor that has views, or is read later as it was", (_in_place_under_view, f())),
    ("relu_: aten.relu_.default: it writes to an input, a weight or a view", (_in_place_on_input, f())),
    ("addmm: aten.addmm.default: {'alpha': 2} is not lowered", (lambda x: torch.addmm(_W[:, 0], x, _W.t(), alpha=2), f())),
    ("arange: aten.arange.start: an integer range with fractional bounds is not lowered",
     (lambda x: x[0, 0] + torch.arange(0.5, 3, dtype=_I64), f())),
    ("split: aten.split.Tensor: the sizes of the parts depend on the input", (lambda x: _grown(x).split(x.shape[0] + 4), f())),
    ("avg_pool2d: aten.avg_pool2d.default: divisor_override is not lowered", (lambda x: _nn.avg_pool2d(x, 2, divisor_override=3), _IMAGE)),
    ("max_pool2d: aten.max_pool2d.default: an input without batch axis is not lowered", (lambda x: _nn.max_pool2d(x, 2), _IMAGE[0])),
    ("adaptive_avg_pool2d: aten.adaptive_avg_pool2d.default: only an output of 1x1 is lowered",
     (lambda x: _nn.adaptive_avg_pool2d(x, 2), _IMAGE)),
    ("batch_norm: aten.batch_norm.default: batch statistics (training mode) are not lowered",
     (lambda x: _nn.batch_norm(x, None, None, training=True), _IMAGE)),
    ("dropout: aten.dropout.default: dropout is active (training mode)", (lambda x: _nn.dropout(x, 0.5, True), f())),
    ("pad: aten.pad.default: mode 'reflect' is not lowered", (lambda x: _nn.pad(x, (1, 1), "reflect"), f())),
    ("index: aten.index.Tensor: an index behind a full slice is not lowered", (lambda x: x[:, [0, 2]], f())),
    ("attention: optc.attention.default: attention sinks are not lowered",
     (lambda q: _optc.attention(q, q, q, None, _W[0], scale=1.0, causal=True, window=0, softcap=0.0), _Q)),
    ("erfinv: aten.erfinv.default has no lowering", (torch.erfinv, f(low=-0.5, high=0.5))),
]  # fmt: skip

CASES: Cases = {
    **UNARY, **ARITHMETIC, **LOGIC, **SIZES, **VIEWS, **CONSTRUCTORS, **REDUCTIONS, **LAYERS, **DIALECT,
}  # fmt: skip


def name_of(target: Any) -> str:
    """The name of an FX target as it is written in `CASES`."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    module = "operator" if getattr(operator, target.__name__, None) is target else "torch"
    return f"{module}.{target.__name__}"
