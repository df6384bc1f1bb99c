"""The canonical forms of quantization: linear(x, dequantize(codes, scale, zero)) and its kin.

Weights. Codes are stored one per byte, [N, K]; packing belongs to legalization and exporters. A group is
`group_size` neighbours along K that share a scale; `group_size` 0 means one group per row.

    dequantize            uint8 codes    value = (code - zero) * scale, an absent zero is the middle code 2^(bits-1)
    dequantize_float      float8 E4M3    value = code * scale
    dequantize_codebook   uint8 codes    value = table[code] * scale

Activations. `quantize_dynamic` takes its scales from the values at hand, one per token (per row of the last
axis), or in the format fp8-128 one for each 128 neighbours of a token; `quantize` takes calibrated ones. All are
symmetric; `dequantize_activation` brings the numbers back:

    linear(dequantize_activation(*quantize_dynamic(x, "int8")), dequantize(codes, scale, None), bias)      W8A8

Static 8 bits, for convolutions and linears in integers. A tensor has one scale (a number of float32) and one zero point,
both written in the graph:

    quantize_tensor      uint8 codes = round(x / scale) + zero, clipped      dequantize_tensor: (code - zero) * scale
    dequantize_bias      int32 codes in steps of the product: code * weight_scale * input_scale

FP8 in blocks, as DeepSeek-V3 (https://arxiv.org/abs/2412.19437, section 3.3.2) has it, is `dequantize_float` in groups
of 128 whose scales are alike in each 128 rows, and inputs in fp8-128. E4M3 is that of Micikevicius et al. 2022
(https://arxiv.org/abs/2209.05433): no infinity, largest 448.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optc.compiler.ops.library import define

FORMATS: dict[str, tuple[torch.dtype, float]] = {
    "int8": (torch.int8, 127.0),
    "fp8": (torch.float8_e4m3fn, 448.0),
    "fp8-128": (torch.float8_e4m3fn, 448.0),
}
"""Formats of activations: the type of the codes and the magnitude that scales map the largest value to."""

FP8_BLOCK = 128
"""Rows and columns of a weight that share a scale in FP8 of blocks, and neighbours of a token that do in fp8-128."""
_GROUPS = {"fp8-128": FP8_BLOCK}
"""Neighbours that share a scale, of formats where these are not the whole token."""

SMALLEST_SCALE = torch.finfo(torch.float32).smallest_normal
"""Scales of zero rows: division by it gives zeros, not NaN."""


def _scaled(values: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """values float32 [N,K] * scale [N,G] (or [1,1], one for all), rounded to the type of scale."""
    rows, columns = values.shape
    size = group_size or columns
    grouped = values.reshape(rows, columns // size, size)
    return (grouped * scale.float()[..., None]).view(rows, columns).to(scale.dtype)


def _dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, group_size: int) -> Tensor:
    """codes uint8 [N,K], scale [N,G] in the compute dtype, zero uint8 [N,G] or None -> [N,K] in scale's dtype."""
    rows, columns = codes.shape
    size = group_size or columns
    grouped = codes.reshape(rows, columns // size, size).float()
    middle = float(2 ** (bits - 1)) if zero is None else zero.float()[..., None]
    centred = grouped - middle  # not in place: codes may lie in a file
    return centred.mul_(scale.float()[..., None]).view(rows, columns).to(scale.dtype)


def _dequantize_float(codes: Tensor, scale: Tensor, *, group_size: int = 0) -> Tensor:
    """codes float8 [N,K], scale [N,G], or [1,1] for the whole weight -> [N,K] in scale's dtype."""
    return _scaled(codes.float(), scale, group_size)


def _dequantize_codebook(codes: Tensor, scale: Tensor, table: Tensor, *, bits: int, group_size: int) -> Tensor:
    """codes uint8 [N,K] below 2^bits, scale [N,G], table float32 [2^bits] -> [N,K] in scale's dtype."""
    return _scaled(table.float()[codes.long()], scale, group_size)


def quantize_dynamic(x: Tensor, *, format: str) -> tuple[Tensor, Tensor]:
    """x [...,K] -> codes [...,K], scale float32 [...,G] = max|x| / largest code of each group of a token; G is 1, or
    K / 128 in the format fp8-128."""
    _, top = FORMATS[format]
    values = x.float().unflatten(-1, (-1, _GROUPS.get(format, x.shape[-1])))
    scale = (values.abs().amax(-1) / top).clamp(min=SMALLEST_SCALE)
    codes = (values / scale[..., None]).clamp(-top, top)
    return _rounded(codes.flatten(-2), format), scale.contiguous()


def _quantize(x: Tensor, scale: Tensor, *, format: str) -> Tensor:
    """x, scale that broadcasts to it -> codes of x's shape; what is out of range takes the last code (-128 or 127)."""
    _, top = FORMATS[format]
    low = -128.0 if format == "int8" else -top
    return _rounded((x.float() / scale.float()).clamp(low, top), format)


def _rounded(ratio: Tensor, format: str) -> Tensor:
    """Nearest codes, ties to even."""
    dtype, _ = FORMATS[format]
    return (ratio.round() if dtype is torch.int8 else ratio).to(dtype).contiguous()


def dequantize_activation(codes: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    """codes [...,K] * scale, computed in float32, in `dtype`. The scale broadcasts, or its last axis divides K: one for
    each group of neighbours."""
    groups = scale.shape[-1] if scale.dim() else 1
    if groups in (1, codes.shape[-1]):
        return (codes.float() * scale.float()).to(dtype).contiguous()
    values = codes.float().unflatten(-1, (groups, -1)) * scale.float()[..., None]
    return values.flatten(-2).to(dtype).contiguous()


def _quantize_tensor(x: Tensor, *, scale: float, zero: int) -> Tensor:
    """x -> uint8 codes of x's shape: round(x / scale) + zero, ties to even; what is out of range takes the last code."""
    return ((x.float() / scale).round() + zero).clamp(0, 255).to(torch.uint8).contiguous()


def _dequantize_tensor(codes: Tensor, *, scale: float, zero: int, dtype: torch.dtype) -> Tensor:
    """(codes - zero) * scale, computed in float32, in `dtype`."""
    return ((codes.float() - zero) * scale).to(dtype).contiguous()


def _dequantize_bias(codes: Tensor, scale: Tensor, *, input_scale: float) -> Tensor:
    """codes int32 [N], scale of the weight's rows [N,1] or [N] -> codes * (scale * input_scale), [N] in scale's dtype."""
    return (codes.float() * (scale.float().reshape(-1) * input_scale)).to(scale.dtype)


def _codes_like(x: Tensor, format: str) -> Tensor:
    return torch.empty_like(x, dtype=FORMATS[format][0], memory_format=torch.contiguous_format)


define(
    "dequantize(Tensor codes, Tensor scale, Tensor? zero, *, int bits, int group_size) -> Tensor",
    _dequantize,
    lambda codes, scale, *_, **__: scale.new_empty(codes.shape),
    aten=_dequantize,
    makes_weight=True,
)
define(
    "dequantize_float(Tensor codes, Tensor scale, *, int group_size=0) -> Tensor",
    _dequantize_float,
    lambda codes, scale, **_: scale.new_empty(codes.shape),
    aten=_dequantize_float,
    makes_weight=True,
)
define(
    "dequantize_codebook(Tensor codes, Tensor scale, Tensor table, *, int bits, int group_size) -> Tensor",
    _dequantize_codebook,
    lambda codes, scale, *_, **__: scale.new_empty(codes.shape),
    aten=_dequantize_codebook,
    makes_weight=True,
)
define(
    "quantize_dynamic(Tensor x, *, str format) -> (Tensor, Tensor)",
    quantize_dynamic,
    lambda x, *, format: (
        _codes_like(x, format),
        x.new_empty((*x.shape[:-1], x.shape[-1] // _GROUPS[format] if format in _GROUPS else 1), dtype=torch.float32),
    ),
    aten=quantize_dynamic,
    activation_codes=lambda keywords: str(keywords["format"]),
)
define(
    "quantize(Tensor x, Tensor scale, *, str format) -> Tensor",
    _quantize,
    lambda x, _scale, *, format: _codes_like(x, format),
    aten=_quantize,
    activation_codes=lambda keywords: str(keywords["format"]),
)
define(
    "dequantize_activation(Tensor codes, Tensor scale, *, ScalarType dtype) -> Tensor",
    dequantize_activation,
    lambda codes, _scale, *, dtype: torch.empty_like(codes, dtype=dtype, memory_format=torch.contiguous_format),
    aten=dequantize_activation,
    makes_activation=True,
)
define(
    "quantize_tensor(Tensor x, *, float scale, int zero) -> Tensor",
    _quantize_tensor,
    lambda x, **_: torch.empty_like(x, dtype=torch.uint8, memory_format=torch.contiguous_format),
    aten=_quantize_tensor,
    activation_codes=lambda _: "uint8",
)
define(
    "dequantize_tensor(Tensor codes, *, float scale, int zero, ScalarType dtype) -> Tensor",
    _dequantize_tensor,
    lambda codes, *, dtype, **_: torch.empty_like(codes, dtype=dtype, memory_format=torch.contiguous_format),
    aten=_dequantize_tensor,
    makes_activation=True,
)
define(
    "dequantize_bias(Tensor codes, Tensor scale, *, float input_scale) -> Tensor",
    _dequantize_bias,
    lambda codes, scale, **_: scale.new_empty(codes.shape),
    aten=_dequantize_bias,
)
