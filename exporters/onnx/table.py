"""The lowerings by operator, and what is legal because of them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from optc.compiler.analysis.aliases import unshared
from optc.compiler.analysis.convolutions import CONVOLUTIONS, TRANSPOSED
from optc.compiler.target.target import Predicate
from optc.exporters.onnx import (
    arithmetic,
    attention,
    dialect,
    elementwise,
    layers,
    pooling,
    recurrent,
    reduce,
    resize,
    scatter,
    shape,
)
from optc.exporters.onnx.walker import Lowering

_aten = torch.ops.aten

LOWERINGS: dict[Any, Lowering] = {
    **arithmetic.TABLE,
    **elementwise.TABLE,
    **shape.TABLE,
    **reduce.TABLE,
    **layers.TABLE,
    **pooling.TABLE,
    **resize.TABLE,
    **recurrent.TABLE,
    **scatter.TABLE,
    **attention.TABLE,
    **dialect.TABLE,
}

_IN_PLACE = [
    target
    for target in LOWERINGS
    if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable and target is not _aten.detach_.default
]

_PREDICATES: dict[Any, Predicate] = {
    **dict.fromkeys(_IN_PLACE, unshared),
    _aten.addmm.default: layers.no_scaling,
    _aten.arange.default: shape.no_truncation,
    _aten.arange.start: shape.no_truncation,
    _aten.arange.start_step: shape.no_truncation,
    _aten.batch_norm.default: layers.eval_mode,
    _aten.dropout.default: layers.inactive,
    _aten.chunk.default: shape.known_parts,
    _aten.split.Tensor: shape.known_parts,
    **dict.fromkeys((*CONVOLUTIONS, *TRANSPOSED), layers.batched),
    **dict.fromkeys(layers.PADS, layers.outwards),
    _aten.im2col.default: layers.batched_image,
    _aten._native_batch_norm_legit_no_training.default: layers.first_alone,
    _aten.instance_norm.default: layers.own_statistics,
    **dict.fromkeys(pooling.AVERAGES, pooling.plain_average),
    **dict.fromkeys(pooling.MAXIMA, pooling.batched),
    **dict.fromkeys(pooling.ADAPTIVE, pooling.even_windows),
    **dict.fromkeys(recurrent.TABLE, recurrent.plain_recurrence),
    _aten.slice_scatter.default: scatter.known_steps,
    _aten.select_scatter.default: scatter.known_place,
    **dict.fromkeys(scatter.SCATTERS, scatter.whole_source),
    _aten.index_put.default: scatter.known_places,
    _aten.index.Tensor: reduce.adjacent_indices,
    _aten.one_hot.default: reduce.known_depth,
}


def _part_of_several(node: Node) -> str | None:
    """A predicate for getitem: it takes one of an operator's several results."""
    return None if isinstance(node.args[0], Node) else "only results of operators are taken apart"


LEGAL: dict[Any, Predicate | None] = {
    **dict.fromkeys(LOWERINGS),
    **_PREDICATES,
    operator.getitem: _part_of_several,
}
