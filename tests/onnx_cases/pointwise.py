"""Functions of one element: arithmetic, comparisons, activations, casts. Integers include negative ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as nn
from torch import Tensor

from onnx_cases.values import F32, I32, I64, Cases, b, f, i

_aten, _optc = torch.ops.aten, torch.ops.optc

P = f(3, 4, low=0.1, high=4.0)  # positive
NZ = i(3, 4, low=1, high=6) * torch.tensor([1, -1, 1, -1])  # integers of both signs without zero
BIG = torch.tensor([[2**24 + 1, -(2**31) - 3], [7, -7], [2**40 + 5, -1]])

_FLOAT_UNARY = ("sin", "cos", "tan", "tanh", "erf", "sigmoid", "exp")
_ACTIVATIONS = ("silu", "gelu", "mish", "hardswish", "selu", "elu", "leaky_relu", "softplus")
_POSITIVE_UNARY = ("log", "log2", "log10", "sqrt", "rsqrt", "reciprocal")
_ROUNDING = ("floor", "ceil", "round")
_SIGNED = ("neg", "abs", "sign", "relu")


def _function(name: str) -> Callable[..., Any]:
    return getattr(_aten, name).default  # type: ignore[no-any-return]


UNARY: Cases = {
    **{f"aten.{name}.default": [(_function(name), f())] for name in (*_FLOAT_UNARY, *_ACTIVATIONS)},
    **{f"aten.{name}.default": [(_function(name), P)] for name in _POSITIVE_UNARY},
    **{f"aten.{name}.default": [(_function(name), f()), (_function(name), i())] for name in _ROUNDING},
    **{f"aten.{name}.default": [(_function(name), f()), (_function(name), i())] for name in _SIGNED},
    "aten.square.default": [(torch.square, f()), (torch.square, i())],
    "aten.hardsigmoid.default": [(nn.hardsigmoid, f(low=-5.0, high=5.0))],
    "aten.hardtanh.default": [
        (nn.hardtanh, f()),
        (lambda x: _aten.hardtanh(x, max_val=2.5), f()),
    ],
    "aten.relu6.default": [(nn.relu6, f(low=-3.0, high=9.0))],
    "aten.hardtanh_.default": [(lambda x: _aten.hardtanh_(x + 1, 0, 2), f())],
    "aten.isnan.default": [(lambda x: torch.isnan(x.sqrt()), f()), (torch.isnan, i())],
    "aten.relu_.default": [(lambda x: (x + 1).relu_(), f())],
    "aten.silu_.default": [(lambda x: _aten.silu_(x + 1), f())],
    "aten.logical_not.default": [(torch.logical_not, b()), (torch.logical_not, i(low=-1, high=2))],
    "aten.bitwise_not.default": [(torch.bitwise_not, b()), (torch.bitwise_not, i())],
}
UNARY["aten.exp.default"] += [(torch.exp, i())]  # integers become float32
UNARY["aten.round.default"] += [(torch.round, torch.tensor([[0.5, 1.5], [2.5, -0.5], [-1.5, 7.3]]))]  # half to even
UNARY["aten.gelu.default"] += [(lambda x: nn.gelu(x, approximate="tanh"), f())]
UNARY["aten.elu.default"] += [(lambda x: nn.elu(x, 0.3), f()), (lambda x: _aten.elu(x, 2.0, 1.5, 0.5), f())]
UNARY["aten.leaky_relu.default"] += [(lambda x: nn.leaky_relu(x, 0.3), f())]
UNARY["aten.softplus.default"] += [
    (lambda x: nn.softplus(x, 2.0, 1.0), f()),
    (lambda x: nn.softplus(x), f(low=15.0, high=30.0)),
]
UNARY["aten.mish.default"] += [(nn.mish, f(low=-30.0, high=30.0))]


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
        (lambda x, y: torch.add(x, y, alpha=0.5), f(), f()), (lambda x: x + 1, i(dtype=I32)),
        (lambda x: x + 0.5, i()), (lambda x: x + x.shape[0], f()),
    ],
    "aten.add.Scalar": [
        (lambda x: _aten.add.Scalar(x, 2), i()), (lambda x: _aten.add.Scalar(x, 2, 3), i(dtype=I32)),
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
        for m in ("floor", "trunc")
        for x, y in ((i(), NZ), (f(), NZ), (f(), f(low=0.3)), (i(dtype=I32), NZ.int()), (BIG, BIG[:, 1:]))
    ] + [
        (lambda x: torch.div(x, 3, rounding_mode="trunc"), BIG),
        (lambda x: torch.div(x, 0.1, rounding_mode="floor"), torch.tensor([[1.0], [0.3], [-0.7]])),
    ],
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
        (lambda x: x.clamp(min=0.5), i()), (lambda x: x.clamp(min=0), i(dtype=I32)),
        (lambda x: x.clamp(max=x.shape[0]), i()), (lambda x: x.clamp(min=x.shape[0] - 2), f()),
        (lambda x: x.sum().clamp(max=x.shape[0]), i()),
    ],
    "aten.clamp.Tensor": [
        (lambda x, y: x.clamp(y, y + 2), f(), f()), (lambda x, y: x.clamp(max=y), i(), i()),
    ],
    "aten.clamp_min.default": [(lambda x: torch.clamp_min(x, 1), i())],
    "aten.clamp_max.default": [(lambda x: torch.clamp_max(x, 1), f())],
}  # fmt: skip

_DUNDERS = ("__and__", "__or__", "__xor__")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
LOGIC: Cases = {
    **{f"aten.{n}.Tensor": [(getattr(torch, n), x, y) for x, y in ((i(), i()), (i(), f()), (b(), b()))]
       for n in _COMPARISONS},
    **{f"aten.{n}.Scalar": [(lambda x, n=n, y=y: getattr(torch, n)(x, y), x)
                            for x, y in ((i(), 1), (i(), 0.5), (b(), 1))] for n in _COMPARISONS},
    **{f"aten.{n}.default": [(_function(n), b(), b()), (_function(n), i(low=-1, high=2), f())]
       for n in ("logical_and", "logical_or", "logical_xor")},
    **{f"aten.{n}.Tensor": [(getattr(_aten, n).Tensor, b(), b()), (getattr(_aten, n).Tensor, i(), i().int())]
       for n in ("bitwise_and", "bitwise_or", "bitwise_xor", *_DUNDERS)},
    **{f"aten.{n}.Scalar": [(lambda x, n=n: getattr(_aten, n).Scalar(x, 5), i())] for n in _DUNDERS},
    "aten.where.self": [
        (torch.where, b(), f(), f()), (torch.where, b(), i(), f()), (torch.where, b(), b(), b()),
        (torch.where, i(low=0, high=2).bool(), i(dtype=I32), i(dtype=I32)),
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
        (lambda x: x.to(I64), f()), (lambda x: x.float() / 2, i()), (lambda x: x.bool(), f()),
        (lambda x: x.to(F32) + 1, f()), (lambda x: x.to(torch.uint8), i(low=0, high=200)),
    ],
    "aten.to.dtype_layout": [(lambda x: _aten.to.dtype_layout(x, dtype=I32), f())],
    "aten.to.device": [(lambda x: _aten.to.device(x, torch.device("cpu"), I64), f())],
    "aten.to.other": [(_aten.to.other, f(), i())],
    "aten._to_copy.default": [(lambda x: _aten._to_copy(x, dtype=I32), f())],
    "aten.type_as.default": [(lambda x, y: x.type_as(y), i(), f())],
    "aten.contiguous.default": [(lambda x: x.transpose(0, 1).contiguous() * 2, f())],
    "aten.clone.default": [(lambda x: x.clone(), f())],
    "aten.alias.default": [(lambda x: _aten.alias(x) + 1, f())],
    "aten.detach.default": [(lambda x: x.detach() + 1, f())],
    "aten.detach_.default": [(lambda x: (x + 1).detach_(), f())],
    "aten.lift_fresh_copy.default": [(lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]), f())],
    "aten.dropout.default": [(lambda x: nn.dropout(x, 0.5, False), f())],
    "aten._assert_tensor_metadata.default": [(lambda x: x.to(I64), f())],
}  # fmt: skip
