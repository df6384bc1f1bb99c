"""Round-to-nearest quantization of weights in groups, the arithmetic under every weight-only method.

value = (code - zero) * scale, as `optc.dequantize` computes it; symmetric codes have the middle code
2^(bits-1) as their zero. A group is `group_size` neighbours along K; 0 makes a row one group.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from optc.compiler.diagnostics import InputError
from optc.compiler.formats.group_sizes import check_bits, check_group_size
from optc.compiler.ir.row_blocks import row_blocks


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


def are_finite(*tensors: Tensor) -> bool:
    """Whether all numbers are finite; tensors without data, of which only shapes are asked, count as such."""
    return all(isinstance(item, FakeTensor) or bool(torch.isfinite(item).all()) for item in tensors)


def check_finite_weight(*tensors: Tensor, where: str | None = None) -> None:
    """Refuse a weight, or what was computed of one, that is not finite.

    Args:
        tensors: of the weight; its smallest and largest element (`aminmax`) say as much as all of them.

    Raises:
        InputError: NaN or infinity; names `where`.
    """
    if not are_finite(*tensors):
        raise InputError("the weight holds NaN or infinity", where=where, remedy="repair the checkpoint")


def _quantized(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    rows, columns = weight.shape
    groups = weight.reshape(rows, -1, group_size or columns).float()
    low, high = torch.aminmax(groups, dim=-1)
    check_finite_weight(low, high)
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
