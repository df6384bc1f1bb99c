"""Runs planned steps of a paged program. An interface first: the engine does not know on how many devices, or how."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from optc.compiler.execution.paged_call import lay_out
from optc.compiler.ir.contract import OutputRole
from optc.compiler.ops.dialect.paged_tree import CAUSAL
from optc.runtime.serving.plan import Chosen, Plan
from optc.runtime.serving.rows import Ints, Rows
from optc.runtime.serving.sampler import SamplerOf, choose
from optc.runtime.serving.verifier import Verifier
from optc.runtime.sessions.paged import PagedModel
from optc.runtime.speculative.shape import Shape


class ModelRunner(Protocol):
    """Runs steps one after another; of each, `collect` gives the tokens, in the order in which they were launched.

    Attributes:
        ahead: how many launches there may be before the first of them is collected, beyond one.
        most_steps: of a plan, see `Scheduler.plan`.
        model_s: seconds since the start in which the host waited for the model.
    """

    ahead: int

    @property
    def model_s(self) -> float: ...

    @property
    def most_steps(self) -> int: ...

    def warm_up(self, most_tokens: int) -> None:
        """Do what steps of up to so many tokens do once, before requests come."""

    def launch(self, plan: Plan) -> None: ...

    def collect(self) -> Chosen: ...


class HostRunner:
    """Runs a step as one call, mixed of decodes, with what was drafted behind them, and prompts.

    Tokens are chosen on the host; of steps with drafts, on the device of the logits (`Verifier`).

    Args:
        rows: read when a step is launched, before it advances them: `Plan` says at which positions.
        sampler_of: see `SamplerOf`.
    """

    ahead, most_steps = 0, 1

    def __init__(self, model: PagedModel, rows: Rows, sampler_of: SamplerOf) -> None:
        self._model, self._rows, self._sampler_of = model, rows, sampler_of
        self._verify = Verifier(rows, sampler_of)
        self._chosen: list[Chosen] = []
        self.model_s = 0.0

    def warm_up(self, most_tokens: int) -> None:
        """Nothing: all steps are alike."""

    def launch(self, plan: Plan) -> None:
        """See `ModelRunner`."""
        copy_blocks(self._model.pools, plan.copied, torch.from_numpy)
        logits, others = self._compute(plan)
        chosen = self._choose(logits, plan)
        if chosen.path is not None:
            move_kept(self._model.pools, plan, chosen.path, chosen.counts, self._rows)
        self._chosen.append(chosen._replace(outputs=others))

    def _choose(self, logits: Tensor, plan: Plan) -> Chosen:
        if plan.drafted.any():
            return self._verify(logits, plan)
        plain = not self._rows.kind[plan.rows].any()
        samplers = [] if plain else [self._sampler_of(row) for row in plan.rows.tolist()]
        return Chosen.one_each(choose(logits.float().cpu().numpy(), samplers))

    def collect(self) -> Chosen:
        """See `ModelRunner`."""
        return self._chosen.pop(0)

    def _compute(self, plan: Plan) -> tuple[Tensor, dict[OutputRole, Tensor]]:
        """Logits [T, V] of the tokens of `plan.decodes`, the drafted ones too, and of the last ones of last pieces; and the
        other outputs, see `Chosen`."""
        model = self._model
        inputs, wanted = step_inputs(plan, self._rows)
        tree = None if plan.shape is None else along_tree(inputs, plan, plan.shape)
        tensors = [torch.from_numpy(item) for item in (*inputs, wanted)]
        begin = time.perf_counter()
        found = model.call(tensors[:-1], tensors[-1], None if tree is None else torch.from_numpy(tree))
        self.model_s += time.perf_counter() - begin
        return found


@torch.inference_mode()
def copy_blocks(pools: Sequence[Tensor], copied: Mapping[int, int], send: Callable[[np.ndarray], Tensor]) -> None:
    """Copy blocks of the pools, see `Plan.copied`: all are read before any is written.

    Args:
        send: from the host to what indices of the pools may be.
    """
    if not copied:
        return
    target, source = send(np.array(list(copied.items()), np.int64).T.copy())
    for pool in pools:
        memory = pool.view(torch.uint8)  # not every type of numbers can be indexed
        memory.index_copy_(0, target.to(pool.device), memory.index_select(0, source.to(pool.device)))


@torch.inference_mode()
def move_kept(pools: Sequence[Tensor], plan: Plan, path: Ints, counts: Ints, rows: Rows) -> None:
    """Let what is kept of trees lie in the pools as a text does: keys and values were made for the positions that they get.

    Args:
        path: int64 [R, W], of each of `plan.rows` the tokens of this step that are kept, the first `counts` of a row.
    """
    decodes = len(plan.decodes)
    wanted = np.arange(path.shape[1])
    moved = (path != wanted) & (wanted < counts[:, None])
    row, place = np.nonzero(moved[:decodes])
    if not len(row):
        return
    source, target = (
        torch.from_numpy(positions)
        for positions in (plan.positions[row] + path[row, place], plan.positions[row] + place)
    )
    tables = torch.from_numpy(rows.tables[plan.decodes[row]]).long()
    size = rows.block_size
    at = [(tables.gather(1, positions[:, None] // size)[:, 0], positions % size) for positions in (source, target)]
    for pool in pools:
        memory = pool.view(torch.uint8) if pool.element_size() == 1 else pool
        (blocks, slots), (to_blocks, to_slots) = ((a.to(pool.device), b.to(pool.device)) for a, b in at)
        memory[to_blocks, to_slots] = memory[blocks, slots]


def along_tree(inputs: list[np.ndarray], plan: Plan, shape: Shape) -> Ints:
    """int64 [N], which tokens each one of a step sees, see `paged_tree_attention_`; positions of `inputs` become those of
    trees."""
    fed = 1 + plan.drafted
    place = np.arange(fed.sum()) - np.repeat(fed.cumsum() - fed, fed)
    inputs[1][: len(place)] = np.repeat(plan.positions, fed) + shape.depths[place]
    found = np.full(len(inputs[0]), CAUSAL, np.int64)
    found[: len(place)] = shape.bits[place]
    return found


def step_inputs(plan: Plan, rows: Rows, *, apart: bool = False) -> tuple[list[np.ndarray], Ints]:
    """The tables of one call for a whole step, in the order of `StepInputs`, and which tokens' logits are wanted.

    Args:
        apart: each drafted token is a request of its own, and none of several tokens with the one that it follows.
    """
    pieces, fed = plan.pieces, 1 + plan.drafted
    decodes, positions = plan.decodes, plan.positions
    if apart:
        behind = np.arange(fed.sum()) - np.repeat(fed.cumsum() - fed, fed)
        decodes, positions = np.repeat(decodes, fed), np.repeat(positions, fed) + behind
        fed = np.ones_like(decodes)
    starts = np.concatenate([positions, np.array([piece.start for piece in pieces], np.int64)])
    counts = np.concatenate([fed, np.array([piece.size for piece in pieces], np.int64)])
    places = np.concatenate([decodes, np.array([piece.row for piece in pieces], np.int64)])
    width = -(-int((starts + counts).max()) // rows.block_size)
    layout = lay_out(starts, counts, rows.tables[places, :width], rows.block_size)
    ids = rows.history[places[layout.owner], layout.positions].astype(np.int64)
    wanted = layout.owner < len(decodes)
    last = np.array([piece.last for piece in pieces], np.bool_)
    wanted[layout.bounds[1 + len(decodes) :][last] - 1] = True
    return [ids, *layout[1:]], np.flatnonzero(wanted)
