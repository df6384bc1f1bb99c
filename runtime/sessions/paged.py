"""Sessions over paged graphs: rows are requests of a block manager, packed end to end into one call."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from optc.compiler.execution.block_manager import BlockManager, StepInputs
from optc.compiler.ir.contract import Contract, Input, OutputRole
from optc.compiler.ir.draft_tree import DraftTree
from optc.compiler.kernels.cuda.dispatch import kernels_only
from optc.compiler.ops.dialect.paged_tree import CAUSAL
from optc.compiler.settings.fields import check_range
from optc.runtime.bounds import Count
from optc.runtime.sessions.cuda_graphs import Recorder
from optc.runtime.sessions.feeding import feed, feed_once
from optc.runtime.sessions.session import UNKNOWN_CONTEXT, Logits, Rows, Session
from optc.runtime.sessions.torch_linear import CPU, Run, cache_inputs, to_logits, torch_zeros

_DEFAULT_CONTEXTS = 8
_DEFAULT_POOL_BYTES = 4 << 30
PREFILL_CHUNK = 4096


@dataclass(frozen=True)
class PoolUse:
    """How well the KV pool is used. A slot is room for one token in every layer.

    Attributes:
        peak_waste: most slots at any time that were in a row's blocks but held no token.
        peak_used_blocks: most blocks that rows owned at any time.
        reused_tokens: prompt tokens that were found in the pool and not computed again.
    """

    block_size: int
    num_blocks: int
    peak_used_blocks: int
    peak_waste: int
    reused_tokens: int


@dataclass(frozen=True, kw_only=True)
class PagedModel:
    """A paged program with its pools, as those need it who lay out calls themselves.

    Attributes:
        run: the program.
        pools: keys and values of each layer, in turn.
        selects: it takes `logits_indices`, and gives logits of these tokens only.
        chunk: most tokens of a call.
        gives: roles of its outputs behind the logits.
        heads: tokens that it guesses itself behind the next one.
        takes_trees: its new tokens may be a tree; see `call`. tree: the one of its guesses.
        step: the program where the logits of all tokens are wanted, in their order; None: `run` is called.
        record: what records steps and calls of up to `prompt_tokens` tokens; None where they run as they are.
        on_device: tokens are chosen on the device, and steps follow each other there.
    """

    run: Run
    pools: Sequence[torch.Tensor]
    selects: bool
    vocab_size: int
    context_length: int
    block_size: int
    num_blocks: int
    chunk: int
    device: torch.device
    gives: tuple[OutputRole, ...] = ()
    heads: int = 0
    takes_trees: bool = False
    tree: DraftTree | None = None
    step: Run | None = None
    record: Recorder | None = None
    prompt_tokens: int = 0
    on_device: bool = False

    def call(
        self, inputs: Sequence[torch.Tensor], wanted: torch.Tensor, tree: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[OutputRole, torch.Tensor]]:
        """Run a call that was laid out (`paged_call.lay_out`): for engines, sessions and models that draft alike.

        Args:
            inputs: in the order of `StepInputs`, of N tokens. wanted: int64 [W], some of their places, ascending.
            tree: int64 [N], which tokens each one sees, see `paged_tree_attention_`; None: all before it.

        Returns:
            Logits [W, V] of the tokens that are wanted, and the other outputs by role: of a program that selects rows, of
            these tokens or of all, as the program has them; else of all tokens.
        """
        given = [*inputs]
        if self.takes_trees:
            given.append(torch.full_like(inputs[0], CAUSAL) if tree is None else tree)
        given += [wanted] if self.selects else []
        with torch.inference_mode(), kernels_only() if self.on_device else contextlib.nullcontext():
            logits, others = self.parts(self.run(*(item.to(self.device) for item in given), *self.pools))
            if not self.selects and len(wanted) < len(logits):
                logits = logits.index_select(0, wanted.to(logits.device))
        return logits, others

    def parts(self, outputs: Any) -> tuple[torch.Tensor, dict[OutputRole, torch.Tensor]]:
        """What `run` or `step` gave: logits, and the other outputs by role."""
        logits, *others = outputs if isinstance(outputs, tuple | list) else (outputs,)
        return logits, dict(zip(self.gives, others, strict=True))


class PagedSession(Session):
    """A session over a paged graph.

    Prompts that begin with full blocks the pool still holds, from this batch or an earlier one, are
    computed from there on.

    Args:
        run: the graph; it writes the pools in place.
        contract: its contract, of kv_cache kind "paged".
        device: where the graph runs.
        num_blocks: size of the pools; by default enough for 8 rows of full context, within 4 GiB.
            Memory is taken as blocks are first used.

    Raises:
        UsageError: `num_blocks` below 1.
    """

    def __init__(
        self,
        run: Run,
        contract: Contract,
        *,
        num_blocks: int | None = None,
        device: torch.device = CPU,
    ) -> None:
        assert contract.kv_cache.kind == "paged"
        super().__init__(vocab_size=contract.model.vocab_size, context_length=contract.model.context_length)
        size = contract.kv_cache.block_size
        if num_blocks is not None:
            check_range("num-blocks", num_blocks, Count)
        pools = cache_inputs(contract)
        count = num_blocks or default_blocks(contract)
        self._graph, self._device = run, device
        self._pools = [torch_zeros(_shape(spec, count), spec.dtype, device) for spec in pools]
        self._selects = contract.input_index("logits_indices") is not None
        self._others, self._tree = contract.outputs[1:], contract.tree
        self._takes_trees = contract.input_index("tree") is not None
        self._manager = BlockManager(count, size)
        self._reused = 0

    @property
    def prefill_chunk(self) -> int:
        """Most tokens of a call whose last logits alone are wanted."""
        return PREFILL_CHUNK if self._selects else self.chunk

    @property
    def model(self) -> PagedModel:
        """For those who lay out calls themselves; the session's own rows are then no more."""
        return PagedModel(
            run=self._graph,
            pools=self._pools,
            selects=self._selects,
            vocab_size=self.vocab_size,
            context_length=self.context_length,
            block_size=self._manager.block_size,
            num_blocks=self._manager.num_blocks,
            chunk=self.prefill_chunk,
            device=self._device,
            gives=tuple(spec.role for spec in self._others),
            heads=next((spec.columns for spec in self._others if spec.role == "drafted"), 0)
            // (1 if self._tree is None else self._tree.ranks),
            takes_trees=self._takes_trees,
            tree=self._tree,
        )

    @property
    def pool_use(self) -> PoolUse:
        manager = self._manager
        return PoolUse(
            block_size=manager.block_size,
            num_blocks=manager.num_blocks,
            peak_used_blocks=manager.peak_used_blocks,
            peak_waste=manager.peak_waste,
            reused_tokens=self._reused,
        )

    def close(self) -> None:
        self._pools = []

    # -- Session ----------------------------------------------------------------------------

    def _start(self, batch: int) -> None:
        for row in range(len(self.lengths)):
            if row in self._manager:
                self._manager.free(row)

    def _advance(self, rows: Rows) -> Logits:
        out = np.empty((len(rows), self.vocab_size), np.float32)
        left = list(range(len(rows)))
        while left:
            work = self._begin(rows, left)
            with self._noting_lengths():
                out[list(work)] = feed(self._manager, list(work.items()), self.prefill_chunk, self._compute)
            left = [row for row in left if row not in work]
        return out

    def _score(self, tokens: Sequence[int]) -> Logits:
        if 0 not in self._manager:  # every token's logits are wanted, so nothing is taken from the pool's prefixes
            self._manager.start(0)
        with self._noting_lengths():
            return feed_once(self._manager, [(0, tokens)], functools.partial(self._compute, every=True))

    def _rewind(self, lengths: Sequence[int]) -> None:
        for row, length in enumerate(lengths):
            if length == self.lengths[row]:
                continue
            again = list(self._manager.tokens(row)[:length])
            kept = self._manager.rewind(row, length)
            if kept < length:  # the block with the others belongs to another row as well
                feed_once(self._manager, [(row, again[kept:])], self._compute)

    def _begin(self, rows: Rows, left: Sequence[int]) -> dict[int, Sequence[int]]:
        """Of these rows those that are fed next, with the tokens that must be computed.

        New ones may find their beginning in the pool; one that begins as another of these, which does not find it, waits
        until it is there.
        """
        size, manager = self._manager.block_size, self._manager
        computing: set[tuple[int, ...]] = set()
        found: dict[int, Sequence[int]] = {}
        for row in left:
            tokens, first = rows[row], tuple(rows[row][:size])
            if row in manager:
                found[row] = tokens
            elif len(tokens) <= size or first not in computing:
                held = manager.start(row, tokens)
                self._reused += held
                found[row] = tokens[held:]
                computing |= set() if held else {first}
        return found

    @contextlib.contextmanager
    def _noting_lengths(self) -> Iterator[None]:
        """Keep `lengths` true, also where the pool ran out of blocks between two calls."""
        try:
            yield
        finally:
            known = self._manager
            self.lengths = [known.length(row) if row in known else 0 for row in range(len(self.lengths))]

    def _compute(self, inputs: StepInputs, *, every: bool = False) -> Logits:
        """Run the graph; logits of the last token of each row of a call, or of every token."""
        wanted = torch.arange(len(inputs.input_ids)) if every else inputs.cu_seqlens[1:].long() - 1
        return to_logits(self.model.call(inputs, wanted)[0])


def _shape(spec: Input, num_blocks: int) -> list[int]:
    return [size if isinstance(size, int) else num_blocks for size in spec.dims]


def block_bytes(contract: Contract) -> int:
    """Bytes of one block, in all layers."""
    total = 0
    for spec in cache_inputs(contract):
        kind: torch.dtype = getattr(torch, spec.dtype)
        total += math.prod(_shape(spec, 1)) * kind.itemsize
    return total


def default_blocks(contract: Contract, pool_bytes: int = _DEFAULT_POOL_BYTES) -> int:
    """Blocks for 8 rows of full context, as far as they take no more than `pool_bytes`."""
    context_length = contract.model.context_length or UNKNOWN_CONTEXT
    per_row = -(-context_length // contract.kv_cache.block_size)
    return max(1, min(_DEFAULT_CONTEXTS * per_row, pool_bytes // block_bytes(contract)))
