"""Reductions, indexing, layers and the dialect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as nn
from torch import Tensor

from onnx_cases.values import F32, I32, I64, Cases, b, distinct, f, i

_aten, _optc = torch.ops.aten, torch.ops.optc

REDUCTIONS: Cases = {
    "aten.sum.default": [
        (torch.sum, f()), (torch.sum, b()), (torch.sum, i(dtype=I32)), (lambda x: x.sum(dtype=F32), i()),
    ],
    "aten.sum.dim_IntList": [
        (lambda x: x.sum(-1), f()), (lambda x: x.sum(1), b()),
        (lambda x: x.sum((0, 2), keepdim=True), i(3, 2, 4)), (lambda x: x.sum(1, dtype=F32), i()),
    ],
    "aten.mean.default": [(torch.mean, f()), (lambda x: x.mean(dtype=F32), i())],
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
        (lambda x: torch.softmax(x, -1, dtype=F32), i()),
    ],
    "aten._softmax.default": [(lambda x: _aten._softmax(x, 0, False), f())],
    "aten.log_softmax.int": [(lambda x: x.log_softmax(-1), f())],
    "aten._log_softmax.default": [(lambda x: _aten._log_softmax(x, 1, False), f())],
    "aten.cumsum.default": [
        (lambda x: x.cumsum(1), i()), (lambda x: x.cumsum(-1), b()), (lambda x: x.cumsum(0), f()),
        (lambda x: x.cumsum(1, dtype=F32), i()), (lambda x: x.cumsum(1), i(dtype=I32)),
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
        (lambda x, n: x.gather(1, n[..., None].expand(-1, -1, 4)), f(3, 5, 4), i(3, 2, low=0, high=5)),
        (lambda x, n: x.gather(1, n[:2, :, None].expand(-1, -1, 4)), f(3, 5, 4), i(3, 6, low=0, high=5)),
        (lambda x, n: x.gather(1, n[..., None].expand(-1, -1, 2)), f(3, 5, 4), i(3, 2, low=0, high=5)),
        (lambda x, n: x.gather(2, n[..., None].expand(-1, -1, 4)), f(3, 2, 5), i(3, 2, low=0, high=5)),
    ],
    "aten.index_select.default": [
        (lambda x: x.index_select(1, torch.tensor([2, 0, 2])), f()),
        (lambda x, n: x.index_select(-1, n), f(), i(3, low=0, high=4, dtype=I32)),
    ],
    "aten.one_hot.default": [(lambda x: nn.one_hot(x, 5), i(low=0, high=5))],
    "aten.index.Tensor": [
        (lambda x, n: x[n], f(), torch.tensor([0, -1, 0])), (lambda x, n: x[n], f(), i(3, 2, low=0, high=1)),
        (lambda x, n: x[torch.arange(x.shape[0]), n], f(), i(3, low=-4, high=4)),
        (lambda x, n: x[torch.arange(x.shape[0])[:, None], n], f(3, 4, 2), i(3, 2, low=0, high=4, dtype=I32)),
        (lambda x, n: x[torch.arange(x.shape[0])[:, None], n, n[:, :1]], i(3, 4, 4), i(3, 2, low=0, high=4)),
        (lambda x: x[:, [2, 0]], f()), (lambda x: x[:, [[2], [0]], [1, 3, 0]], f(3, 4, 4, 2)),
    ],
}  # fmt: skip

_W, _IMAGE, _KERNEL = f(5, 4), f(3, 4, 9, 8), f(4, 4, 3, 3)
LAYERS: Cases = {
    "aten.linear.default": [
        (lambda x: nn.linear(x, _W), f()),
        (lambda x: nn.linear(x, _W, _W[:, 0]), f(3, 2, 4)),
        (lambda x: nn.linear(x, x * 2), f()),
    ],
    "aten.matmul.default": [
        (lambda x: x @ _W.t(), f()),
        (lambda x, y: x @ y.transpose(-1, -2), f(3, 2, 4), f(3, 5, 4)),
        (lambda x: x @ x[0], f()),
    ],
    "aten.mm.default": [(lambda x: torch.mm(x, x.t()), f())],
    "aten.bmm.default": [(lambda x, y: torch.bmm(x, y), f(3, 2, 4), f(3, 4, 5))],
    "aten.addmm.default": [(lambda x: torch.addmm(_W[:, 0], x, _W.t()), f())],
    "aten.einsum.default": [
        (lambda x, y: torch.einsum("b i j, b j k -> b k i", x, y), f(3, 2, 4), f(3, 4, 5)),
    ],
    "aten.embedding.default": [
        (lambda x: nn.embedding(x, _W), i(low=0, high=5)),
        (lambda x: nn.embedding(x, _W, padding_idx=0), i(low=0, high=5, dtype=I32)),
    ],
    "aten.rms_norm.default": [
        (lambda x: nn.rms_norm(x, [4], _W[0], 1e-6), f()),
        (lambda x: nn.rms_norm(x, [4]), f(3, 2, 4)),
        (lambda x: nn.rms_norm(x, [2, 4], eps=1e-3), f(3, 2, 4)),
    ],
    "aten.layer_norm.default": [
        (lambda x: nn.layer_norm(x, [4], _W[0], _W[1]), f()),
        (lambda x: nn.layer_norm(x, [2, 4], eps=1e-3), f(3, 2, 4)),
    ],
    "aten.group_norm.default": [
        (lambda x: nn.group_norm(x, 2, _W[0], _W[1]), _IMAGE),
        (lambda x: nn.group_norm(x, 4, eps=1e-3), _IMAGE),
    ],
    "aten.batch_norm.default": [
        (lambda x: nn.batch_norm(x, _W[0], _W[1].abs(), _W[2], _W[3]), _IMAGE),
        (lambda x: nn.batch_norm(x, _W[0], _W[1].abs(), eps=1e-3), f()),
    ],
    "aten.conv1d.default": [(lambda x: nn.conv1d(x, _KERNEL[..., 0], _W[0], 2, 1, 2), f(3, 4, 11))],
    "aten.conv2d.default": [
        (lambda x: nn.conv2d(x, _KERNEL[:, :, :3, :2], _W[0], (2, 1), (1, 0)), _IMAGE),
        (lambda x: nn.conv2d(x, _KERNEL[:, :2], None, 1, 1, 1, 2), _IMAGE),
    ],
    "aten.conv1d.padding": [
        (lambda x: nn.conv1d(x, _KERNEL[..., 0], padding="same", dilation=2), f(3, 4, 11)),
    ],
    "aten.conv2d.padding": [
        (lambda x: nn.conv2d(x, _KERNEL[:, :, :2], padding="same"), _IMAGE),
        (lambda x: nn.conv2d(x, _KERNEL, padding="valid", stride=2), _IMAGE),
    ],
    "aten.max_pool2d.default": [
        (lambda x: nn.max_pool2d(x, 2), _IMAGE),
        (lambda x: nn.max_pool2d(x, (3, 2), 2, 1), _IMAGE),
        (lambda x: nn.max_pool2d(x, 2, 3, 1, ceil_mode=True), _IMAGE),
        (lambda x: nn.max_pool2d(x, 2, 1, dilation=2), _IMAGE),
    ],
    "aten.avg_pool2d.default": [
        (lambda x: nn.avg_pool2d(x, 2), _IMAGE),
        (lambda x: nn.avg_pool2d(x, 3, 2, 1), _IMAGE),
        (lambda x: nn.avg_pool2d(x, 3, 2, 1, count_include_pad=False), _IMAGE),
        (lambda x: nn.avg_pool2d(x, (3, 1), (2, 1), ceil_mode=True), _IMAGE),
        (lambda x: nn.avg_pool2d(x, 3, 2, 1, ceil_mode=True), _IMAGE),
        (lambda x: nn.avg_pool2d(x, 4, 3, 2, ceil_mode=True, count_include_pad=False), _IMAGE),
    ],
    "aten.adaptive_avg_pool2d.default": [(lambda x: nn.adaptive_avg_pool2d(x, 1), _IMAGE)],
}

_INV = torch.tensor([1.0, 0.1])
_MATRIX = f(4, 4)
_TAPS = f(4, 3)
_Q, _K, _V = f(3, 4, 5, 8), f(3, 2, 5, 8), f(3, 2, 5, 8)
_PADDING = torch.tensor([[1, 1, 1, 1, 0], [1, 0, 0, 0, 0], [0, 1, 1, 0, 1]])
_PLACES = torch.arange(5).repeat(3, 1) + torch.tensor([[0], [3], [9]])


_SINKS = f(4)


def _attend(causal: bool, window: int, softcap: float = 0.0, sinks: Tensor | None = None) -> Callable[..., Tensor]:
    knobs = {"scale": 0.3, "causal": causal, "window": window, "softcap": softcap}
    return lambda q, k, v, pad=None: _optc.attention(q, k, v, pad, sinks, **knobs)


def _attend_cache(total: int, window: int, softcap: float = 0.0, sinks: Tensor | None = None) -> Callable[..., Any]:
    knobs = {"scale": 0.3, "window": window, "softcap": softcap}
    return lambda q, k, v, keys, values, past: _optc.cached_attention(
        q, k, v, keys, values, past, total, sinks, **knobs
    )


def _rotate(interleaved: bool) -> Callable[..., Tensor]:
    return lambda x, place: _optc.rotary(x, place, _INV, scaling=1.5, interleaved=interleaved)


DIALECT: Cases = {
    "optc.attention.default": [
        (_attend(True, 0), _Q, _K, _V),
        (_attend(False, 0), _Q, _K, _V),
        (_attend(True, 3, 2.0), _Q, _K, _V),
        (_attend(False, 2), _Q, _Q, _Q),
        (_attend(True, 0), _Q[:, :, :2], _K, _V),
        (_attend(True, 2), _Q, _K, _V, _PADDING),
        (_attend(False, 0), _Q, _K, _V, _PADDING.bool()),
        (_attend(True, 2, sinks=_SINKS), _Q, _K, _V, _PADDING),
        (_attend(True, -2), _Q[:, :, 1:], _K, _V),  # chunks
        (_attend(False, -3), _Q, _Q, _Q),
    ],
    "optc.cached_attention.default": [
        (_attend_cache(5, 0), _Q, _K, _V, f(3, 2, 0, 8), f(3, 2, 0, 8), torch.zeros(3, dtype=I64)),
        (_attend_cache(11, 3), _Q, _K, _V, f(3, 2, 6, 8), f(3, 2, 6, 8), torch.tensor([6, 2, 0])),
        (_attend_cache(9, 0, 2.0), _Q, _K, _V, f(3, 2, 14, 8), f(3, 2, 14, 8), torch.tensor([4, 0, 3])),
        (_attend_cache(11, -4), _Q, _K, _V, f(3, 2, 6, 8), f(3, 2, 6, 8), torch.tensor([6, 2, 0])),
        (_attend_cache(11, 3, 0.0, _SINKS), _Q, _K, _V, f(3, 2, 6, 8), f(3, 2, 6, 8), torch.tensor([6, 2, 0])),
    ],
    "optc.rotary.default": [
        (_rotate(interleaved), x, _PLACES) for interleaved in (False, True) for x in (f(3, 2, 5, 4), f(3, 2, 5, 8))
    ],
    "optc.linear_attention.default": [
        (_optc.linear_attention, f(2, 5, 3, 4), f(2, 5, 3, 4), f(2, 5, 3, 6), -f(2, 5, 3).abs(), f(2, 5, 3)),
    ],
    "optc.cached_linear_attention.default": [
        (
            lambda *streams: _optc.cached_linear_attention(*streams[:4], None, streams[4]),
            *(f(2, 5, 3, 4), f(2, 5, 3, 4), f(2, 5, 3, 1), -f(2, 5, 3, 4).abs(), f(2, 3, 4, 1)),
        ),
    ],
    "optc.causal_conv1d.default": [
        (lambda x: _optc.causal_conv1d(x, _TAPS, _TAPS[:, 0]), f(2, 4, 5)),
        (lambda x: _optc.causal_conv1d(x, _TAPS, None), f(3, 4, 1)),
    ],
    "optc.rotate_blocks.default": [
        (lambda x: _optc.rotate_blocks(x, _MATRIX), f(3, 2, 8)),
        (lambda x: _optc.rotate_blocks(x, _MATRIX), f(5, 12)),
    ],
    "optc.quantize_tensor.default": [
        (lambda x: _optc.quantize_tensor(x, scale=0.02, zero=100), f(3, 8)),
        (lambda x: _optc.quantize_tensor(x, scale=0.001, zero=0), f(3, 8)),
    ],
    "optc.dequantize_tensor.default": [
        (lambda x: _optc.dequantize_tensor(x.to(torch.uint8), scale=0.02, zero=100, dtype=F32), i(low=0, high=255)),
    ],
    "optc.skip_rms_norm.default": [
        (lambda x, y: _optc.skip_rms_norm(x, y, _INV.repeat(4), eps=1e-6), f(3, 2, 8), f(3, 2, 8)),
    ],
}
