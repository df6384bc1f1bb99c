"""Decides a step with drafts: what each request holds its tokens to, laid over all positions that it was fed.

A draft may be a tree (`Plan.shape`): each of its positions is decided for the tokens that it follows, and the path that
agrees is kept.

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
from optc.runtime.serving.grammar import Bits, GrammarState
from optc.runtime.serving.open_choice import masked
from optc.runtime.serving.plan import Chosen, Plan
from optc.runtime.serving.rows import Ints, Kind, Rows
from optc.runtime.serving.sampler import RequestSampler, SamplerOf
from optc.runtime.speculative.acceptance import NOT_DRAFTED, Cuts, accept, accept_tree, decide


@dataclass(frozen=True)
class _Held:
    """A row that does more than take the largest logit, and its positions of a step.

    Attributes:
        start, count: positions of the step.
        draft: the tokens that are fed behind the first one.
        parents: of each token that is fed, which one it follows; -1 for the first. depths: how many it follows.
    """

    row: int
    start: int
    count: int
    draft: list[int]
    parents: list[int]
    depths: list[int]
    sampler: RequestSampler


class Verifier:
    """See above; `sampler_of` gives the sampler of a row."""

    def __init__(self, rows: Rows, sampler_of: SamplerOf) -> None:
        self._rows, self._sampler_of = rows, sampler_of

    @torch.inference_mode()
    def __call__(self, logits: Tensor, plan: Plan) -> Chosen:
        """What a step chose, from logits [T, V]: of each of `plan.rows` those behind all its tokens, in order."""
        counts = _counts(plan)
        held = list(self._held(plan, counts))
        chosen = self.keep(self._decide(logits, held), plan)
        self._tell(logits, plan, held, chosen)
        return chosen

    def keep(self, decided: Tensor, plan: Plan) -> Chosen:
        """What a step chose where int64 [T] is decided behind all its tokens, in order: the draft as far as it agrees."""
        counts = _counts(plan)
        if plan.shape is None:
            return Chosen(*accept(decided.cpu().numpy(), self._drafted(plan, counts), counts))
        given = (
            torch.from_numpy(item).to(decided.device) for item in (self._fed(plan, counts), counts, plan.shape.parents)
        )
        tokens, kept, path = (item.cpu().numpy() for item in accept_tree(decided, *given))
        return Chosen(tokens, kept, path=path)

    def _drafted(self, plan: Plan, counts: Ints) -> Ints:
        """int64 [T]: the token that was drafted behind each position."""
        behind = np.append(self._fed(plan, counts)[1:], NOT_DRAFTED)
        behind[counts.cumsum() - 1] = NOT_DRAFTED
        return behind

    def _fed(self, plan: Plan, counts: Ints) -> Ints:
        """int64 [T]: the token at each position; of prompts any, as nothing is drafted behind it."""
        owner = np.repeat(np.arange(len(counts)), counts)
        offset = np.arange(len(owner)) - (counts.cumsum() - counts)[owner]
        begin = np.concatenate([plan.positions, np.zeros(len(counts) - len(plan.decodes), np.int64)])
        return self._rows.history[plan.rows[owner], begin[owner] + offset].astype(np.int64)

    def _held(self, plan: Plan, counts: Ints) -> Iterator[_Held]:
        starts, fed, shape = counts.cumsum() - counts, self._fed(plan, counts), plan.shape
        for place in np.flatnonzero(self._rows.kind[plan.rows] != Kind.GREEDY).tolist():
            row, start, count = int(plan.rows[place]), int(starts[place]), int(counts[place])
            sampler = self._sampler_of(row)
            assert sampler is not None
            draft = fed[start + 1 : start + count].tolist()
            parents = list(range(-1, count - 1)) if shape is None else shape.parents[:count].tolist()
            depths = list(range(count)) if shape is None else shape.depths[:count].tolist()
            yield _Held(row, start, count, draft, parents, depths, sampler)

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
            uniforms[part] = item.sampler.uniforms(1 + max(item.depths))[item.depths]
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
        for place, token in enumerate(item.draft, 1):
            parent = item.parents[place]
            seen[place], generated[place] = seen[parent], generated[parent]
            seen[place, token] = True
            generated[place, token] += 1

    def _tell(self, logits: Tensor, plan: Plan, held: Sequence[_Held], chosen: Chosen) -> None:
        """Let samplers go on with what their rows got."""
        order = {int(row): place for place, row in enumerate(plan.rows.tolist())}
        for item in held:
            place = order[item.row]
            count = int(chosen.counts[place])
            asked = item.sampler.request.logprobs is not None
            at = range(count) if chosen.path is None else chosen.path[place, :count].tolist()
            own = logits[[item.start + token for token in at]].float().cpu().numpy() if asked else None
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
    """Scores with -inf for what may not follow the draft so far."""
    places: list[int] = []
    words = []
    for item in held:
        if item.sampler.grammar is not None:
            places += range(item.start, item.start + item.count)
            words += _following(item.sampler.grammar, item)
    if not places:
        return scores
    at = torch.tensor(places, device=scores.device)
    follows = torch.from_numpy(np.stack(words)).to(scores.device)
    return scores.index_copy(0, at, masked(scores.index_select(0, at), follows))


def _following(grammar: GrammarState, item: _Held) -> list[Bits]:
    """What may follow each token that is fed, along the path to it; nothing where the path does not hold to the grammar."""
    found = [np.zeros_like(grammar.bits)] * item.count
    for leaf in set(range(item.count)) - set(item.parents):
        path = [leaf]
        while path[0]:
            path.insert(0, item.parents[path[0]])
        for token, bits in zip(path, grammar.ahead([item.draft[place - 1] for place in path[1:]]), strict=False):
            found[token] = bits
    return found
