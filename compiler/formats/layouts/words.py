"""Codes of a few bits, packed without gaps into 32-bit words, lowest bits first.

Element i of a row takes bits [i * bits, (i + 1) * bits) of the row's words; with 3 bits, elements 10 and 21 of
every 32 lie across two words. compressed-tensors (`pack_to_int32`) and GPTQ (AutoGPTQ's `pack`) share this order.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 32


def word_count(elements: int, bits: int) -> int:
    """Words that a row of `elements` takes."""
    return -(-elements * bits // _WORD)


def unpack_words(words: Tensor, bits: int, elements: int) -> Tensor:
    """int32 words [R, W] -> uint8 codes [R, elements]; what follows the last element is dropped."""
    assert words.dtype == torch.int32
    assert words.shape[1] == word_count(elements, bits)
    first = torch.arange(elements) * bits
    word, offset = first // _WORD, first % _WORD
    low = words[:, word] >> offset.to(
        torch.int32
    )  # an arithmetic shift: the bits that come in are cut off below
    across = offset + bits > _WORD
    low = low & torch.where(across, (1 << (_WORD - offset).clamp(max=bits)) - 1, (1 << bits) - 1).to(
        torch.int32
    )
    if bool(across.any()):
        missing = (_WORD - offset[across]).to(torch.int32)
        high = words[:, word[across] + 1] << missing
        low[:, across] |= high & ((1 << bits) - 1)
    return low.to(torch.uint8)
