"""Lowerings of linears, norms, embeddings, convolutions and padding."""

from __future__ import annotations

import itertools
from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from optc.compiler.analysis.convolutions import CONVOLUTIONS, TRANSPOSED
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
    return _normalized(walker, x, weight, bias, mean, var, float(argument(node, 7, "eps", 1e-5)))


def _normalized(walker: Walker, x: Any, weight: Any, bias: Any, mean: Any, var: Any, eps: float) -> ir.Value:
    dtype, channels = x.meta["val"].dtype, int(x.meta["val"].shape[1])
    scale = walker.constant([1.0] * channels, dtype) if weight is None else walker.value(weight)
    shift = walker.constant([0.0] * channels, dtype) if bias is None else walker.value(bias)
    inputs = [walker.value(x), scale, shift, walker.value(mean), walker.value(var)]
    return walker.op("BatchNormalization", inputs, {"epsilon": eps})


def _batch_norm_parts(walker: Walker, node: Node) -> tuple[ir.Value, None, None]:
    """aten._native_batch_norm_legit_no_training(x, weight, bias, mean, var, momentum, eps); nothing reads the others."""
    x, weight, bias, mean, var, _, eps = node.args
    return _normalized(walker, x, weight, bias, mean, var, float(eps)), None, None


def _instance_norm(walker: Walker, node: Node) -> ir.Value:
    """aten.instance_norm(x, weight, bias, mean, var, use_input_stats, momentum, eps, cudnn) by its input's statistics."""
    x, weight, bias = node.args[:3]
    dtype, channels = node.meta["val"].dtype, int(node.meta["val"].shape[1])
    scale = walker.constant([1.0] * channels, dtype) if weight is None else walker.value(weight)
    shift = walker.constant([0.0] * channels, dtype) if bias is None else walker.value(bias)
    return walker.op("InstanceNormalization", [walker.value(x), scale, shift], {"epsilon": float(node.args[7])})


def own_statistics(node: Node) -> str | None:
    """A predicate for instance_norm."""
    return None if node.args[5] else "running statistics are not lowered"


def first_alone(node: Node) -> str | None:
    """A predicate for operators of which only the first result is lowered."""
    return "only its first result is lowered" if any(user.args[1] for user in node.users if user.users) else None


def eval_mode(node: Node) -> str | None:
    """A predicate for batch_norm: running statistics only."""
    return "batch statistics (training mode) are not lowered" if node.args[5] or node.args[3] is None else None


def inactive(node: Node) -> str | None:
    """A predicate for dropout."""
    return "dropout is active (training mode)" if argument(node, 2, "train", False) else None


def pair(value: Any, rank: int) -> list[int]:
    """One number for each spatial axis, of one number or several."""
    values = [value] if isinstance(value, int) else list(value)
    return [int(item) for item in (values * rank if len(values) == 1 else values)]


def _conv(walker: Walker, node: Node) -> ir.Value:
    x, weight, bias = (*node.args, None)[:3]
    rank = node.meta["val"].dim() - 2
    padding = argument(node, 4, "padding", 0)
    attributes: dict[str, Any] = {
        "strides": pair(argument(node, 3, "stride", 1), rank),
        "dilations": pair(argument(node, 5, "dilation", 1), rank),
        "group": int(argument(node, 6, "groups", 1)),
    }
    if padding == "same":  # spelled out: ONNX Runtime takes no dilation with auto_pad
        spans = [d * (int(k) - 1) for d, k in zip(attributes["dilations"], weight.meta["val"].shape[2:], strict=True)]
        attributes["pads"] = [span // 2 for span in spans] + [span - span // 2 for span in spans]
    else:
        attributes["pads"] = pair(0 if padding == "valid" else padding, rank) * 2
    inputs = [walker.value(x), walker.value(weight), None if bias is None else walker.value(bias)]
    return walker.op("Conv", inputs, attributes)


def _transposed(walker: Walker, node: Node, given: tuple[Any, ...]) -> ir.Value:
    """ConvTranspose of (stride, padding, output_padding, groups, dilation)."""
    x, weight, bias = (*node.args, None)[:3]
    rank = node.meta["val"].dim() - 2
    stride, padding, behind, groups, dilation = given
    attributes: dict[str, Any] = {
        "strides": pair(stride, rank),
        "dilations": pair(dilation, rank),
        "group": int(groups),
        "pads": pair(padding, rank) * 2,
        "output_padding": pair(behind, rank),
    }
    inputs = [walker.value(x), walker.value(weight), None if bias is None else walker.value(bias)]
    return walker.op("ConvTranspose", inputs, attributes)


def _conv_transpose(walker: Walker, node: Node) -> ir.Value:
    names = (("stride", 1), ("padding", 0), ("output_padding", 0), ("groups", 1), ("dilation", 1))
    given = tuple(argument(node, 3 + place, name, default) for place, (name, default) in enumerate(names))
    return _transposed(walker, node, given)


def _convolution(walker: Walker, node: Node) -> ir.Value:
    """aten.convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)."""
    stride, padding, dilation, transposed, behind, groups = node.args[3:9]
    if transposed:
        return _transposed(walker, node, (stride, padding, behind, groups, dilation))
    x, weight, bias = node.args[:3]
    rank = node.meta["val"].dim() - 2
    attributes = {
        "strides": pair(stride, rank),
        "dilations": pair(dilation, rank),
        "group": int(groups),
        "pads": pair(padding, rank) * 2,
    }
    inputs = [walker.value(x), walker.value(weight), None if bias is None else walker.value(bias)]
    return walker.op("Conv", inputs, attributes)


def batched(node: Node) -> str | None:
    """A predicate for convolutions: ONNX needs the batch axis."""
    rank = node.args[1].meta["val"].dim()
    return None if node.meta["val"].dim() == rank else "an input without batch axis is not lowered"


_END = 2**63 - 1


def _windows(walker: Walker, node: Node) -> ir.Value:
    """im2col(x [B,C,H,W]) -> [B, C * kh * kw, L]: each place of the window is a slice, and they stand side by side."""
    kernel, dilation, padding, stride = (list(item) for item in node.args[1:5])
    x = walker.value(node.args[0])
    if any(padding):
        x = walker.op("Pad", [x, walker.constant([0, 0, *padding, 0, 0, *padding])], {"mode": "constant"})
    parts = []
    for i, j in itertools.product(*map(range, kernel)):
        starts = [i * dilation[0], j * dilation[1]]
        behind = [start - step * (size - 1) for start, step, size in zip(starts, dilation, kernel, strict=True)]
        ends = [end or _END for end in behind]  # counted from the end: 0 would be the beginning
        places = [walker.constant(item) for item in (starts, ends, [2, 3], stride)]
        parts.append(walker.op("Unsqueeze", [walker.op("Slice", [x, *places]), walker.constant([2])]))
    stacked = walker.op("Concat", parts, {"axis": 2})
    head = walker.op("Shape", [stacked], {"end": 1})
    channels = int(node.meta["val"].shape[1])
    return walker.op("Reshape", [stacked, walker.op("Concat", [head, walker.constant([channels, -1])], {"axis": 0})])


def batched_image(node: Node) -> str | None:
    """A predicate for im2col."""
    return None if node.args[0].meta["val"].dim() == 4 else "an image without a batch axis is not lowered"


_PADS = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def _pad(walker: Walker, node: Node) -> ir.Value:
    """pad(x, [left, right, top, bottom, ...]) from the last axis on; negative amounts crop where the fill is constant."""
    amounts, rank, dtype = list(node.args[1]), node.meta["val"].dim(), node.meta["val"].dtype
    pairs = [(0, 0)] * (rank - len(amounts) // 2) + [tuple(amounts[i : i + 2]) for i in range(0, len(amounts), 2)][::-1]
    pads = walker.sizes([before for before, _ in pairs] + [after for _, after in pairs])
    mode = _mode(node)
    place = 3 if node.target is _aten.pad.default else 2
    fill = [walker.value(argument(node, place, "value") or 0, dtype)] if mode == "constant" else []
    return walker.op("Pad", [walker.value(node.args[0]), pads, *fill], {"mode": mode})


def _mode(node: Node) -> str:
    name = node.target._schema.name
    kind = next(
        (
            ours
            for start, ours in (("aten::reflection", "reflect"), ("aten::replication", "replicate"))
            if name.startswith(start)
        ),
        "constant",
    )
    return _PADS[argument(node, 2, "mode", "constant") if node.target is _aten.pad.default else kind]


def outwards(node: Node) -> str | None:
    """A predicate for pad: only a constant fill has negative amounts."""
    crops = any(not isinstance(item, int) or item < 0 for item in node.args[1])
    return "negative or computed amounts of this mode are not lowered" if crops and _mode(node) != "constant" else None


PADS = (
    _aten.pad.default,
    _aten.constant_pad_nd.default,
    _aten.reflection_pad1d.default,
    _aten.reflection_pad2d.default,
    _aten.reflection_pad3d.default,
    _aten.replication_pad1d.default,
    _aten.replication_pad2d.default,
    _aten.replication_pad3d.default,
)

TABLE: dict[Any, Lowering] = {
    **dict.fromkeys(PADS, _pad),
    _aten.im2col.default: _windows,
    **dict.fromkeys(CONVOLUTIONS, _conv),
    **dict.fromkeys(TRANSPOSED, _conv_transpose),
    _aten.convolution.default: _convolution,
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
    _aten._native_batch_norm_legit_no_training.default: _batch_norm_parts,
    _aten.instance_norm.default: _instance_norm,
}
