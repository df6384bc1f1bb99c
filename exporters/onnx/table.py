"""The lowerings by operator, and what is legal because of them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from optc.compiler.target import Predicate
from optc.exporters.onnx import dialect, elementwise, layers, reduce, shape
from optc.exporters.onnx.walker import Lowering

_aten, _optc = torch.ops.aten, torch.ops.optc

LOWERINGS: dict[Any, Lowering] = {
    **elementwise.TABLE,
    **shape.TABLE,
    **reduce.TABLE,
    **layers.TABLE,
    **dialect.TABLE,
}

_PREDICATES: dict[Any, Predicate] = {
    _aten.addmm.default: layers.no_scaling,
    _aten.batch_norm.default: layers.eval_mode,
    _aten.dropout.default: layers.inactive,
    _aten.adaptive_avg_pool2d.default: layers.to_one,
    _aten.index.Tensor: reduce.leading_indices,
    _optc.attention.default: dialect.no_sinks,
}


def _part_of_several(node: Node) -> str | None:
    """A predicate for getitem: it takes one of an operator's several results."""
    return None if isinstance(node.args[0], Node) else "only results of operators are taken apart"


LEGAL: dict[Any, Predicate | None] = {
    **dict.fromkeys(LOWERINGS),
    **_PREDICATES,
    operator.getitem: _part_of_several,
}
