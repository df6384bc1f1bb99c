"""What a quantization pass says about each weight that it rounded."""

from __future__ import annotations

import math

import msgspec
import torch
from torch import Tensor


class LinearRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One rounded weight.

    Attributes:
        name: of the weight; shape: (N, K).
        error_rtn, error: ||(W - Q) X||^2 / ||W X||^2 over the calibration inputs X, of plain rounding to nearest
            and of what was written; None without calibration.
        weight_error: ||W - Q||^2 / ||W||^2.
        scale_min, scale_max: range of the scales.
        clip: mean share of the full range that the grid covers; 1 is no clipping.
        damping: what GPTQ added to the Hessian's diagonal, as a share of its mean; None for other methods.
        tokens: calibration rows that reached the weight.
        seconds: time spent on it.
    """

    name: str
    shape: tuple[int, int]
    method: str
    format: str = "int"
    bits: int
    group_size: int
    symmetric: bool
    weight_error: float
    scale_min: float
    scale_max: float
    error_rtn: float | None = None
    error: float | None = None
    clip: float = 1.0
    damping: float | None = None
    tokens: int = 0
    seconds: float = 0.0
    note: str = ""


def _finite(value: float | None) -> float | None:
    """None for what JSON cannot hold; a manifest with NaN in it could not be read back."""
    return value if value is not None and math.isfinite(value) else None


def linear_record(
    name: str, weight: Tensor, values: Tensor, scale: Tensor, *, method: str, bits: int, group_size: int,
    symmetric: bool, format: str = "int", error_rtn: float | None = None, error: float | None = None,
    clip: float = 1.0, damping: float | None = None, tokens: int = 0, seconds: float = 0.0, note: str = "",
) -> LinearRecord:  # fmt: skip
    """A record with what can be computed from the tensors.

    Args:
        weight, values: [N, K], before and after rounding.
        scale: [N, G].
    """
    before = weight.detach().float()
    size = float(before.norm(dtype=torch.float64)) ** 2
    gap = float((before - values.detach().float()).norm(dtype=torch.float64)) ** 2
    return LinearRecord(
        name=name, shape=(int(weight.shape[0]), int(weight.shape[1])), method=method, format=format, bits=bits,
        group_size=group_size, symmetric=symmetric, weight_error=gap / size if size else 0.0,
        scale_min=float(scale.min()), scale_max=float(scale.max()), error_rtn=_finite(error_rtn), error=_finite(error), clip=clip,
        damping=damping, tokens=tokens, seconds=round(seconds, 3), note=note,
    )  # fmt: skip
