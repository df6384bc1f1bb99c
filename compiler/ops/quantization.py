"""The canonical form of weight quantization: linear(x, dequantize(codes, scale, zero)).

Codes are stored one per byte (uint8 [N, K]); packing belongs to legalization and exporters. A group
is `group_size` neighbours along K; `group_size` 0 means one group per row.
value = (code - zero) * scale, where an absent zero means the middle code 2^(bits-1) (symmetric).
"""

from __future__ import annotations

from torch import Tensor

from optc.compiler.ops.library import define


def _dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, group_size: int) -> Tensor:
    """codes uint8 [N,K], scale [N,G] in the compute dtype, zero uint8 [N,G] or None -> [N,K] in scale's dtype."""
    rows, columns = codes.shape
    size = group_size or columns
    grouped = codes.reshape(rows, columns // size, size).float()
    middle = float(2 ** (bits - 1)) if zero is None else zero.float()[..., None]
    return ((grouped - middle) * scale.float()[..., None]).reshape(rows, columns).to(scale.dtype)


define(
    "dequantize(Tensor codes, Tensor scale, Tensor? zero, *, int bits, int group_size) -> Tensor",
    _dequantize,
    lambda codes, scale, *_, **__: scale.new_empty(codes.shape),
)
