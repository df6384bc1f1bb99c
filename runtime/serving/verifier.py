"""Decides a step with drafts: what each request holds its tokens to, laid over all positions that it was fed.

Every position is decided as plain decoding would decide it there, had the tokens before it been chosen: with the penalties
of the draft so far, the grammar advanced along it, and the uniform number of that place. So speculation changes no token;
see `acceptance`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from optc.compiler.ops.dialect.sampling import penalized
from optc.runtime.sampling import Sampling
from optc.runtime.serving.open_choice import masked
from optc.runtime.serving.plan import Chosen, Plan
from optc.runtime.serving.rows import Ints, Kind, Rows
from optc.runtime.serving.sampler import RequestSampler, SamplerOf
from optc.runtime.speculative.acceptance import NOT_DRAFTED, Cuts, accept, decide


@dataclass(frozen=True)
class _Held:
    """A row that does more than take the largest logit, and its positions of a step.

    Attributes:
        start, count: positions of the step.
        draft: the tokens behind its positions but for the last.
    """

    row: int
    start: int
    count: int
    draft: list[int]
    sampler: RequestSampler


class Verifier:
    """See above; `sampler_of` gives the sampler of a row."""

    def __init__(self, rows: Rows, sampler_of: SamplerOf) -> None:
        self._rows, self._sampler_of = rows, sampler_of

    @torch.inference_mode()
    def __call__(self, logits: Tensor, plan: Plan) -> Chosen:
        """What a step chose, from logits [T, V]: of each of `plan.rows` those behind all its tokens, in order."""
        counts = _counts(plan)
        held = list(self._held(plan, counts, self._drafted(plan, counts)))
        chosen = self.keep(self._decide(logits, held), plan)
        self._tell(logits, plan, held, chosen)
        return chosen

    def keep(self, decided: Tensor, plan: Plan) -> Chosen:
        """What a step chose where int64 [T] is decided behind all its tokens, in order: the draft as far as it agrees."""
        counts, place = _counts(plan), decided.device
        drafted = torch.from_numpy(self._drafted(plan, counts)).to(place)
        tokens, kept = accept(decided, drafted, torch.from_numpy(counts).to(place))
        return Chosen(tokens.cpu().numpy(), kept.cpu().numpy())

    def _drafted(self, plan: Plan, counts: Ints) -> Ints:
        """int64 [T]: the token that was drafted behind each position."""
        ends = counts.cumsum()
        owner = np.repeat(np.arange(len(counts)), counts)
        offset = np.arange(ends[-1]) - (ends - counts)[owner]
        # A decode is fed the token at `positions`, and the drafted ones behind it; the rows of prompts have none.
        begin = np.concatenate([plan.positions, np.zeros(len(counts) - len(plan.decodes), np.int64)])
        last = offset == counts[owner] - 1
        behind = self._rows.history[plan.rows[owner], np.where(last, 0, begin[owner] + offset + 1)]
        return np.where(last, NOT_DRAFTED, behind).astype(np.int64)

    def _held(self, plan: Plan, counts: Ints, drafted: Ints) -> Iterator[_Held]:
        starts = counts.cumsum() - counts
        for place in np.flatnonzero(self._rows.kind[plan.rows] != Kind.GREEDY).tolist():
            row, start, count = int(plan.rows[place]), int(starts[place]), int(counts[place])
            sampler = self._sampler_of(row)
            assert sampler is not None
            yield _Held(row, start, count, drafted[start : start + count - 1].tolist(), sampler)

    def _decide(self, logits: Tensor, held: Sequence[_Held]) -> Tensor:
        scores = logits.float()
        if not held:
            found: Tensor = torch.ops.optc.argmax(scores)
            return found
        scores = self._penalize(_hold_to_grammars(_add_biases(scores, held), held), held)
        samplings, uniforms = [Sampling()] * len(logits), np.zeros(len(logits))
        for item in held:
            part = slice(item.start, item.start + item.count)
            samplings[part] = [item.sampler.request.sampling] * item.count
            uniforms[part] = item.sampler.uniforms(item.count)
        return decide(scores, Cuts.of(samplings, logits.device), torch.from_numpy(uniforms).to(logits.device))

    def _penalize(self, scores: Tensor, held: Sequence[_Held]) -> Tensor:
        """Scores after penalties for what a row holds, and for the drafted tokens in front of each position."""
        held = [item for item in held if item.sampler.request.sampling.penalizes]
        if not held:
            return scores
        places = np.concatenate([np.arange(item.start, item.start + item.count) for item in held])
        seen = np.zeros((len(places), scores.shape[1]), np.bool_)
        generated = np.zeros(seen.shape, np.int32)
        factors = np.zeros((3, len(places)), np.float32)
        begin = 0
        for item in held:
            part, own = slice(begin, begin + item.count), item.sampler.request
            self._count_tokens(item, seen[part], generated[part])
            penalties = (own.sampling.repetition_penalty, own.sampling.presence_penalty, own.sampling.frequency_penalty)
            factors[:, part] = np.array(penalties)[:, None]
            begin += item.count
        at, on = torch.from_numpy(places).to(scores.device), torch.from_numpy(factors).to(scores.device)
        tables = (torch.from_numpy(seen).to(scores.device), torch.from_numpy(generated).to(scores.device))
        return scores.index_copy(0, at, penalized(scores.index_select(0, at), on[0], on[1], on[2], *tables))

    def _count_tokens(self, item: _Held, seen: npt.NDArray[np.bool_], generated: npt.NDArray[np.int32]) -> None:
        """Which tokens [count, V] a row holds at each of its positions, and how often it generated them."""
        tokens = self._rows.history[item.row, : self._rows.known[item.row]]
        seen[:, tokens] = True
        np.add.at(generated[0], tokens[len(item.sampler.request.prompt) :], 1)
        generated[1:] = generated[0]
        for place, token in enumerate(item.draft):
            seen[place + 1 :, token] = True
            generated[place + 1 :, token] += 1

    def _tell(self, logits: Tensor, plan: Plan, held: Sequence[_Held], chosen: Chosen) -> None:
        """Let samplers go on with what their rows got."""
        order = {int(row): place for place, row in enumerate(plan.rows.tolist())}
        for item in held:
            place = order[item.row]
            count = int(chosen.counts[place])
            asked = item.sampler.request.logprobs is not None
            own = logits[item.start : item.start + count].float().cpu().numpy() if asked else None
            item.sampler.take_all(chosen.tokens[place, :count].tolist(), own)


def _counts(plan: Plan) -> Ints:
    """Tokens behind which one is decided, of each of `plan.rows`."""
    counts = np.ones(len(plan.rows), np.int64)
    counts[: len(plan.decodes)] += plan.drafted
    return counts


def _add_biases(scores: Tensor, held: Sequence[_Held]) -> Tensor:
    entries = [
        (place, token, bias)
        for item in held
        for token, bias in item.sampler.bias
        for place in range(item.start, item.start + item.count)
    ]
    if not entries:
        return scores
    at = torch.from_numpy(np.array([entry[:2] for entry in entries], np.int64).T).to(scores.device)
    biases = torch.tensor([entry[2] for entry in entries], dtype=torch.float32, device=scores.device)
    return scores.index_put((at[0], at[1]), biases, accumulate=True)


def _hold_to_grammars(scores: Tensor, held: Sequence[_Held]) -> Tensor:
    """Scores with -inf for what may not follow the draft so far. Drafts hold to their grammar (`Drafting`)."""
    places: list[int] = []
    words = []
    for item in held:
        if item.sampler.grammar is not None:
            bits = item.sampler.grammar.ahead(item.draft)
            assert len(bits) == item.count
            places += range(item.start, item.start + item.count)
            words += bits
    if not places:
        return scores
    at = torch.tensor(places, device=scores.device)
    follows = torch.from_numpy(np.stack(words)).to(scores.device)
    return scores.index_copy(0, at, masked(scores.index_select(0, at), follows))
