"""Codes of a few bits, packed without gaps into 32-bit words, lowest bits first.

Element i of a row takes bits [i * bits, (i + 1) * bits) of the row's words; with 3 bits, elements 10 and 21 of
every 32 lie across two words. compressed-tensors (`pack_to_int32`) and GPTQ (AutoGPTQ's `pack`) share this order. Words
are bytes with the lowest first, so that codes which divide a byte are packed as those of ONNX Runtime are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optc.compiler.ir.lazy_operators import pieces
from optc.compiler.ops.packed.onnxruntime import pack_nbits, unpack_nbits

_WORD = 32
_CODES = 1 << 19
"""Codes that are packed together: they, and what is made of them on the way, fit a cache."""
_CODES_ELSEWHERE = 1 << 26
"""The same on a device, where a call costs more than what it leaves in a cache."""


def word_count(elements: int, bits: int) -> int:
    """Words that a row of `elements` takes."""
    return -(-elements * bits // _WORD)


def _together(tensor: Tensor) -> int:
    return _CODES if tensor.device.type == "cpu" else _CODES_ELSEWHERE


def unpack_words(words: Tensor, bits: int, elements: int) -> Tensor:
    """int32 words [R, W] -> uint8 codes [R, elements]; what follows the last element is dropped."""
    assert words.dtype == torch.int32
    assert words.shape[1] == word_count(elements, bits)
    unpack = unpack_nbits if 8 % bits == 0 else _unpacked_eights
    out, start = torch.empty((words.shape[0], elements), dtype=torch.uint8, device=words.device), 0
    for block in pieces(words, _together(words) * bits // 8):
        packed = block.reshape(-1).view(torch.uint8).view(len(block), -1)  # an axis of one element may have any stride
        out[start : start + len(block)] = unpack(packed, bits, elements)
        start += len(block)
    return out


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [R, E] below 2^bits -> int32 words [R, ceil(E * bits / 32)]; what follows the last code is zero."""
    assert codes.dtype == torch.uint8
    pack = pack_nbits if 8 % bits == 0 else _packed_eights
    shape = codes.shape[0], word_count(codes.shape[1], bits)
    out, start = torch.zeros(shape, dtype=torch.int32, device=codes.device), 0
    into = out.view(torch.uint8)
    for block in pieces(codes, _together(codes)):
        assert int(block.max()) < 2**bits, "a code does not fit its bits"
        packed = pack(block, bits)[:, : into.shape[1]]
        into[start : start + len(block), : packed.shape[1]] = packed
        start += len(block)
    return out


def _unpacked_eights(packed: Tensor, bits: int, elements: int) -> Tensor:
    """The codes in the bytes [R, B] of a row, whatever they take: every 8 are `bits` bytes, spread over a number of 64 bits."""
    whole = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits)).unflatten(1, (-1, bits))
    wide = torch.nn.functional.pad(whole, (0, 8 - bits)).reshape(-1).view(torch.int64).view(len(packed), -1)
    spread = torch.zeros_like(wide)
    for place in range(8):
        spread |= (wide << ((8 - bits) * place)) & ((2**bits - 1) << (8 * place))
    return spread.view(torch.uint8)[:, :elements]


def _packed_eights(codes: Tensor, bits: int) -> Tensor:
    """The bytes of such codes [R, E], the reverse; what follows the last code is zero."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8))
    wide = padded.reshape(-1).view(torch.int64).view(len(codes), -1)
    packed = torch.zeros_like(wide)
    for place in range(8):
        packed |= (wide >> ((8 - bits) * place)) & ((2**bits - 1) << (bits * place))
    return packed.view(torch.uint8).unflatten(1, (-1, 8))[..., :bits].flatten(1)
