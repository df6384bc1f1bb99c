"""Layers of images and sequences: convolutions, pooling, padding, interpolation, recurrence; writes into copies."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as nn
from torch import Tensor

from onnx_cases.values import Case, Cases, b, f, i

_aten = torch.ops.aten

_IMAGE, _LINE, _BLOCK = f(3, 4, 6, 6), f(3, 4, 9), f(3, 2, 4, 4, 4)
_K1, _K2, _K3 = f(4, 5, 3), f(4, 5, 3, 2), f(2, 2, 2, 2, 2)
_BIAS = f(5)

f4 = f(4)


def _first(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """The first result of a function or a layer."""
    if isinstance(function, torch.nn.Module):
        function.eval().requires_grad_(False)
    return lambda x: function(x)[0]  # type: ignore[no-any-return]


CONVOLUTIONS: Cases = {
    "aten.conv3d.default": [(lambda x: nn.conv3d(x, _K3, padding=1), _BLOCK)],
    "aten.conv3d.padding": [(lambda x: nn.conv3d(x, _K3, padding="same"), _BLOCK)],
    "aten.conv_transpose1d.default": [(lambda x: nn.conv_transpose1d(x, _K1, _BIAS, stride=2, dilation=2), _LINE)],
    "aten.conv_transpose2d.input": [
        (lambda x: nn.conv_transpose2d(x, _K2, None, (2, 3), (1, 0), (1, 2)), _IMAGE),
        (lambda x: nn.conv_transpose2d(x, _K2[:, :2], groups=2), _IMAGE),
    ],
    "aten.conv_transpose3d.input": [(lambda x: nn.conv_transpose3d(x, _K3, stride=2), _BLOCK)],
    "aten.convolution.default": [
        (lambda x: _aten.convolution(x, _K2.transpose(0, 1), _BIAS, [2, 1], [1, 0], [1, 2], False, [0, 0], 1), _IMAGE),
        (lambda x: _aten.convolution(x, _K2, None, [2, 2], [0, 0], [1, 1], True, [1, 1], 1), _IMAGE),
    ],
    "aten._native_batch_norm_legit_no_training.default": [
        (lambda x: _aten._native_batch_norm_legit_no_training(x, f4, None, f4, f4.abs(), 0.1, 1e-3)[0], _IMAGE),
    ],
    "aten.instance_norm.default": [
        (nn.instance_norm, _IMAGE),
        (lambda x: nn.instance_norm(x, weight=f4, bias=f4), _LINE),
    ],
}

POOLS: Cases = {
    "aten.max_pool1d.default": [(lambda x: nn.max_pool1d(x, 3, 2, 1), _LINE)],
    "aten.max_pool3d.default": [(lambda x: nn.max_pool3d(x, 2, ceil_mode=True, dilation=2), _BLOCK)],
    **{
        f"aten.max_pool{rank}d_with_indices.default": [
            (_first(partial(getattr(_aten, f"max_pool{rank}d_with_indices"), kernel_size=[2])), x)
        ]
        for rank, x in ((2, _IMAGE), (3, _BLOCK))
    },
    "aten.avg_pool1d.default": [(lambda x: nn.avg_pool1d(x, 3, 2, 1, ceil_mode=True), _LINE)],
    "aten.avg_pool3d.default": [(lambda x: nn.avg_pool3d(x, 2, count_include_pad=False, padding=1), _BLOCK)],
    "aten.adaptive_avg_pool1d.default": [(lambda x: nn.adaptive_avg_pool1d(x, 3), _LINE)],
    "aten.adaptive_avg_pool3d.default": [(lambda x: nn.adaptive_avg_pool3d(x, (2, 1, 4)), _BLOCK)],
    "aten.adaptive_max_pool1d.default": [(lambda x: _aten.adaptive_max_pool1d(x, [3])[0], _LINE)],
    "aten.adaptive_max_pool2d.default": [(lambda x: nn.adaptive_max_pool2d(x, (1, 1)), _IMAGE)],
    "aten.adaptive_max_pool3d.default": [(lambda x: nn.adaptive_max_pool3d(x, 2), _BLOCK)],
}

PADS: Cases = {
    "aten.constant_pad_nd.default": [(lambda x: _aten.constant_pad_nd(x, [1, -1, 2, 0], 1.5), f())],
    **{
        f"aten.{kind}_pad{rank}d.default": [(partial(getattr(_aten, f"{kind}_pad{rank}d"), padding=[1, 2] * rank), x)]
        for kind in ("reflection", "replication")
        for rank, x in ((1, _LINE), (2, _IMAGE), (3, _BLOCK))
    },
}

_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}
_INPUTS = {1: _LINE, 2: _IMAGE, 3: _BLOCK}


def _resized(mode: str, x: Tensor) -> list[Case]:
    """By size, by factor, with corners aligned where the mode has any."""
    size = [5, 3, 7][: x.dim() - 2]
    cases: list[Case] = [
        (lambda x: nn.interpolate(x, size=size, mode=mode), x),
        (lambda x: nn.interpolate(x, scale_factor=1.7, mode=mode), x),
    ]
    if mode not in ("nearest", "nearest-exact"):
        cases.append((lambda x: nn.interpolate(x, scale_factor=2.0, mode=mode, align_corners=True), x))
    return cases


RESIZES: Cases = {
    **{f"aten.upsample_nearest{rank}d.vec": _resized("nearest", x) for rank, x in _INPUTS.items()},
    **{f"aten._upsample_nearest_exact{rank}d.vec": _resized("nearest-exact", x) for rank, x in _INPUTS.items()},
    **{f"aten.upsample_{_MODES[rank]}{rank}d.vec": _resized(_MODES[rank], x) for rank, x in _INPUTS.items()},
    "aten.upsample_bicubic2d.vec": _resized("bicubic", _IMAGE),
    "aten.grid_sampler.default": [
        (lambda x, g: nn.grid_sample(x, g, align_corners=False), _IMAGE, f(3, 5, 2, 2, low=-1.2, high=1.2)),
        (
            lambda x, g: nn.grid_sample(x, g, "nearest", "border", align_corners=True),
            _IMAGE,
            f(3, 5, 2, 2, low=-1, high=1),
        ),
    ],
    "aten.grid_sampler_2d.default": [
        (lambda x, g: _aten.grid_sampler_2d(x, g, 0, 2, True), _IMAGE, f(3, 2, 2, 2, low=-1.4, high=1.4)),
    ],
}

_LAYERS = {
    "lstm.input": torch.nn.LSTM(4, 5, num_layers=2, bidirectional=True, batch_first=True),
    "gru.input": torch.nn.GRU(4, 5, num_layers=2, batch_first=True, bias=False),
    "rnn_tanh.input": torch.nn.RNN(4, 5, bidirectional=True, batch_first=True),
    "rnn_relu.input": torch.nn.RNN(4, 5, nonlinearity="relu", batch_first=True),
}


RECURRENT: Cases = {f"aten.{name}": [(_first(layer), f(3, 7, 4))] for name, layer in _LAYERS.items()}

_PLACES = torch.tensor([[0, 2], [1, 0], [3, 3]])
_TWICE = torch.tensor([[0, 0], [1, 0], [3, 3]])
_ROWS = torch.tensor([0, 2, 1])

WRITES: Cases = {
    "aten.copy.default": [(lambda x: _aten.copy(x, x[0]), f()), (lambda x: _aten.copy(x, x.long() * 2), f())],
    "aten.slice_scatter.default": [
        (lambda x: torch.slice_scatter(x, x[:, :2] * 2, 1, 1, 3), f()),
        (lambda x: torch.slice_scatter(x, x[:, :2], 1, -3, None, 2), f(3, 4)),
        (lambda x: torch.slice_scatter(x, x[:, 2:], -1, -2), f()),
    ],
    "aten.select_scatter.default": [
        (lambda x: torch.select_scatter(x, x[:, 0] * 2, 1, 2), f()),
        (lambda x: torch.select_scatter(x, x[:, 0] * 2, -1, -1), f()),
    ],
    "aten.scatter.src": [(lambda x, n: x.scatter(1, n, x[:, :2] * 2), f(), _PLACES)],
    "aten.scatter.value": [(lambda x, n: x.scatter(1, n, 1.5), f(), _PLACES)],
    "aten.scatter_add.default": [(lambda x, n: x.scatter_add(1, n, x[:, :2]), f(), _PLACES)],
    "aten.scatter_reduce.two": [
        (lambda x, n: x.scatter_reduce(1, n, x[:, :2] * 2, "amax"), f(), _PLACES),
        (lambda x, n: x.scatter_reduce(1, n, x[:, :2] * 2, "amin", include_self=False), i(), _PLACES),
        (lambda x, n: x.scatter_reduce(1, n, x[:, :2] * 2, "amax", include_self=False), f(), _PLACES),
        (lambda x, n: x.scatter_reduce(1, n, x[:, :2] * 2, "sum", include_self=False), f(), _PLACES),
        (lambda x, n: x.scatter_reduce(1, n, x[:, :2], "mean"), f(), _TWICE),
        (lambda x, n: x.scatter_reduce(1, n, x[:, :2], "mean", include_self=False), f(), _TWICE),
    ],
    "aten.im2col.default": [
        (lambda x: torch.nn.functional.unfold(x, (3, 1), padding=(1, 0)), f(3, 4, 7, 1)),
        (lambda x: torch.nn.functional.unfold(x, (2, 3), dilation=2, stride=(2, 1)), f(3, 2, 7, 9)),
    ],
    "aten.index_put.default": [
        (lambda x: _aten.index_put(x, [x > 0], torch.tensor(7.0)), f()),
        (lambda x: _aten.index_put(x, [None, _ROWS], x[:, :3] * 2), f()),
        (lambda x: _aten.index_put(x, [None, _ROWS, _ROWS[:, None]], x[:, :3, :3]), f(3, 4, 4)),
        (lambda x: _aten.index_put(x.flatten(), [_ROWS % 2], x[:, 0].sum(), True), f()),
    ],
    "aten.flip.default": [(lambda x: x.flip(1), f()), (lambda x: x.flip(0, -1), i())],
    "aten.var.correction": [
        (lambda x: x.var((0, 1), correction=1.0 - 1), f()),
        (lambda x: _aten.var.correction(x, [1], correction=2, keepdim=True), f()),
    ],
    "aten.any.dims": [(lambda x: _aten.any.dims(x, [0, 1]), b())],
    "aten.prod.dim_int": [(lambda x: x.prod(1), f()), (lambda x: x.prod(0, keepdim=True), i(low=1, high=3))],
    "aten.isinf.default": [(lambda x: torch.isinf(1 / x.relu()), f()), (torch.isinf, i())],
    "aten.trunc.default": [(torch.trunc, f()), (torch.trunc, i())],
    "aten.log1p.default": [(torch.log1p, f(3, 4, low=-0.9, high=3.0))],
    "aten.expm1.default": [(torch.expm1, f()), (torch.expm1, i(low=-3, high=3))],
    **{
        f"aten.{name}.default": [(getattr(_aten, name).default, f(3, 4, low=-0.9, high=0.9))]
        for name in ("asin", "acos", "atanh")
    },
    **{f"aten.{name}.default": [(getattr(_aten, name).default, f())] for name in ("atan", "sinh", "cosh", "asinh")},
    "aten.acosh.default": [(torch.acosh, f(3, 4, low=1.1, high=4.0))],
}
