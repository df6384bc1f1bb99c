"""What a decoder that reads an encoder is fed, call by call: its answer, its own caches, and what it reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from optc.compiler.ir.contract import CACHE_ROLES
from optc.compiler.ir.cross_inputs import cross_inputs, empty_cache, shape_of
from optc.compiler.ir.program import Program

CHUNK, STEPS = 4, 3

Cross = Sequence[Sequence[Tensor]]
"""For each row, keys and values [H, T, D] in the order of the contract's inputs."""


def calls_of(length: int, chunk: int = CHUNK, steps: int = STEPS) -> Iterator[tuple[int, int]]:
    """(start, end) of the tokens that each call gets: a first call, one of several tokens on a cache, single tokens."""
    sizes = [chunk, *[1] * steps]
    while sizes and sum(sizes) >= length:
        sizes.pop(0)
    start = 0
    for size in (length - sum(sizes), *sizes):
        if size > 0:
            yield start, start + size
            start += size


def empty_caches(program: Program, batch: int, device: torch.device) -> list[Tensor]:
    """The decoder's own caches before the first token: [B, H, 0, D]."""
    return [empty_cache(spec, batch).to(device) for spec in program.contract.inputs if spec.role in CACHE_ROLES]


def random_cross(program: Program, batch: int) -> list[list[Tensor]]:
    """Keys and values of sources of unequal lengths, for each row the same in whatever batch it is."""
    found = []
    for row in range(batch):
        generator = torch.Generator().manual_seed(row)
        sizes = {"source": 5 + 2 * row}
        found.append(
            [
                torch.randn(shape_of(spec, sizes)[1:], generator=generator).to(getattr(torch, spec.dtype))
                for spec in cross_inputs(program.contract)
            ]
        )
    return found


def padded_cross(program: Program, cross: Cross, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """(the encoder's mask [B, T], where the decoder takes one; keys and values [B, H, T, D]), padded with zeros."""
    lengths = [row[0].shape[1] for row in cross]
    longest = max(lengths)
    tensors = []
    for index, spec in enumerate(cross_inputs(program.contract)):
        rows = [row[index] for row in cross]
        padded = [torch.nn.functional.pad(row, (0, 0, 0, longest - row.shape[1])) for row in rows]
        tensors.append(torch.stack(padded).to(device=device, dtype=getattr(torch, spec.dtype)))
    if program.contract.input_index("encoder_mask") is None:
        return [], tensors
    counts = torch.tensor(lengths, device=device)[:, None]
    return [(torch.arange(longest, device=device) < counts).long()], tensors
