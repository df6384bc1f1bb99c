"""Blocks of a paged KV pool: who owns which, and which hold a prefix that another request can use.

Paging: Kwon et al. 2023 (PagedAttention, vLLM), https://arxiv.org/abs/2309.06180. Prefix reuse by
hashing full blocks, each chained to the block before it: the idea of vLLM's automatic prefix
caching; SGLang's RadixAttention (Zheng et al. 2023, https://arxiv.org/abs/2312.07104) keeps a tree
instead. Only full blocks are shared, and a shared block is never written. Of a full block whose first tokens alone are those
of a request, the request gets a copy that it goes on in (`fork`).
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from optc.compiler.diagnostics import ResourceError
from optc.compiler.execution.paged_call import lay_out

_LOOKED_AT = 16
"""Blocks with the same beginning that are compared for a copy, those that were filled last."""
_LEAST_SHARE = 4
"""Of a block, one part in so many is worth a copy."""


class Fork(NamedTuple):
    """A block that is to be copied before anything else is written: its number, that of the copy, and how many of its tokens
    count."""

    source: int
    target: int
    tokens: int


class StepInputs(NamedTuple):
    """The tensors of one call of a paged Program, before the pools.

    N new tokens of R requests: input_ids, position_ids, slot_mapping int64 [N]; block_tables int32
    [R, MB]; context_lens int32 [R] (tokens with the new ones); cu_seqlens int32 [R + 1].
    """

    input_ids: Tensor
    position_ids: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    context_lens: Tensor
    cu_seqlens: Tensor


class _Held(NamedTuple):
    """What a findable block holds: the digest of it, and of all before it; its tokens."""

    digest: bytes
    parent: bytes
    tokens: array[int]


@dataclass
class _Request:
    tokens: array[int] = field(default_factory=lambda: array("q"))
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)  # of the full blocks that are computed or found


class BlockManager:
    """Hands out the blocks of a pool of `num_blocks` blocks with `block_size` slots each.

    A request lives through `start` (which may find a cached prefix), any number of `step` and
    `commit`, perhaps `rewind`, and `free`. `commit` says that the pool now holds what `step` laid
    out: only then can other requests reuse it.

    Args:
        order: the block numbers in the order of their first use (default: ascending).
    """

    def __init__(self, num_blocks: int, block_size: int, *, order: Iterable[int] | None = None) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free = deque(range(num_blocks) if order is None else order)
        assert sorted(self._free) == list(range(num_blocks)), "order must name every block once"
        self._cached: OrderedDict[int, None] = OrderedDict()  # without an owner, oldest first
        self._references: dict[int, int] = {}
        self._held: dict[int, _Held] = {}
        self._block_of: dict[bytes, int] = {}
        self._behind: dict[bytes, dict[int, None]] = {}  # findable blocks by what is before them, oldest first
        self._requests: dict[Hashable, _Request] = {}
        self._waste = 0
        self.peak_waste = 0
        self.peak_used_blocks = 0

    # -- the life of a request --------------------------------------------------------------

    def start(self, request: Hashable, tokens: Sequence[int] = ()) -> int:
        """Begin a request and return how many of its `tokens` the pool holds already.

        The rest, tokens[n:], is the caller's to feed through `step`. At least one token is always
        left, for its logits.
        """
        assert request not in self._requests, f"request {request!r} exists"
        state = self._requests[request] = _Request()
        digest = b""
        for end in range(self.block_size, len(tokens), self.block_size):
            content = array("q", tokens[end - self.block_size : end])
            digest = _chain(digest, content)
            block = self._block_of.get(digest)
            if block is None:
                break
            self._acquire(block)
            state.blocks.append(block)
            state.digests.append(digest)
            state.tokens += content
        self._note_peaks()
        return len(state.tokens)

    def fork(self, request: Hashable, tokens: Sequence[int]) -> Fork | None:
        """Let a request that has just been started begin in a copy of a block, if one begins with its next `tokens`.

        The request has these tokens then, one less than all at most. The caller copies the block in all layers, before it
        runs what is laid out from now on, and behind what was laid out before.
        """
        state, size = self._requests[request], self.block_size
        assert len(state.tokens) == len(state.digests) * size
        rest = array("q", tokens[len(state.tokens) : min(len(state.tokens) + size, len(tokens) - 1)])
        behind = self._behind.get(state.digests[-1] if state.digests else b"", {})
        least = least_shared(size)
        if len(rest) < least:
            return None
        begin = rest[:least]
        shared = [
            (_common(rest, self._held[block].tokens), block)
            for block in itertools.islice(reversed(behind), _LOOKED_AT)
            if self._held[block].tokens[:least] == begin  # a loop in C, which most end at their first token
        ]
        if not shared:
            return None
        count, source = max(shared)
        self._acquire(source)
        found = None
        if self.free_blocks:
            self._lengthen(state, 1)
            state.tokens += rest[:count]
            self._waste -= count
            found = Fork(source, state.blocks[-1], count)
        self._release(source)
        self._note_peaks()
        return found

    def step(self, work: Sequence[tuple[Hashable, Sequence[int]]]) -> StepInputs:
        """Reserve slots for new tokens of some requests and return the tensors of the call.

        Raises:
            ResourceError: the pool has too few free blocks; nothing is reserved then.
        """
        assert len({request for request, _ in work}) == len(work), "a request appears once in a step"
        needed = sum(self._missing_blocks(request, len(tokens)) for request, tokens in work)
        self._require(needed)
        for request, tokens in work:
            state = self._requests[request]
            self._lengthen(state, self._missing_blocks(request, len(tokens)))
            state.tokens.extend(tokens)
            self._waste -= len(tokens)
        self._note_peaks()
        return self._tensors(work)

    def reserve(self, work: Sequence[tuple[Hashable, int]]) -> list[Hashable]:
        """Make room for that many more tokens of some requests; returns those that got blocks for it.

        Raises:
            ResourceError: the pool has too few free blocks; nothing is reserved then.
        """
        missing = {request: self._missing_blocks(request, count) for request, count in work}
        self._require(sum(missing.values()))
        for request, count in missing.items():
            self._lengthen(self._requests[request], count)
        self._note_peaks()
        return [request for request, count in missing.items() if count]

    def append(self, request: Hashable, tokens: Sequence[int]) -> None:
        """Note tokens that the caller laid out itself, in room that was reserved."""
        assert not self._missing_blocks(request, len(tokens)), "no room was reserved"
        self._requests[request].tokens.extend(tokens)
        self._waste -= len(tokens)

    def blocks(self, request: Hashable) -> Sequence[int]:
        """The blocks that a request owns, in the order of its tokens."""
        return self._requests[request].blocks

    def commit(self, request: Hashable) -> None:
        """The pool holds every token that was laid out: full blocks may now be shared."""
        state, size = self._requests[request], self.block_size
        for index in range(len(state.digests), len(state.tokens) // size):
            content = state.tokens[index * size : (index + 1) * size]
            parent = state.digests[-1] if state.digests else b""
            digest = _chain(parent, content)
            state.digests.append(digest)
            if digest not in self._block_of:
                block = self._block_of[digest] = state.blocks[index]
                self._held[block] = _Held(digest, parent, content)
                self._behind.setdefault(parent, {})[block] = None

    def rewind(self, request: Hashable, length: int) -> int:
        """Forget the tokens of a request beyond `length`; returns how many are kept.

        When `length` falls inside a block that another request reads, that block cannot be written
        again: the request keeps the tokens before it, fewer than `length`, and the caller feeds the
        others once more.
        """
        state, size = self._requests[request], self.block_size
        assert 0 <= length <= len(state.tokens), f"cannot rewind {len(state.tokens)} tokens to {length}"
        last = length // size
        if length % size and self._references[state.blocks[last]] > 1:
            length = last * size
        elif length % size:
            self._forget(state.blocks[last])
        kept = -(-length // size)
        for block in reversed(state.blocks[kept:]):
            self._release(block)
        self._waste -= self._tail(state) - (kept * size - length)
        del state.blocks[kept:], state.tokens[length:], state.digests[length // size :]
        return length

    def free(self, request: Hashable, *, forget: bool = False) -> None:
        """End a request. Its full blocks stay findable until their space is needed, unless they are to be forgotten."""
        state = self._requests.pop(request)
        self._waste -= self._tail(state)
        for block in reversed(state.blocks):  # so that the tail is evicted first
            if forget:
                self._forget(block)
            self._release(block)

    # -- questions --------------------------------------------------------------------------

    def __contains__(self, request: Hashable) -> bool:
        return request in self._requests

    def tokens(self, request: Hashable) -> Sequence[int]:
        """Tokens of a request that have slots; not to be kept or changed."""
        return self._requests[request].tokens

    def length(self, request: Hashable) -> int:
        """Tokens of a request that have slots."""
        return len(self._requests[request].tokens)

    def slots(self, request: Hashable, start: int = 0) -> list[int]:
        """Slot numbers (block * block_size + offset) of a request's tokens from `start` on."""
        state, size = self._requests[request], self.block_size
        return [state.blocks[i // size] * size + i % size for i in range(start, len(state.tokens))]

    @property
    def used_blocks(self) -> int:
        """Blocks that some request owns."""
        return len(self._references)

    @property
    def free_blocks(self) -> int:
        """Blocks that can be had: never used, or cached without an owner."""
        return len(self._free) + len(self._cached)

    def waste(self) -> int:
        """Allocated slots that hold no token: the tails of the requests' last blocks."""
        return self._waste

    # -- blocks -----------------------------------------------------------------------------

    def _require(self, needed: int) -> None:
        """Raise where fewer blocks than this are free."""
        if needed > self.free_blocks:
            raise ResourceError(
                "the KV pool is out of blocks",
                why=f"{needed} blocks needed, {self.free_blocks} of {self.num_blocks} free",
                remedy="use a larger pool, fewer sequences at a time or shorter prompts",
            )

    def _missing_blocks(self, request: Hashable, new: int) -> int:
        state = self._requests[request]
        return max(0, -(-(len(state.tokens) + new) // self.block_size) - len(state.blocks))

    def _tail(self, state: _Request) -> int:
        return len(state.blocks) * self.block_size - len(state.tokens)

    def _lengthen(self, state: _Request, count: int) -> None:
        state.blocks += [self._take() for _ in range(count)]
        self._waste += count * self.block_size

    def _take(self) -> int:
        """A block to write: a never used one, else the cached one that was left the longest ago."""
        if self._free:
            block = self._free.popleft()
        else:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        self._references[block] = 1
        return block

    def _acquire(self, block: int) -> None:
        self._cached.pop(block, None)
        self._references[block] = self._references.get(block, 0) + 1

    def _release(self, block: int) -> None:
        self._references[block] -= 1
        if self._references[block]:
            return
        del self._references[block]
        if block in self._held:
            self._cached[block] = None
        else:
            self._free.append(block)

    def _forget(self, block: int) -> None:
        """The block will be written: nobody may find its old content."""
        held = self._held.pop(block, None)
        if held is not None:
            del self._block_of[held.digest], self._behind[held.parent][block]
            if not self._behind[held.parent]:
                del self._behind[held.parent]

    def _note_peaks(self) -> None:
        self.peak_waste = max(self.peak_waste, self.waste())
        self.peak_used_blocks = max(self.peak_used_blocks, self.used_blocks)

    def _tensors(self, work: Sequence[tuple[Hashable, Sequence[int]]]) -> StepInputs:
        """Of tokens that the requests have by now."""
        states = [self._requests[request] for request, _ in work]
        counts = np.array([len(tokens) for _, tokens in work], np.int64)
        starts = np.array([len(state.tokens) for state in states], np.int64) - counts
        tables = np.zeros((len(work), max(len(state.blocks) for state in states)), np.int32)
        for row, state in enumerate(states):
            tables[row, : len(state.blocks)] = state.blocks
        ids = np.array([token for _, tokens in work for token in tokens], np.int64)
        return StepInputs(*map(torch.from_numpy, (ids, *lay_out(starts, counts, tables, self.block_size)[1:])))


def least_shared(block_size: int) -> int:
    """So many tokens must two requests begin with, beyond blocks that they share, that the later one may find the keys and
    values of some of them (`fork`)."""
    return -(-block_size // _LEAST_SHARE)


def _chain(parent: bytes, tokens: array[int]) -> bytes:
    """Digest of a full block and all before it; sha256, as prompts can be chosen to collide."""
    return hashlib.sha256(parent + tokens.tobytes()).digest()


def _common(one: array[int], other: array[int]) -> int:
    """Tokens that both begin with."""
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
