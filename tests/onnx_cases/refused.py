"""What the exporter refuses, and reshapes whose axes are all dynamic."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as nn
from torch import Tensor

from onnx_cases.values import I64, Case, f, grown

_aten, _optc = torch.ops.aten, torch.ops.optc

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


_VIEW = "it writes to an input, a weight or a view"
_WEIGHT, _IMAGE = f(5, 4), f(3, 4, 9, 8)

_MASK = torch.tensor([[True, False, False, True], [False, False, False, False]])
_PROJECTED = torch.nn.LSTM(4, 5, proj_size=3, batch_first=True).eval().requires_grad_(False)

REFUSED: dict[str, Case] = {
    f"add_: aten.add_.Tensor: {_VIEW}": (_in_place_on_view, f()),
    f"mul_: aten.mul_.Tensor: {_VIEW}": (lambda x: x.unbind(1)[0].mul_(2), f()),
    f"relu_: aten.relu_.default: {_VIEW}": (_in_place_on_input, f()),
    "mul_: aten.mul_.Tensor: it writes to a tensor that has views, or is read later as it was": (
        _in_place_under_view,
        f(),
    ),
    "addmm: aten.addmm.default: {'alpha': 2} is not lowered": (
        lambda x: torch.addmm(_WEIGHT[:, 0], x, _WEIGHT.t(), alpha=2),
        f(),
    ),
    "arange: aten.arange.start: an integer range with fractional bounds is not lowered": (
        lambda x: x[0, 0] + torch.arange(0.5, 3, dtype=I64),
        f(),
    ),
    "split: aten.split.Tensor: the sizes of the parts depend on the input": (
        lambda x: grown(x).split(x.shape[0] + 4),
        f(),
    ),
    "avg_pool2d: aten.avg_pool2d.default: divisor_override is not lowered": (
        lambda x: nn.avg_pool2d(x, 2, divisor_override=3),
        _IMAGE,
    ),
    "max_pool2d: aten.max_pool2d.default: an input without batch axis is not lowered": (
        lambda x: nn.max_pool2d(x, 2),
        _IMAGE[0],
    ),
    "adaptive_avg_pool2d: aten.adaptive_avg_pool2d.default: windows of different sizes ([9, 8] to [2, 2]) are not lowered": (
        lambda x: nn.adaptive_avg_pool2d(x, 2),
        _IMAGE,
    ),
    "batch_norm: aten.batch_norm.default: batch statistics (training mode) are not lowered": (
        lambda x: nn.batch_norm(x, None, None, training=True),
        _IMAGE,
    ),
    "dropout: aten.dropout.default: dropout is active (training mode)": (
        lambda x: nn.dropout(x, 0.5, True),
        f(),
    ),
    "pad: aten.pad.default: negative or computed amounts of this mode are not lowered": (
        lambda x: nn.pad(x, (-1, 1), "reflect"),
        f(),
    ),
    "index: aten.index.Tensor: indices on both sides of a full slice are not lowered": (
        lambda x: x[[0, 0], :, [0, 2]],
        f(3, 4, 4),
    ),
    "max_pool2d_with_indices: aten.max_pool2d_with_indices.default: the places of maxima are not lowered": (
        lambda x: nn.max_pool2d(x, 2, return_indices=True)[1],
        _IMAGE,
    ),
    "select_scatter: aten.select_scatter.default: a place from the end of an axis of any size is not lowered": (
        lambda x: torch.select_scatter(x, x[0], 0, -1),
        f(),
    ),
    "index_put: aten.index_put.default: values of a number that depends on the data are not lowered": (
        lambda x: _aten.index_put(x[:2], [_MASK], x[0, :2]),
        f(),
    ),
    "lstm: aten.lstm.input: a projection of the state (proj_size) is not lowered": (
        lambda x: _PROJECTED(x)[0],
        f(3, 2, 4),
    ),
    "erfinv: aten.erfinv.default has no lowering": (torch.erfinv, f(low=-0.5, high=0.5)),
}
