"""Runs steps that choose their tokens on the device, so that the next one is launched before the host has read any.

A step of decodes alone is a captured `DecodeStep` over the first rows, as many as a power of two; the others are padding.
Some of them follow each other without the host, as each leaves the inputs of the next, and their tokens are read at once.
A step with prompts is one call, mixed, of a size that repeats (`PromptCall`): decodes in it read their tokens from the
device's rows, and all that are chosen go there.

Where tokens are drafted, the host must have read a step before it plans the next. A step with drafts is a call in which each
token is a request of its own; what the device decided behind each of them is read, and the draft kept as far as it agrees.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from optc.compiler.execution.block_manager import StepInputs
from optc.compiler.kernels.cuda.dispatch import kernels_only
from optc.compiler.kernels.cuda.paged_attention import SHORT_CONTEXT
from optc.compiler.ops.dialect.paged import PADDING
from optc.runtime.serving.flights import Flight, Flights, Given
from optc.runtime.serving.mixed_call import MixedCall
from optc.runtime.serving.model_runner import copy_blocks, step_inputs
from optc.runtime.serving.open_choice import OpenChoice, Tell
from optc.runtime.serving.pace import Pace
from optc.runtime.serving.plan import Chosen, Plan
from optc.runtime.serving.rows import Ints, Kind, Rows
from optc.runtime.serving.sampler import SamplerOf
from optc.runtime.serving.step_buffers import StepBuffers
from optc.runtime.serving.verifier import Verifier
from optc.runtime.sessions.decode_step import DecodeStep
from optc.runtime.sessions.paged import PagedModel
from optc.runtime.sessions.prompt_call import token_size
from optc.runtime.sessions.streaming import Draw

_FEW_REQUESTS = (8, 64)
_NARROW = SHORT_CONTEXT
"""Tokens that the tables of a narrow step hold, for which attention of many requests has other tiles."""
_WARMED = 2048
"""Tokens of the largest call that is recorded before requests come: in larger ones launches are a small part."""
_UNTIL_RECORDED = 2
"""Calls of a size, see `PromptCall`."""
_STEP, _CLOSE = 64, 1024
"""Sizes of mixed calls, see `DeviceRunner._size`."""
_MOST_STEPS = 8
"""Of a plan: what the host spends on it is then a small part of what it spends on launching them."""


class DeviceRunner:
    """See above.

    Args:
        drafts: steps may have drafts, and none is launched ahead.

    Attributes:
        launched, captured: steps; those of them that were replayed from a graph.
        pace: counts the steps of a plan of decodes alone.
    """

    def __init__(self, model: PagedModel, rows: Rows, sampler_of: SamplerOf, *, drafts: bool = False) -> None:
        self.ahead = 0 if drafts else 1
        self._model, self._rows, self._sampler_of = model, rows, sampler_of
        self._verifier = Verifier(rows, sampler_of)
        self._last, self._untold = np.zeros(rows.count, np.int64), np.zeros(rows.count, np.bool_)
        self._overtaken: Ints = np.zeros(0, np.int64)  # rows whose tokens the device's tables do not have
        self._buffers = StepBuffers(rows, model.vocab_size, model.device, self._draw_of)
        self._open = OpenChoice(self._buffers, sampler_of)
        self._steps: dict[tuple[int, int, Kind], DecodeStep] = {}
        self._calls: dict[tuple[tuple[int, int], Kind, bool], MixedCall] = {}
        self._flights = Flights(self._buffers)
        self.pace = Pace(1, 1 if drafts else _MOST_STEPS)
        self.launched = self.captured = 0

    @property
    def model_s(self) -> float:
        return self._flights.waited_s

    @property
    def most_steps(self) -> int:
        return self.pace.steps

    def _draw_of(self, row: int) -> Draw:
        sampler = self._sampler_of(row)
        return Draw() if sampler is None else sampler.draw

    @torch.inference_mode()
    def warm_up(self, most_tokens: int) -> None:
        """Record the greedy steps of short requests, and calls of up to so many tokens whose sizes are powers of two, on
        padding: few requests wait for a kernel's compiler then."""
        if self._model.record is None:
            return
        count = self._rows.count
        for batch in {step_rows(rows, count) for rows in range(1, count + 1)}:
            self._step(batch, self._width(min(_NARROW, self._rows.capacity)), Kind.GREEDY)
        self._warm_up_calls(most_tokens)

    def _warm_up_calls(self, most_tokens: int) -> None:
        count, most = self._rows.count, min(most_tokens, self._model.prompt_tokens, _WARMED)
        sizes = {
            self._size(min(1 << power, most), requests)
            for requests in {1, min(_FEW_REQUESTS[0], count), count}
            for power in range(most.bit_length() + 1)
        }
        nothing = [np.zeros(1, np.int64), np.zeros(1, np.int64), np.full(1, PADDING), np.zeros((1, 1), np.int32)]
        inputs = StepInputs(*map(torch.from_numpy, [*nothing, np.ones(1, np.int32), np.arange(2, dtype=np.int32)]))
        with kernels_only():
            for size in sorted(sizes):
                for _ in range(_UNTIL_RECORDED):
                    self._call(size, Kind.GREEDY)(inputs, np.array([self._buffers.nobody]))

    @torch.inference_mode()
    def launch(self, plan: Plan) -> None:
        """See `ModelRunner`."""
        buffers = self._buffers
        kind = Kind(int(self._rows.kind[plan.rows].max(initial=Kind.GREEDY)))
        if plan.moved or not self._brings_tokens(plan, kind):
            self._tell_last()
        copy_blocks(self._model.pools, plan.copied, buffers.send)
        buffers.move(plan.moved)
        buffers.grow(plan.grown)
        if kind < Kind.OPEN:
            buffers.draws(kind)
        buffers.join([*self._behind(plan), *(piece.row for piece in plan.pieces if piece.last)])
        with kernels_only():
            self._flights.add(self._start(plan, kind), 0 if plan.pieces else plan.steps)
        self.launched += plan.steps

    def _brings_tokens(self, plan: Plan, kind: Kind) -> bool:
        """Whether what a step feeds comes from the host, and not from the device's rows."""
        return bool(plan.drafted.any())

    def _start(self, plan: Plan, kind: Kind) -> Flight:
        """Launch a step."""
        if plan.drafted.any():
            return self._flights.of(*self._verify(plan, kind))
        tokens, order, tell = self._mixed(plan, kind) if plan.pieces else self._decode(plan, kind)
        return self._flights.of(tokens, order, functools.partial(one_each, tell))

    def _behind(self, plan: Plan) -> list[int]:
        """Rows that got tokens which the device's tables do not have, where they are by now."""
        moved = dict(plan.moved)
        rows = [moved.get(row, row) for row in self._overtaken.tolist()]
        self._overtaken = self._overtaken[:0]
        return [row for row in rows if self._rows.decoding[row]]

    def collect(self) -> Chosen:
        """See `ModelRunner`."""
        given, took = self._flights.land()
        if took is not None:
            self.pace.note(took.step, took.host)
        return given

    def _decode(self, plan: Plan, kind: Kind) -> tuple[Tensor, Ints, Tell | None]:
        """Tokens of a step of decodes, and where those of its rows are; of several steps, [R, steps]."""
        rows, buffers = plan.decodes, self._buffers
        width = self._width(int(plan.positions.max()) + plan.steps)
        step = self._step(step_rows(int(rows[-1]) + 1, self._rows.count), width, kind)
        buffers.decode(rows, plan.positions)
        self.captured += step.recorded * plan.steps
        if plan.steps > 1:
            return self._repeat(step, plan.steps), rows, None
        step.run()
        if kind < Kind.OPEN:
            return step.tokens, rows, None
        state, places = buffers.state.first(step.batch), buffers.send(rows)
        chosen, tell = self._open(step.logits.index_select(0, places), rows, state.positions.index_select(0, places))
        tokens = torch.zeros_like(state.ids).index_copy_(0, places, chosen)
        torch.ops.optc.advance_step_(tokens, *state.advanced(), block_size=self._model.block_size)
        return tokens, rows, tell

    def _repeat(self, step: DecodeStep, count: int) -> Tensor:
        """Tokens of so many steps, [batch, count]."""
        found = torch.empty((step.batch, count), dtype=torch.int64, device=self._model.device)
        for place in range(count):
            step.run()
            found[:, place].copy_(step.tokens)
        return found

    def _width(self, tokens: int) -> int:
        """Columns of the tables of a step whose longest request has so many tokens."""
        whole = self._buffers.state.width
        return min(_NARROW // self._rows.block_size, whole) if tokens <= _NARROW else whole

    def _step(self, batch: int, width: int, kind: Kind) -> DecodeStep:
        if (batch, width, kind) not in self._steps:
            model, draws = self._model, self._buffers.draws(kind) if kind < Kind.OPEN else None
            self._steps[batch, width, kind] = DecodeStep(
                model.step or model.run,
                model.pools,
                self._buffers.state.first(batch, width),
                block_size=model.block_size,
                selects=model.selects,
                draws=None if draws is None else draws.first(batch),
                chooses=kind < Kind.OPEN,
                record=model.record,
            )
        return self._steps[batch, width, kind]

    def _mixed(self, plan: Plan, kind: Kind) -> tuple[Tensor, Ints, Tell | None]:
        """Tokens of a step with prompts, and where those of its rows are."""
        buffers = self._buffers
        arrays, rows, order = self._laid_out(plan)
        arrays[0][: len(plan.decodes)] = -1 - plan.decodes
        inputs = StepInputs(*map(torch.from_numpy, arrays))
        kind = Kind.OPEN if kind == Kind.PENALIZED else kind  # tables of all rows of a call would be copied
        size = self._size(len(inputs.input_ids), len(rows))
        call = self._call(size, kind)
        found = call(inputs, rows, self._tokens_behind(plan, arrays))
        self.captured += call.recorded
        buffers.overtaken()
        if kind < Kind.OPEN:
            return found, order, None
        places = buffers.send(order)
        positions = buffers.send(arrays[1][arrays[5][1:] - 1][order])
        chosen, tell = self._open(found.index_select(0, places), plan.rows, positions)
        buffers.state.ids.index_copy_(0, buffers.send(plan.rows), chosen.clamp(min=0))
        return chosen, np.arange(len(order)), tell

    def _tokens_behind(self, plan: Plan, arrays: list[np.ndarray]) -> Ints | None:
        """Of the tokens of a mixed call, those behind them, for who reads what it gives; see `MixedCall`."""
        return None

    def _verify(self, plan: Plan, kind: Kind) -> tuple[Tensor, Ints, Given]:
        """What a step with drafts decides behind its tokens, where those of its rows are, and what comes of them.

        Rows that do more than draw are decided by their samplers, from logits.
        """
        arrays, rows, order = self._laid_out(plan)
        inputs = StepInputs(*map(torch.from_numpy, arrays))
        kind = Kind.OPEN if kind == Kind.PENALIZED else kind
        every = not plan.pieces
        count = _few_tokens(len(rows)) if every else 0
        size = (count, count + 1) if every else self._size(len(inputs.input_ids), len(rows))
        call = self._call(size, kind, every=every)
        found = call(inputs, rows)
        self.captured += call.recorded
        self._buffers.overtaken()
        if kind < Kind.OPEN:
            return found, order, functools.partial(self._kept, plan)
        chosen = self._verifier(found.index_select(0, self._buffers.send(order)), plan)
        self._overtaken = plan.rows
        self._go_on(plan, chosen)
        return torch.zeros(0, dtype=torch.int64), order[:0], lambda _: chosen

    def _laid_out(self, plan: Plan) -> tuple[list[np.ndarray], Ints, Ints]:
        """A step as one call, each drafted token a request of its own: its arrays, the rows of its requests, and which of
        these get tokens."""
        arrays, _ = step_inputs(plan, self._rows, apart=True)
        nobody = self._buffers.nobody
        ends = [piece.row if piece.last else nobody for piece in plan.pieces]
        rows = np.concatenate([np.repeat(plan.decodes, 1 + plan.drafted), np.array(ends, np.int64)])
        return arrays, rows, np.flatnonzero(rows != nobody)

    def _kept(self, plan: Plan, decided: Ints) -> Chosen:
        chosen = self._verifier.keep(torch.from_numpy(decided), plan)
        self._go_on(plan, chosen)
        return chosen

    def _go_on(self, plan: Plan, chosen: Chosen) -> None:
        """The device's rows are fed the last of their tokens next."""
        last = chosen.tokens[np.arange(len(plan.rows)), chosen.counts - 1]
        self._last[plan.rows] = np.maximum(last, 0)
        self._untold[plan.rows] = True

    def _tell_last(self) -> None:
        """Bring the tokens that steps with drafts gave, and no step since, to the device's rows."""
        rows = np.flatnonzero(self._untold)
        if len(rows):
            at, ids = self._buffers.send(np.stack([rows, self._last[rows]]))
            self._buffers.state.ids.index_copy_(0, at, ids)
            self._untold[:] = False

    def _size(self, tokens: int, requests: int) -> tuple[int, int]:
        """As `call_size`, but closer: hundreds of decodes and a prompt or two are the usual call.

        Requests are some of `_FEW_REQUESTS`, or as many as there are rows (a drafted token is a request, too), with one to
        spare: kernels are compiled for each number. Tokens up to `_CLOSE` are multiples of 64, from 64 on.
        """
        all_rows = -(-(max(self._rows.count, requests) + 1) // _STEP) * _STEP
        most = next((size for size in _FEW_REQUESTS if requests < size), all_rows)
        least = max(tokens, most + 1)
        return (-(-least // _STEP) * _STEP if _STEP < least <= _CLOSE else token_size(least)), most

    def _call(self, size: tuple[int, int], kind: Kind, *, every: bool = False) -> MixedCall:
        if (size, kind, every) not in self._calls:
            self._calls[size, kind, every] = MixedCall(self._model, self._buffers, size, kind, every=every)
        return self._calls[size, kind, every]


def step_rows(rows: int, most: int) -> int:
    """The size of a captured step for so many rows: a power of two, or all there are."""
    return min(1 << (rows - 1).bit_length(), most)


def _few_tokens(tokens: int) -> int:
    """The size of a call of decodes and drafts: a power of two up to that of a product of tensor cores."""
    size = 1 << (tokens - 1).bit_length()
    return size if size < token_size(1) else token_size(tokens)


def one_each(tell: Tell | None, found: Ints) -> Chosen:
    """From tokens [R], or [R, steps] of several steps."""
    if found.ndim == 2:
        return Chosen(found, np.full(len(found), found.shape[1]))
    if tell is not None:
        tell(found)
    return Chosen.one_each(found)
