"""The lowerings of both op sets, and what is legal because of them."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch

from optc.compiler.target.target import Predicate
from optc.exporters.onnx.table import LEGAL as ONNX_LEGAL
from optc.exporters.onnx.table import LOWERINGS
from optc.exporters.onnx.walker import Lowering
from optc.exporters.trt import basic, fused, quantized

_aten, _optc = torch.ops.aten, torch.ops.optc

_OTHERS = (  # operators of ONNX Runtime's own, or forms that TensorRT is given otherwise
    _optc.attention.default,
    _optc.cached_attention.default,
    _optc.rotary.default,
    _optc.group_query_attention.default,
    _optc.group_query_attention_codes.default,
    _optc.matmul_nbits.default,
    _optc.skip_rms_norm.default,
    _optc.quantize_tokens.default,
    _optc.matmul_integer.default,
    _optc.matmul_bnb4.default,
)
_NEWER = (  # lowered to operators that opset 17 does not have, or has in another form
    _aten.group_norm.default,
    _aten.mish.default,
    _aten.max.dim,
    _aten.min.dim,
    _aten.pad.default,
)


@dataclass(frozen=True)
class OpSet:
    """A set of ONNX operators.

    Attributes:
        opset, ir_version: of the file.
        table: lowering of each operator of the dialect that the set has.
    """

    name: str
    opset: int
    ir_version: int
    table: dict[Any, Lowering]
    predicates: dict[Any, Predicate] = field(default_factory=dict)

    @property
    def legal(self) -> dict[Any, Predicate | None]:
        """Operator -> predicate, as a Target has it."""
        plain = {target: ONNX_LEGAL.get(target) for target in self.table}
        return {**plain, operator.getitem: ONNX_LEGAL[operator.getitem], **self.predicates}


_SHARED = {target: lower for target, lower in LOWERINGS.items() if target not in _OTHERS}
OP_SETS = {
    "fused": OpSet(
        "fused",
        24,
        11,
        {**_SHARED, **fused.TABLE, **quantized.FUSED},
        {_optc.dequantize_float.default: quantized.one_scale_per_row},
    ),
    "basic": OpSet(
        "basic",
        17,
        8,
        {**{k: v for k, v in _SHARED.items() if k not in _NEWER}, **basic.TABLE, **quantized.BASIC},
        {_optc.dequantize_linear.default: quantized.whole_channels},
    ),
}

LEGAL = OP_SETS["fused"].legal
"""What either set takes; the exporter checks the one that is written."""
