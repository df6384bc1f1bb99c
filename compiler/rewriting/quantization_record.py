"""What a quantization pass says about each weight that it rounded."""

from __future__ import annotations

import msgspec


class LinearRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One rounded weight.

    Attributes:
        name: of the weight; shape: (N, K).
        error_rtn, error: ||(W - Q) X||^2 / ||W X||^2 over the calibration inputs X, of plain rounding to nearest
            and of what was written, over at most 512 of the N outputs; None without calibration.
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
