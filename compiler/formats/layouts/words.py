"""Codes of a few bits, packed without gaps into 32-bit words, lowest bits first.

Element i of a row takes bits [i * bits, (i + 1) * bits) of the row's words; with 3 bits, elements 10 and 21 of
every 32 lie across two words. compressed-tensors (`pack_to_int32`) and GPTQ (AutoGPTQ's `pack`) share this order.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_WORD = 32
_ROWS = 256  # rows packed together: a byte per bit is held for them


def word_count(elements: int, bits: int) -> int:
    """Words that a row of `elements` takes."""
    return -(-elements * bits // _WORD)


def unpack_words(words: Tensor, bits: int, elements: int) -> Tensor:
    """int32 words [R, W] -> uint8 codes [R, elements]; what follows the last element is dropped."""
    assert words.dtype == torch.int32
    assert words.shape[1] == word_count(elements, bits)
    first = torch.arange(elements) * bits
    word, offset = first // _WORD, first % _WORD
    low = words[:, word] >> offset.to(torch.int32)  # an arithmetic shift: the bits that come in are cut off below
    across = offset + bits > _WORD
    low = low & torch.where(across, (1 << (_WORD - offset).clamp(max=bits)) - 1, (1 << bits) - 1).to(torch.int32)
    if bool(across.any()):
        missing = (_WORD - offset[across]).to(torch.int32)
        high = words[:, word[across] + 1] << missing
        low[:, across] |= high & ((1 << bits) - 1)
    return low.to(torch.uint8)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [R, E] below 2^bits -> int32 words [R, ceil(E * bits / 32)]; what follows the last code is zero."""
    assert codes.dtype == torch.uint8
    words = word_count(codes.shape[1], bits)
    out = np.zeros((codes.shape[0], words * 4), dtype=np.uint8)
    for start in range(0, codes.shape[0], _ROWS):
        block = codes[start : start + _ROWS].contiguous().numpy()
        assert int(block.max(initial=0)) < 2**bits, "a code does not fit its bits"
        each = np.unpackbits(block[..., None], axis=-1, bitorder="little", count=bits)
        packed = np.packbits(each.reshape(len(block), -1), axis=-1, bitorder="little")
        out[start : start + _ROWS, : packed.shape[1]] = packed
    return torch.from_numpy(out.view("<i4").astype(np.int32, copy=False))
