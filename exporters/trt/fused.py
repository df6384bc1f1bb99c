"""Lowerings of the `fused` op set: opset 24, one operator for each layer that TensorRT has of attention and caches."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from optc.exporters.onnx.walker import Lowering, Walker
from optc.exporters.trt.basic import masked_attention as spelled_out

_optc = torch.ops.optc


def _tensor_scatter(walker: Walker, node: Node) -> ir.Value:
    """TensorScatter-24, linear: its circular mode is refused by TensorRT's parser."""
    cache, new, past = node.args
    inputs = [walker.value(cache), walker.value(new), walker.value(past, torch.int64)]
    return walker.op("TensorScatter", inputs, {"axis": -2, "mode": "linear"})


def _masked_attention(walker: Walker, node: Node) -> ir.Value:
    """Attention-24 with a boolean mask, never `is_causal`: the parser reads that as a mask from the upper left."""
    if node.kwargs["softcap"]:
        return spelled_out(walker, node)  # the parser refuses a softcap
    inputs = [walker.value(item) for item in node.args]
    return walker.op("Attention", inputs, {"scale": float(node.kwargs["scale"])})


def _rotary_cached(walker: Walker, node: Node) -> ir.Value:
    x, position, cos, sin = node.args
    size, half = int(node.meta["val"].shape[3]), int(cos.meta["val"].shape[1])
    attributes: dict[str, Any] = {"interleaved": int(bool(node.kwargs["interleaved"]))}
    if 2 * half != size:
        attributes["rotary_embedding_dim"] = 2 * half
    inputs = [walker.value(x), walker.value(cos), walker.value(sin), walker.value(position, torch.int64)]
    return walker.op("RotaryEmbedding", inputs, attributes)


TABLE: dict[Any, Lowering] = {
    _optc.tensor_scatter.default: _tensor_scatter,
    _optc.masked_attention.default: _masked_attention,
    _optc.rotary_cached.default: _rotary_cached,
}
