"""Sizes, views and constructors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as nn
from torch import Tensor

from onnx_cases.values import F32, I32, I64, Cases, b, f, grown, i

_aten, _optc = torch.ops.aten, torch.ops.optc


def _cat_sizes(x: Tensor, make: Callable[[Any], Any]) -> Tensor:
    """x with a row of a number that is computed from the batch size."""
    return x.new_full((1, x.shape[1]), 0.0) + make(x.shape[0])


SIZES: Cases = {
    "operator.add": [(lambda x: torch.arange(x.shape[0] + 2), f())],
    "operator.sub": [
        (lambda x: torch.arange(x.shape[0] * 2 - 1), f()),
        (lambda x: grown(x)[: x.shape[0] + 5 - 2], f()),
    ],
    "operator.neg": [(lambda x: grown(x)[: -x.shape[0]], f())],
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
        (lambda x: x * torch.scalar_tensor(2.5), f()),
        (lambda x: _aten.scalar_tensor(x.shape[0]) * x, f()),
        (lambda x: torch.scalar_tensor(x.shape[0], dtype=I64), f()),
    ],
}


def _cubed(x: Tensor) -> Tensor:
    """[n, n + 5, n + 5]: three dynamic axes."""
    column = grown(x)[:, 0]
    return x[:, :1, None] * column[:, None] + column


VIEWS: Cases = {
    "aten.view_as.default": [(lambda x, y: x.view_as(y), f(), f(3, 2, 2))],
    "aten.expand_as.default": [(lambda x, y: x.expand_as(y), f(3, 1), f())],
    "aten.pad.default": [
        (lambda x: nn.pad(x, (1, 2)), f()),
        (lambda x: nn.pad(x, (0, 0, 2, -1), value=1.5), f(3, 4, 2)),
        (lambda x: nn.pad(x, (-1, x.shape[0])), i()),
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
        (lambda x: x[..., 3:1], b()), (lambda x: x[:, ::2], i()), (lambda x: grown(x)[x.shape[0] :], f()),
        (lambda x: grown(x)[2:-1], f()), (lambda x: grown(x)[: x.shape[0] + 2], f()),
        (lambda x: grown(x)[-2:], f()),
    ],
    "aten.select.int": [
        (lambda x: x[:, -1], f()), (lambda x: x[0], f()), (lambda x: x[-1], i()),
        (lambda x: x[x.shape[0] - 1], f()),
    ],
    "aten.split.Tensor": [(lambda x: x.split(2, -1), f(3, 5)), (lambda x: x.split(4, 1), f())],
    "aten.split_with_sizes.default": [
        (lambda x: x.split([1, 0, 3], 1), f()), (lambda x: grown(x).split([x.shape[0], 5]), f()),
        (lambda x: grown(x).split([2, x.shape[0] + 3]), f()), (lambda x: x.split([4], 1), f()),
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
    "aten.tril.default": [(torch.tril, b()), (lambda x: x.tril(1), f()), (lambda x: x.tril(), i(dtype=I32))],
}  # fmt: skip

CONSTRUCTORS: Cases = {
    "aten.arange.default": [
        (lambda x: torch.arange(x.shape[0]), f()),
        (lambda x: torch.arange(5, dtype=F32) + x[0, 0], f()),
        (lambda x: torch.arange(x.shape[0], dtype=I32), f()),
        (lambda x: torch.arange(4.5) + x[0, 0], f()),
    ],
    "aten.arange.start": [
        (lambda x: torch.arange(1, x.shape[0] + 1), f()),
        (lambda x: torch.arange(0.5, 4) * x[0, 0], f()),
    ],
    "aten.arange.start_step": [
        (lambda x: torch.arange(0, 8, 2) + x.shape[0], f()),
        (lambda x: torch.arange(0, 1, 0.25) + x[0, 0], f()),
        (lambda x: torch.arange(x.shape[0], -2, -1), f()),
        (lambda x: torch.arange(0, 8, 2, dtype=F32) / 8 * x[0, 0], f()),
    ],
    "aten.full.default": [
        (lambda x: torch.full((x.shape[0], 2), 1.5), f()),
        (lambda x: torch.full((2, 2), float("-inf")) + x[0, 0], f()),
        (lambda x: torch.full((x.shape[0],), True), f()),
        (lambda x: torch.full((2,), x.shape[0]), f()),
        (lambda x: torch.full((), x.shape[0], dtype=F32), f()),
    ],
    "aten.zeros.default": [(lambda x: torch.zeros(x.shape[0], 2, dtype=I64), f())],
    "aten.ones.default": [(lambda x: torch.ones(2, x.shape[0]), f())],
    "aten.empty.memory_format": [(lambda x: torch.where(x < 9, x, torch.empty(x.shape[0], 4)), f())],
    "aten.new_empty.default": [(lambda x: torch.where(x < 9, x, x.new_empty(x.shape[0], 4)), f())],
    "aten.empty_like.default": [(lambda x: torch.where(x < 9, x, torch.empty_like(x)), f())],
    "aten.zeros_like.default": [
        (torch.zeros_like, f()),
        (lambda x: torch.zeros_like(x, dtype=torch.bool), f()),
    ],
    "aten.ones_like.default": [(torch.ones_like, i())],
    "aten.full_like.default": [
        (lambda x: torch.full_like(x, 2), f()),
        (lambda x: torch.full_like(x, 2.5, dtype=F32), i()),
    ],
    "aten.new_zeros.default": [(lambda x: x.new_zeros(x.shape[0], 3), i())],
    "aten.new_ones.default": [(lambda x: x.new_ones((3, x.shape[0]), dtype=F32), i())],
    "aten.new_full.default": [(lambda x: x.new_full((x.shape[0],), 7), f())],
}
