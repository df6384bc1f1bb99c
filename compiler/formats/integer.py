"""Round-to-nearest quantization of weights in groups, the arithmetic under every weight-only method.

value = (code - zero) * scale, as `optc.dequantize` computes it; symmetric codes have the middle code
2^(bits-1) as their zero. A group is `group_size` neighbours along K; 0 makes a row one group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from optc.compiler.diagnostics import InputError, UsageError
from optc.compiler.ir.row_blocks import row_blocks

BITS = (2, 3, 4, 8)
DEFAULT_GROUP_SIZES = (128, 64, 32)
GROUP_SIZES = (0, 16, 32, 64, 128, 256)
"""What is proposed in place of a size that does not fit: those that some engine runs. 0 is a row."""


def quantize_groups(
    weight: Tensor, bits: int, group_size: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize a weight [N, K], each group on its own, to the nearest representable value.

    Symmetric: scale = max|w| / (2^(bits-1) - 1), so the lowest code stays unused and -w codes as the mirror
    of w (Jacob et al. 2018, https://arxiv.org/abs/1712.05877, restricted range). Asymmetric: the range
    [min(w, 0), max(w, 0)] over all 2^bits codes, with an integer zero point, so that 0 is exact.
    The scale is rounded to the weight's dtype before the codes are chosen: a weight is then off by at most
    scale / 2. Asymmetric, all steps together may fall short of the range by the rounding of the scale, and a weight at
    an end is off by up to (2^bits - 1) * eps / 2 steps more: 0.12 steps in float16 and 1.0 in bfloat16 at 8 bits;
    by up to half a step where the scale is one of float16's subnormals.

    Args:
        weight: floating [N, K], finite; K a multiple of `group_size`.

    Returns:
        codes uint8 [N, K]; scale [N, G] in the weight's dtype; zero uint8 [N, G], or None when symmetric.
        A group of zeros gets scale 1.

    Raises:
        UsageError: bits other than 2, 3, 4, 8.
        InputError: `weight` is no matrix, is not finite, or the group size does not divide K.
    """
    check_bits(bits)
    if weight.dim() != 2:
        raise InputError(f"only matrices are quantized, this has {weight.dim()} axes", remedy="leave it out")
    check_group_size(group_size, [weight.shape[1]])
    weight = weight.detach()
    blocks = row_blocks(*weight.shape) if weight.device.type == "cpu" else []
    if len(blocks) < 2:
        return _quantized(weight, bits, group_size, symmetric)
    found = [_quantized(weight[begin:end], bits, group_size, symmetric) for begin, end in blocks]
    codes, scales, zeros = zip(*found, strict=True)
    return torch.cat(codes), torch.cat(scales), None if symmetric else torch.cat(zeros)


def _quantized(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    rows, columns = weight.shape
    groups = weight.reshape(rows, -1, group_size or columns).float()
    low, high = torch.aminmax(groups, dim=-1)
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise InputError("the weight holds NaN or infinity", remedy="repair the checkpoint")
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale = _stored_scale(torch.maximum(high, -low) / top, top, weight.dtype)
        codes = _ratio(groups, scale).clamp_(-top, top).add_(2 ** (bits - 1))
        zero = None
    else:
        top = 2**bits - 1
        low, high = low.clamp(max=0), high.clamp(min=0)
        # Divided before subtracting: high - low may exceed the largest float.
        scale = _stored_scale(high / top - low / top, top, weight.dtype)
        offset = torch.round(-low / scale.float()).clamp_(0, top)
        codes = _ratio(groups, scale).add_(offset[..., None]).clamp_(0, top)
        zero = offset.to(torch.uint8)
    return codes.reshape(rows, columns).to(torch.uint8), scale, zero


def _ratio(groups: Tensor, scale: Tensor) -> Tensor:
    return (groups / scale.float()[..., None]).round_()


def _stored_scale(scale: Tensor, top: int, dtype: torch.dtype) -> Tensor:
    """Scales as they are kept: in `dtype` and never zero; a group of zeros gets 1, a tiny one the least.

    A scale among float16's subnormals (weights of 0.01 at 8 bits) may be rounded down so far that `top`
    steps fall short of the group's range by more than half a step: it goes up instead.
    """
    facts = torch.finfo(dtype)
    spacing = facts.smallest_normal * facts.eps
    least = max(spacing, torch.finfo(torch.float32).smallest_normal)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale.clamp(min=least))
    stored = scale.to(dtype)
    short = stored.float() * (1 + 0.5 / top) < scale
    return torch.where(short, stored + spacing, stored)


def check_bits(bits: int) -> None:
    """Refuse bit widths that the canonical form does not know.

    Raises:
        UsageError: not 2, 3, 4 or 8.
    """
    if bits not in BITS:
        raise UsageError(f"{bits}-bit weights are not supported", remedy="choose 2, 3, 4 or 8 bits")


def check_group_size(
    group_size: int, columns: Sequence[int], names: Sequence[str] = (), *, sizes: Sequence[int] = GROUP_SIZES
) -> None:
    """Refuse a group size that does not divide every K; 0 (one group per row) always does.

    Args:
        columns: K of each weight.
        names: the weights' names, for the message.
        sizes: what may be chosen instead: the group sizes of the target.

    Raises:
        InputError: names the first weight that it does not divide, its K, and the nearest of `sizes` that fits all.
    """
    if group_size < 0:
        raise InputError(f"group size {group_size} is negative", remedy="use 0 for one group per row")
    odd = next((i for i, size in enumerate(columns) if group_size and size % group_size), None)
    if odd is None:
        return
    raise InputError(
        f"group size {group_size} does not divide every weight",
        where=names[odd] if names else None,
        why=f"it has K = {columns[odd]}",
        remedy=_other_size(group_size, columns, sizes),
    )


def default_group_size(columns: Sequence[int], names: Sequence[str] = (), *, sizes: Sequence[int] = GROUP_SIZES) -> int:
    """The largest of 128, 64 and 32 that divides every K; arguments as `check_group_size` has them.

    Raises:
        InputError: none does; names the first weight in the way.
    """
    for size in DEFAULT_GROUP_SIZES:
        if all(count % size == 0 for count in columns):
            return size
    odd = next((i for i, count in enumerate(columns) if count % DEFAULT_GROUP_SIZES[-1]), 0)
    raise InputError(
        "none of the group sizes 128, 64 and 32 divides every weight",
        where=names[odd] if names else None,
        why=f"it has K = {columns[odd]}",
        remedy=_other_size(DEFAULT_GROUP_SIZES[-1], columns, sizes),
    )


def _other_size(group_size: int, columns: Sequence[int], sizes: Sequence[int]) -> str:
    """What to do about a group size: the nearest of `sizes` that divides every K, else whole rows, else neither."""
    found = [size for size in sizes if size and all(count % size == 0 for count in columns)]
    if found:
        near = min(found, key=lambda size: (abs(math.log2(size / group_size)), -size))
        return f"use {near}, the nearest that divides every weight, or ignore this weight"
    return "use 0, one group per row, or ignore this weight" if 0 in sizes else "ignore this weight"
