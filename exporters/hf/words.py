"""Codes of a few bits into 32-bit words without gaps, lowest bits first; see `optc.compiler.formats.layouts.words`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_ROWS = 256  # rows packed together: a byte per bit is held for them


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [R, E] below 2^bits -> int32 words [R, ceil(E * bits / 32)]; what follows the last code is zero."""
    assert codes.dtype == torch.uint8
    words = -(-codes.shape[1] * bits // 32)
    out = np.zeros((codes.shape[0], words * 4), dtype=np.uint8)
    for start in range(0, codes.shape[0], _ROWS):
        block = codes[start : start + _ROWS].contiguous().numpy()
        assert int(block.max(initial=0)) < 2**bits, "a code does not fit its bits"
        each = np.unpackbits(block[..., None], axis=-1, bitorder="little", count=bits)
        packed = np.packbits(each.reshape(len(block), -1), axis=-1, bitorder="little")
        out[start : start + _ROWS, : packed.shape[1]] = packed
    return torch.from_numpy(out.view("<i4").astype(np.int32, copy=False))
