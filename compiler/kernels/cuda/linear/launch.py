"""`fused_linear` on CUDA: the kernel for the number of tokens, launched with its tile sizes."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from optc.compiler.kernels.cuda import fused_norm
from optc.compiler.kernels.cuda.dispatch import dependent_launch, is_capturing
from optc.compiler.kernels.cuda.linear.call import BITS, Linear
from optc.compiler.kernels.cuda.linear.configurations import (
    Gemv,
    Product,
    gemv_tiles,
    kind_for,
    product_tiles,
)
from optc.compiler.kernels.cuda.linear.dequantized import dequantized
from optc.compiler.kernels.cuda.linear.finish import finish_rows
from optc.compiler.kernels.cuda.linear.gemv_float import gemv_float
from optc.compiler.kernels.cuda.linear.gemv_integer import gemv_integer
from optc.compiler.kernels.cuda.linear.product_float import product_float
from optc.compiler.kernels.cuda.linear.product_integer import product_integer, split_tokens
from optc.compiler.kernels.cuda.linear.rounded_tokens import multiplies_codes, product_of_codes, rounded
from optc.compiler.kernels.cuda.norm.launch import fused_norm as normalize_rows

STATISTICS_BLOCK = 2048
"""Most columns that a pass for a mean or a variance takes at a time."""
WORDS_PER_WARP = 128
"""Least words of a tile for each warp of gemv_integer: a run of four for each thread."""
ARRIVALS = 1 << 16
"""Blocks of results that programs may share."""
FINISH_BLOCK, FINISH_WARPS = 2048, 8
MOST_TOKENS_PER_BLOCK = 64


def fused_linear(
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
    """The op, for calls that the kernel accepts."""
    columns = x.shape[-1]
    rows = _aligned(x.reshape(-1, columns).contiguous())
    residuals = None if residual is None else residual.reshape(rows.shape[0], -1).contiguous()
    norm_weight, norm_bias = (item if item is None else _aligned(item) for item in (norm_weight, norm_bias))
    linear = Linear(
        rows, _aligned(weight), scale, zero, norm_weight, norm_bias, bias, residuals,
        norm, eps, activation, gated, format, 0 if group_size == columns else group_size, inputs,
    )  # fmt: skip
    kind = kind_for(linear.shape) if rows.shape[0] else None
    if inputs and (kind is not None or not multiplies_codes(linear)):
        linear = rounded(linear)
    if kind == "gemv":
        y = gemv(linear, gemv_tiles(linear.shape))
    elif kind == "product" and product_obstacle(linear, product_tiles(linear.shape)) is None:
        y = product(linear, product_tiles(linear.shape))
    else:
        y = by_cublas(linear)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor at an address that is a multiple of 16 bytes: kernels load as many at a time."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def gemv(linear: Linear, tiles: Gemv) -> Tensor:
    """One program per block of rows and token."""
    shape, y = linear.shape, linear.new_result()
    bits = BITS.get(linear.format)
    tiles = tiles.fitted(shape.k) if bits is None else tiles.fitted(shape.k * bits // 32, WORDS_PER_WARP)
    grid = (shape.m * triton.cdiv(shape.n, tiles.block_n * tiles.steps),)
    ends = (linear.norm_weight, linear.norm_bias, linear.bias, linear.residual, y, shape.m, shape.n, linear.eps)
    common = {
        "K": shape.k, "NORM": linear.norm, "ACTIVATION": linear.activation, "GATED": linear.gated,
        "BLOCK_N": tiles.block_n, "STEPS": tiles.steps, "DEPTH": tiles.depth, "EARLY": tiles.early, **_options(y, tiles.warps),
    }  # fmt: skip
    if bits is None:
        gemv_float[grid](linear.x, linear.weight, linear.scale, *ends, BLOCK_K=tiles.width, **common)
    else:
        gemv_integer[grid](
            linear.x, linear.weight.view(torch.int32), linear.scale, linear.zero, *ends,
            BITS=bits, GROUP=linear.group_size, WORDS=tiles.width, WARPS=tiles.warps, UNROLLED=tiles.unrolled,
            WHOLE=shape.n % (tiles.block_n * tiles.steps) == 0, STATISTICS=min(STATISTICS_BLOCK, triton.next_power_of_2(shape.k)),
            NATIVE=y.is_cuda, **common,
        )  # fmt: skip
    return y


def product_obstacle(linear: Linear, tiles: Product) -> str | None:
    """Why `product` cannot take a weight, or should not, or None."""
    if linear.format not in BITS:
        if not linear.format and linear.x.dtype is torch.float32:
            return "float32 has no tensor cores"
        wanted, most = _pipeline_bytes(linear, tiles), _shared_memory(linear.x.device)
        return f"the tiles take {wanted} bytes of shared memory of {most}" if wanted > most else None
    columns = linear.group_size or 128
    if columns * BITS[linear.format] // 8 < 32:
        return f"groups of {columns} columns are shorter than a step of the tensor cores"
    return f"{linear.x.shape[1]} columns are not a multiple of {columns}" if linear.x.shape[1] % columns else None


def _pipeline_bytes(linear: Linear, tiles: Product) -> int:
    """Shared memory of the steps of a product of floats that are under way."""
    rows = tiles.block_n * (2 if linear.gated else 1) * linear.weight.element_size()
    return tiles.stages * tiles.block_k * (rows + _block_m(linear.shape.m) * linear.x.element_size())


@functools.cache
def _shared_memory(device: torch.device) -> float:
    """Bytes that a program can have; no limit in Triton's interpreter."""
    if device.type != "cuda":
        return math.inf
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)  # type: ignore[attr-defined]


def _block_m(tokens: int) -> int:
    """Tokens of a program of `product`."""
    return min(max(16, triton.next_power_of_2(tokens)), MOST_TOKENS_PER_BLOCK)


def product(linear: Linear, tiles: Product) -> Tensor:
    """On the tensor cores; tokens are normalized (and split in digits, for integers) by a kernel before."""
    shape, y = linear.shape, linear.new_result()
    block_m = _block_m(shape.m)
    blocks = (triton.cdiv(shape.n, tiles.block_n), triton.cdiv(shape.m, block_m))
    grid = (blocks[0], tiles.split, blocks[1])
    partial = arrivals = None
    if tiles.split > 1:
        size = tiles.split * (2 if linear.gated else 1) * shape.m * shape.n
        partial = torch.empty(size, dtype=torch.float32, device=y.device)
        arrivals = _arrivals(y.device)
    common = {
        "K": shape.k, "ACTIVATION": linear.activation, "GATED": linear.gated, "BLOCK_M": block_m,
        "BLOCK_N": tiles.block_n, "SPLIT": tiles.split, "STAGES": tiles.stages, "LINES": tiles.lines,
        **_options(y, tiles.warps),
    }  # fmt: skip
    ends = (linear.bias, linear.residual, y, partial, arrivals, shape.m, shape.n)
    if linear.format in BITS:
        digits, unit, group_sums = _split_tokens(linear)
        product_integer[grid](
            digits, unit, group_sums, linear.weight.view(torch.int8), linear.scale, linear.zero, *ends,
            BITS=BITS[linear.format], GROUP=linear.group_size, JOINED=tiles.joined, NATIVE=y.is_cuda, **common,
        )  # fmt: skip
    else:
        product_float[grid](_normalized(linear), linear.weight, linear.scale, *ends, BLOCK_K=tiles.block_k, **common)
    return y


def _split_tokens(linear: Linear) -> tuple[Tensor, Tensor, Tensor | None]:
    """Digits, units and sums of groups, as `product_integer` takes them."""
    (tokens, columns), bits = linear.x.shape, BITS[linear.format]
    group = linear.group_size or columns
    digits = torch.empty(2 * tokens * columns, dtype=torch.int8, device=linear.x.device)
    unit = torch.empty(tokens, dtype=torch.float32, device=linear.x.device)
    sums = None if linear.zero is None else unit.new_empty((tokens, columns // group))
    block = triton.next_power_of_2(columns)
    split_tokens[(tokens,)](
        linear.x, linear.norm_weight, linear.norm_bias, digits, unit, sums, tokens, linear.eps,
        K=columns, BITS=bits, GROUP=group, NORM=linear.norm, BLOCK_K=block,
        **_options(linear.x, min(16, max(4, block // 256))),
    )  # fmt: skip
    return digits, unit, sums


def by_cublas(linear: Linear) -> Tensor:
    """Leave the product to cuBLAS: of codes where tokens are to be rounded, else of the dequantized weight."""
    if linear.inputs:
        product = product_of_codes(linear)
    else:
        weight = linear.weight if linear.scale is None else dequantize(linear)
        product = F.linear(_normalized(linear), weight, linear.bias)
    if not (linear.gated or linear.activation or linear.residual is not None):
        return product
    shape, y = linear.shape, linear.new_result()
    finish_rows[(shape.m, triton.cdiv(shape.n, FINISH_BLOCK))](
        product, linear.residual, y, shape.n, ACTIVATION=linear.activation, GATED=linear.gated, BLOCK=FINISH_BLOCK,
        **_options(y, FINISH_WARPS),
    )  # fmt: skip
    return y


def dequantize(linear: Linear) -> Tensor:
    """The packed weight [N, K] in the type of the tokens."""
    assert linear.scale is not None
    return dequantized(
        linear.weight,
        linear.scale,
        linear.zero,
        columns=linear.x.shape[1],
        format=linear.format,
        group_size=linear.group_size,
        dtype=linear.x.dtype,
    )


def _normalized(linear: Linear) -> Tensor:
    """Tokens after their norm, in their own type: by the kernel for rows, which takes half the time of torch's."""
    size, given = linear.x.shape[-1:], (linear.x, linear.norm_weight, linear.norm_bias, None)
    if linear.norm and fused_norm.accepts(given, {"norm": linear.norm}) is None:
        return normalize_rows(*given, norm=linear.norm, eps=linear.eps)
    if linear.norm == "rms":
        return F.rms_norm(linear.x, size, linear.norm_weight, linear.eps)
    if linear.norm == "layer":
        return F.layer_norm(linear.x, size, linear.norm_weight, linear.norm_bias, linear.eps)
    return linear.x


def _options(tensor: Tensor, warps: int, registers: int = 0) -> dict[str, Any]:
    """Options of a launch, of as many registers of a thread at most. The interpreter does not know launch_pdl."""
    pdl = dependent_launch(tensor.device)
    limit = {"maxnreg": registers} if registers else {}
    return {"PDL": pdl, "num_warps": warps, **({"launch_pdl": True} if pdl else {}), **limit}


def _arrivals(device: torch.device) -> Tensor:
    """Zeros that programs count in and set back to zero: kernels that share them must not run at the same time.

    So each stream has its own, and so have the graphs of a device, of which one runs at a time.
    """
    if device.type == "cpu":
        return torch.zeros(ARRIVALS, dtype=torch.int32)
    if is_capturing(device):
        return _counters(device, None)
    _counters(device, None)  # made before a capture, which would only record the zeros
    return _counters(device, torch.cuda.current_stream(device).cuda_stream)


@functools.cache
def _counters(device: torch.device, _stream: int | None) -> Tensor:
    return torch.zeros(ARRIVALS, dtype=torch.int32, device=device)
