"""Lowerings of linears, norms, embeddings, convolutions and pooling."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from optc.exporters.onnx.walker import MICROSOFT, Lowering, Walker, argument, result_dtype

_aten = torch.ops.aten


def _linear(walker: Walker, node: Node) -> ir.Value:
    x, weight, bias = (*node.args, None)[:3]
    stored = walker.program.weight_of(weight) is not None
    shared = any(user.target is not _aten.linear.default for user in weight.users)
    tied = stored and shared and result_dtype(node) is torch.float32
    if tied and walker.microsoft:
        inputs = [walker.value(x), walker.weight(weight)]  # an embedding too: stored once
        out = walker.op("FusedMatMul", inputs, {"transB": 1}, domain=MICROSOFT)
    elif stored and not shared:
        out = walker.op("MatMul", [walker.value(x), walker.weight(weight, transposed=True)])
    else:
        matrix = walker.op("Transpose", [walker.value(weight)], {"perm": [1, 0]})
        out = walker.op("MatMul", [walker.value(x), matrix])
    return out if bias is None else walker.op("Add", [out, walker.value(bias)])


def _matmul(walker: Walker, node: Node) -> ir.Value:
    return walker.op("MatMul", [walker.value(item) for item in node.args[:2]])


def _addmm(walker: Walker, node: Node) -> ir.Value:
    bias, left, right = node.args[:3]
    product = walker.op("MatMul", [walker.value(left), walker.value(right)])
    return walker.op("Add", [product, walker.value(bias)])


def no_scaling(node: Node) -> str | None:
    """A predicate for addmm: only alpha = beta = 1 is lowered."""
    odd = {key: value for key, value in node.kwargs.items() if key in ("alpha", "beta") and value != 1}
    return f"{odd} is not lowered" if odd else None


def _einsum(walker: Walker, node: Node) -> ir.Value:
    operands = [walker.value(item) for item in node.args[1]]
    return walker.op("Einsum", operands, {"equation": str(node.args[0]).replace(" ", "")})


def _embedding(walker: Walker, node: Node) -> ir.Value:
    return walker.op("Gather", [walker.value(node.args[0]), walker.value(node.args[1])], {"axis": 0})


def _ones(walker: Walker, node: Node) -> ir.Value:
    sizes = [int(size) for size in node.args[1]]
    return walker.constant(torch.ones(sizes).tolist(), node.meta["val"].dtype)


def _rms_norm(walker: Walker, node: Node) -> ir.Value:
    weight, eps = argument(node, 2, "weight"), argument(node, 3, "eps")
    dtype = node.meta["val"].dtype
    scale = _ones(walker, node) if weight is None else walker.value(weight, dtype)
    epsilon = torch.finfo(dtype).eps if eps is None else float(eps)
    attributes = {"axis": -len(node.args[1]), "epsilon": epsilon, "stash_type": 1}
    return walker.op("RMSNormalization", [walker.value(node.args[0], dtype), scale], attributes)


def _layer_norm(walker: Walker, node: Node) -> ir.Value:
    weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
    scale = _ones(walker, node) if weight is None else walker.value(weight)
    inputs = [walker.value(node.args[0]), scale, None if bias is None else walker.value(bias)]
    attributes = {"axis": -len(node.args[1]), "epsilon": float(argument(node, 4, "eps", 1e-5))}
    return walker.op("LayerNormalization", inputs, attributes)


def _group_norm(walker: Walker, node: Node) -> ir.Value:
    x, groups, weight, bias = (*node.args, None, None)[:4]
    channels = int(x.meta["val"].shape[1])
    dtype = node.meta["val"].dtype
    scale = walker.constant([1.0] * channels, dtype) if weight is None else walker.value(weight)
    shift = walker.constant([0.0] * channels, dtype) if bias is None else walker.value(bias)
    attributes = {"num_groups": int(groups), "epsilon": float(argument(node, 4, "eps", 1e-5))}
    return walker.op("GroupNormalization", [walker.value(x), scale, shift], attributes)


def _batch_norm(walker: Walker, node: Node) -> ir.Value:
    """aten.batch_norm(x, weight, bias, mean, var, training, momentum, eps, cudnn) in eval mode."""
    x, weight, bias, mean, var = node.args[:5]
    dtype, channels = node.meta["val"].dtype, int(node.meta["val"].shape[1])
    scale = walker.constant([1.0] * channels, dtype) if weight is None else walker.value(weight)
    shift = walker.constant([0.0] * channels, dtype) if bias is None else walker.value(bias)
    eps = float(argument(node, 7, "eps", 1e-5))
    inputs = [walker.value(x), scale, shift, walker.value(mean), walker.value(var)]
    return walker.op("BatchNormalization", inputs, {"epsilon": eps})


def eval_mode(node: Node) -> str | None:
    """A predicate for batch_norm: running statistics only."""
    return "batch statistics (training mode) are not lowered" if node.args[5] or node.args[3] is None else None


def inactive(node: Node) -> str | None:
    """A predicate for dropout."""
    return "dropout is active (training mode)" if argument(node, 2, "train", False) else None


def _pair(value: Any, rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return [int(item) for item in (values * rank if len(values) == 1 else values)]


def _conv(walker: Walker, node: Node) -> ir.Value:
    x, weight, bias = (*node.args, None)[:3]
    rank = node.meta["val"].dim() - 2
    padding = argument(node, 4, "padding", 0)
    attributes: dict[str, Any] = {
        "strides": _pair(argument(node, 3, "stride", 1), rank),
        "dilations": _pair(argument(node, 5, "dilation", 1), rank),
        "group": int(argument(node, 6, "groups", 1)),
    }
    if padding == "same":  # spelled out: ONNX Runtime takes no dilation with auto_pad
        spans = [d * (int(k) - 1) for d, k in zip(attributes["dilations"], weight.meta["val"].shape[2:], strict=True)]
        attributes["pads"] = [span // 2 for span in spans] + [span - span // 2 for span in spans]
    else:
        attributes["pads"] = _pair(0 if padding == "valid" else padding, rank) * 2
    inputs = [walker.value(x), walker.value(weight), None if bias is None else walker.value(bias)]
    return walker.op("Conv", inputs, attributes)


def _pool(kind: str) -> Lowering:
    def lower(walker: Walker, node: Node) -> ir.Value:
        kernel = _pair(node.args[1], 2)
        stride = argument(node, 2, "stride", [])
        attributes: dict[str, Any] = {
            "kernel_shape": kernel,
            "strides": _pair(stride or kernel, 2),
            "pads": _pair(argument(node, 3, "padding", 0), 2) * 2,
        }
        if kind == "AveragePool":
            attributes["ceil_mode"] = int(argument(node, 4, "ceil_mode", False))
            attributes["count_include_pad"] = int(argument(node, 5, "count_include_pad", True))
        else:
            attributes["dilations"] = _pair(argument(node, 4, "dilation", 1), 2)
            attributes["ceil_mode"] = int(argument(node, 5, "ceil_mode", False))
        return walker.op(kind, [walker.value(node.args[0])], attributes)

    return lower


def _adaptive_average(walker: Walker, node: Node) -> ir.Value:
    return walker.op("GlobalAveragePool", [walker.value(node.args[0])])


def to_one(node: Node) -> str | None:
    """A predicate for adaptive_avg_pool2d: output size 1x1 only."""
    return None if list(node.args[1]) == [1, 1] else "only an output of 1x1 is lowered"


def batched(node: Node) -> str | None:
    """A predicate for convolutions and pooling: ONNX needs the batch axis."""
    rank = {"conv1d": 3}.get(node.target._schema.name.removeprefix("aten::"), 4)
    return None if node.meta["val"].dim() == rank else "an input without batch axis is not lowered"


def plain_average(node: Node) -> str | None:
    """A predicate for avg_pool2d: ONNX has no other divisor than the size of the window."""
    return "divisor_override is not lowered" if argument(node, 6, "divisor_override") else batched(node)


def _pad(walker: Walker, node: Node) -> ir.Value:
    """pad(x, [left, right, top, bottom, ...]) from the last axis on; negative amounts crop."""
    amounts, rank, dtype = list(node.args[1]), node.meta["val"].dim(), node.meta["val"].dtype
    pairs = [(0, 0)] * (rank - len(amounts) // 2) + [tuple(amounts[i : i + 2]) for i in range(0, len(amounts), 2)][::-1]
    pads = walker.sizes([before for before, _ in pairs] + [after for _, after in pairs])
    fill = walker.value(argument(node, 3, "value") or 0, dtype)
    return walker.op("Pad", [walker.value(node.args[0]), pads, fill], {"mode": "constant"})


def constant_fill(node: Node) -> str | None:
    """A predicate for pad."""
    mode = argument(node, 2, "mode", "constant")
    return None if mode == "constant" else f"mode {mode!r} is not lowered"


TABLE: dict[Any, Lowering] = {
    _aten.pad.default: _pad,
    _aten.linear.default: _linear,
    _aten.matmul.default: _matmul,
    _aten.mm.default: _matmul,
    _aten.bmm.default: _matmul,
    _aten.addmm.default: _addmm,
    _aten.einsum.default: _einsum,
    _aten.embedding.default: _embedding,
    _aten.rms_norm.default: _rms_norm,
    _aten.layer_norm.default: _layer_norm,
    _aten.group_norm.default: _group_norm,
    _aten.batch_norm.default: _batch_norm,
    _aten.conv1d.default: _conv,
    _aten.conv2d.default: _conv,
    _aten.conv1d.padding: _conv,
    _aten.conv2d.padding: _conv,
    _aten.max_pool2d.default: _pool("MaxPool"),
    _aten.avg_pool2d.default: _pool("AveragePool"),
    _aten.adaptive_avg_pool2d.default: _adaptive_average,
}
