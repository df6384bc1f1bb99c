"""Packed products of 8-bit integers and of NF4 codes, as ONNX Runtime's CPU kernels take them.

`dequantize_linear` mirrors DequantizeLinear-24, blocked along K or one scale per channel, with the weight stored
[K,N] as a matrix product reads it. `quantize_tokens` and `matmul_integer` stand for QuantizeLinear and
com.microsoft.MatMulIntegerToFloat around a scale per token; `dequantize_channels` mirrors DequantizeLinear of a weight of
any shape with a scale per channel, in front of a Conv or MatMul that ONNX Runtime takes in integers; `matmul_bnb4`
mirrors com.microsoft.MatMulBnb4. Made by legalization only. See
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optc.compiler.ops.dialect.quantization import SMALLEST_SCALE
from optc.compiler.ops.library import define
from optc.compiler.ops.packed.onnxruntime import unpack_nbits

MIDDLE = 128
"""The unsigned code of zero."""


def _quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x float32 [...,K] -> codes uint8 [...,K], scale float32 [...,1]; `quantize_dynamic` of int8, plus 128."""
    scale = (x.abs().amax(-1, keepdim=True) / 127.0).clamp(min=SMALLEST_SCALE)
    return (x / scale).round().add(MIDDLE).to(torch.uint8).contiguous(), scale.contiguous()


def _matmul_integer(codes: Tensor, weight: Tensor, scale: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """((codes - 128) @ weight) * weight_scale * scale + bias, in float32.

    Args:
        codes: uint8 [...,K]. weight: [K,N], int8, or uint8 with 128 for zero.
        scale: [...,1], of each token. weight_scale: [N]. bias: [N].
    """
    matrix = weight.float() - (MIDDLE if weight.dtype is torch.uint8 else 0)
    sums = torch.matmul(codes.float() - MIDDLE, matrix)  # float32 may round sums of more than 1024 terms
    out = sums * weight_scale * scale
    return out if bias is None else out + bias


def pack_bnb4(codes: Tensor) -> Tensor:
    """codes uint8 [N,K] below 16 -> uint8 [N*K/2], the first of two codes in the high bits (K even)."""
    pairs = codes.reshape(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1]


def _matmul_bnb4(
    x: Tensor, packed: Tensor, absmax: Tensor, table: Tensor, *, K: int, N: int, block_size: int
) -> Tensor:
    """x [...,K] times the weight [N,K] whose values are table[code] * absmax of their block.

    Args:
        packed: uint8 [N*K/2]. absmax: [N*K/block_size]. table: float32 [16]; the kernel has it built in.
    """
    low_first = unpack_nbits(packed, 4, 2 * packed.shape[0]).reshape(-1, 2)
    codes = low_first.flip(-1).reshape(N, K)
    weight = torch.ops.optc.dequantize_codebook(codes, absmax.reshape(N, -1), table, bits=4, group_size=block_size)
    return torch.nn.functional.linear(x, weight)


def _dequantize_linear(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    *,
    K: int,
    N: int,
    bits: int,
    signed: bool,
    block_size: int,
) -> Tensor:
    """The weight [K,N] of codes: int4 or uint4, two per byte in row-major order, low bits first; int8 or uint8.

    Args:
        codes: uint8 [K*N/2] of 4 bits; int8 or uint8 [K,N] of 8. scale: [K/block_size, N], or [N] for block_size 0.
        zero: in the type of the codes, [K/block_size * N / 2] or [K/block_size, N]; None is 0.
    """

    def values(tensor: Tensor, rows: int) -> Tensor:
        if bits == 8:
            return tensor.float().reshape(rows, N)
        plain = unpack_nbits(tensor, 4, rows * N).float().reshape(rows, N)
        return torch.where(plain > 7, plain - 16, plain) if signed else plain

    blocks = K // block_size if block_size else 1
    offset = 0.0 if zero is None else values(zero, blocks)[:, None]
    grouped = values(codes, K).reshape(blocks, K // blocks, N)
    return ((grouped - offset) * scale.float().reshape(blocks, 1, N)).reshape(K, N).to(scale.dtype)


define(
    "dequantize_linear(Tensor codes, Tensor scale, Tensor? zero, *, int K, int N, int bits, bool signed, "
    "int block_size) -> Tensor",
    _dequantize_linear,
    lambda codes, scale, *_, K, N, **__: scale.new_empty((K, N)),
)


def _dequantize_channels(codes: Tensor, scale: Tensor, *, axis: int) -> Tensor:
    """codes int8, scale [N] of the channels along `axis` -> codes * scale, in scale's dtype."""
    return codes.to(scale.dtype) * scale.reshape([-1 if place == axis else 1 for place in range(codes.dim())])


define(
    "dequantize_channels(Tensor codes, Tensor scale, *, int axis) -> Tensor",
    _dequantize_channels,
    lambda codes, scale, **_: scale.new_empty(codes.shape),
)
define(
    "quantize_tokens(Tensor x) -> (Tensor, Tensor)",
    _quantize_tokens,
    lambda x: (
        torch.empty_like(x, dtype=torch.uint8, memory_format=torch.contiguous_format),
        x.new_empty((*x.shape[:-1], 1)),
    ),
    activation_codes=lambda _: "int8",
)
define(
    "matmul_integer(Tensor codes, Tensor weight, Tensor scale, Tensor weight_scale, Tensor? bias) -> Tensor",
    _matmul_integer,
    lambda codes, weight, scale, *_: scale.new_empty((*codes.shape[:-1], weight.shape[1])),
)
define(
    "matmul_bnb4(Tensor x, Tensor packed, Tensor absmax, Tensor table, *, int K, int N, int block_size) -> Tensor",
    _matmul_bnb4,
    lambda x, *_, N, **__: x.new_empty((*x.shape[:-1], N)),
)
