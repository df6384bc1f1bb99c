"""Linears as the CUDA kernels (compiler/kernels/cuda) compute them: norm before, activation and residual behind.

`fused_linear`, `fused_norm` for what needs whole rows, and `packed_embedding` for rows of a packed table are made by the
passes of the CUDA target only. Packed weights keep rows of W as rows:

    int8    int8 [N, K]      code - 128
    int4    uint8 [N, K/2]   byte j of a block of 32 columns holds column j in its low nibble and column j + 16 in its
                             high one, each code - 8 in two's complement
    fp8     float8 [N, K]    E4M3, as `dequantize_float` takes it

So four neighbouring bytes hold two runs of four neighbouring columns, as dp4a and the 8-bit tensor cores want them:
signed bytes are made of nibbles by one AND (times 16) and one shift, without subtracting a zero point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from optc.compiler.ops.dialect.quantization import dequantize_activation, quantize_dynamic
from optc.compiler.ops.library import define

BLOCK = 32
"""Columns of an int4 weight that are packed together."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
NORMS = ("", "rms", "layer")


class PackedWeight(NamedTuple):
    """A weight as `fused_linear` takes it.

    Attributes:
        weight: see the module.
        scale: [N, G] in the compute type, float32 for fp8; G is K / group_size, or 1.
        zero: int8 [N, G], the zero point - 2^(bits-1); None where that is 0 everywhere.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor | None


def pack_integer(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> PackedWeight:
    """The arguments of `optc.dequantize` (codes uint8 [N, K], scale [N, G], zero uint8 [N, G]), packed.

    Args:
        bits: 4 (K a multiple of 32) or 8.
    """
    middle = 2 ** (bits - 1)
    signed = (codes.to(torch.int16) - middle).to(torch.int8)
    offset = None if zero is None else (zero.to(torch.int16) - middle).to(torch.int8)
    if bits == 8:
        return PackedWeight(signed, scale, offset)
    low, high = signed.view(torch.uint8).unflatten(1, (-1, 2, BLOCK // 2)).unbind(2)
    return PackedWeight(((low & 15) | (high << 4)).flatten(1), scale, offset)


def pack_float(codes: Tensor, scale: Tensor) -> PackedWeight:
    """The arguments of `optc.dequantize_float` (codes float8 [N, K], scale [N, G] or [1, 1]), packed."""
    return PackedWeight(codes, scale.float().expand(codes.shape[0], -1).contiguous(), None)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [N, K/2] -> int8 [N, K], values from -8 to 7."""
    halves = packed.view(torch.int8).unflatten(1, (-1, BLOCK // 2))
    return torch.stack([(halves << 4) >> 4, halves >> 4], 2).flatten(1)


def dequantize_packed(
    weight: Tensor, scale: Tensor, zero: Tensor | None, *, format: str, group_size: int, dtype: torch.dtype
) -> Tensor:
    """The weight [N, K] in `dtype`, computed in float32 and rounded once; `format` is not ""."""
    values = (unpack_nibbles(weight) if format == "int4" else weight).float()
    groups = values.unflatten(1, (-1, group_size or values.shape[1]))
    if zero is not None:
        groups = groups - zero.float()[..., None]
    return (groups * scale.float()[..., None]).flatten(1).to(dtype)


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, eps: float) -> Tensor:
    """x [..., K] in float32, through `norm`."""
    values, size = x.float(), x.shape[-1:]
    scale = None if weight is None else weight.float()
    if norm == "rms":
        return F.rms_norm(values, size, scale, eps)
    return F.layer_norm(values, size, scale, None if bias is None else bias.float(), eps) if norm else values


def round_tokens(x: Tensor, format: str) -> Tensor:
    """x [..., K], each row rounded to codes of a format by its own scale and brought back, in x's type."""
    return dequantize_activation(*quantize_dynamic(x, format=format), dtype=x.dtype)


def finish(y: Tensor, activation: str, gated: bool, residual: Tensor | None) -> Tensor:
    """What comes behind the product y [..., N]: activation, the product with the up half, the residual."""
    if gated:
        gate, up = y.chunk(2, -1)
        y = ACTIVATIONS[activation](gate) * up
    else:
        y = ACTIVATIONS[activation](y)
    return y if residual is None else y + residual.to(y.dtype)


def _fused_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    norm: str = "",
    eps: float = 0.0,
    activation: str = "",
    gated: bool = False,
    format: str = "",
    group_size: int = 0,
    inputs: str = "",
) -> Tensor:
    """activation(norm(x) @ W.T + bias) [* up] + residual, computed in float32 and rounded once, to x's type.

    Args:
        x: [..., K]. weight: W [N, K] in x's type, or packed as `format` says (see the module).
        scale, zero: of a packed weight, see `PackedWeight`.
        norm_weight, norm_bias: [K], of the norm. bias: [N]. residual: of the result's shape.
        norm: "", "rms" or "layer", over K, with `eps`.
        activation: a name of `ACTIVATIONS`.
        gated: the first N/2 rows of W (and bias) make the gate, which the activation is for, and the others what it
            is multiplied with; the result is [..., N/2].
        format: "", "int8", "int4" or "fp8".
        group_size: columns that share a scale; 0 for one scale per row.
        inputs: "", or what tokens are rounded to behind the norm, each by its own scale: "fp8", see `round_tokens`.
    """
    if scale is not None:
        weight = dequantize_packed(weight, scale, zero, format=format, group_size=group_size, dtype=torch.float32)
    values = normalize(x, norm_weight, norm_bias, norm, eps)
    if inputs:
        values = round_tokens(values.to(x.dtype), inputs).float()
    y = F.linear(values, weight.float(), None if bias is None else bias.float())
    return finish(y, activation, gated, residual).to(x.dtype)


def _fused_linear_fake(x: Tensor, weight: Tensor, *_: object, gated: bool = False, **__: Any) -> Tensor:
    rows = weight.shape[0]
    return x.new_empty((*x.shape[:-1], rows // 2 if gated else rows))


define(
    "fused_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? zero, Tensor? norm_weight, Tensor? norm_bias, "
    'Tensor? bias, Tensor? residual, *, str norm="", float eps=0., str activation="", bool gated=False, '
    'str format="", int group_size=0, str inputs="") -> Tensor',
    _fused_linear,
    _fused_linear_fake,
    aten=_fused_linear,
    rounds_inside=lambda keywords: bool(keywords.get("inputs")),
)


def _fused_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    norm: str = "",
    eps: float = 0.0,
    factor: float = 1.0,
) -> Tensor:
    """norm(x) * factor + residual, computed in float32 and rounded once, to x's type.

    Args:
        x: [..., K]. weight, bias: [K], of the norm, of any floating type. residual: of x's shape.
        norm: "", "rms" or "layer", over K, with `eps`.
    """
    y = normalize(x, weight, bias, norm, eps) * factor
    return (y if residual is None else y + residual.float()).to(x.dtype)


def _fused_norm_fake(x: Tensor, *_: object, **__: Any) -> Tensor:
    return x.new_empty(x.shape)


define(
    "fused_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, *, "
    'str norm="", float eps=0., float factor=1.) -> Tensor',
    _fused_norm,
    _fused_norm_fake,
    aten=_fused_norm,
)


def packed_columns(weight: Tensor, format: str) -> int:
    """Columns K of a packed weight."""
    return weight.shape[1] * (2 if format == "int4" else 1)


def _packed_embedding(
    weight: Tensor, scale: Tensor, zero: Tensor | None, indices: Tensor, *, format: str, group_size: int
) -> Tensor:
    """Rows [..., K] of a packed weight that `fused_linear` takes in the same form, in scale's type.

    Args:
        indices: int64 [...]. format: "int8" or "int4". The others as `fused_linear` has them.
    """
    rows = indices.flatten()
    points = None if zero is None else zero[rows]
    values = dequantize_packed(
        weight[rows], scale[rows], points, format=format, group_size=group_size, dtype=scale.dtype
    )
    return values.reshape(*indices.shape, values.shape[1])


def _packed_embedding_fake(
    weight: Tensor, scale: Tensor, _zero: Tensor | None, indices: Tensor, *, format: str, **_: object
) -> Tensor:
    return scale.new_empty((*indices.shape, packed_columns(weight, format)))


define(
    "packed_embedding(Tensor weight, Tensor scale, Tensor? zero, Tensor indices, *, str format, int group_size) -> Tensor",
    _packed_embedding,
    _packed_embedding_fake,
    aten=_packed_embedding,
)
