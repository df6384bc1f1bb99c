"""Choices that no captured step makes: logits that are changed before, or told beside the token. On the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from optc.runtime.serving.request import TokenLogprobs
from optc.runtime.serving.rows import Ints, Kind
from optc.runtime.serving.sampler import RequestSampler
from optc.runtime.serving.step_buffers import StepBuffers

Tell = Callable[[Ints], None]
"""Gives the samplers the tokens of a step that has arrived, and what they are to tell."""


class OpenChoice:
    """Chooses the tokens of rows of which one at least is `Kind.OPEN`."""

    def __init__(self, buffers: StepBuffers, sampler_of: Callable[[int], RequestSampler | None]) -> None:
        self._buffers, self._sampler_of = buffers, sampler_of

    def __call__(self, logits: Tensor, rows: Ints, positions: Tensor) -> tuple[Tensor, Tell | None]:
        """int64 [R], tokens for rows of logits [R, V], fed at `positions` [R]; and what is left to be told."""
        buffers = self._buffers
        samplers = [self._sampler_of(row) for row in rows.tolist()]
        penalized = any(item is not None and item.request.sampling.penalizes for item in samplers)
        draws = buffers.draws(Kind.PENALIZED if penalized else Kind.DRAWN)
        assert draws is not None
        places = buffers.send(rows)
        part = draws.of(places)
        tokens = part.choose(self._changed(logits, samplers), positions)
        draws.give_back(part, places)
        return tokens, self._tell(logits, tokens, samplers)

    def _changed(self, logits: Tensor, samplers: Sequence[RequestSampler | None]) -> Tensor:
        """float32 [R, V], with biases, and without the tokens that may not follow."""
        scores = logits.float()
        entries = [
            (row, token, bias)
            for row, sampler in enumerate(samplers)
            if sampler is not None
            for token, bias in sampler.bias
        ]
        if entries:
            at = self._buffers.send(np.array([entry[:2] for entry in entries], np.int64).T)
            biases = self._buffers.send(np.array([entry[2] for entry in entries], np.float32))
            scores = scores.index_put((at[0], at[1]), biases, accumulate=True)
        held = [
            (row, sampler.grammar.bits)
            for row, sampler in enumerate(samplers)
            if sampler is not None and sampler.grammar is not None
        ]
        if held:
            rows = self._buffers.send(np.array([row for row, _ in held], np.int64))
            bits = self._buffers.send(np.stack([words for _, words in held]))
            scores = scores.index_copy(0, rows, masked(scores.index_select(0, rows), bits))
        return scores

    def _tell(self, logits: Tensor, tokens: Tensor, samplers: Sequence[RequestSampler | None]) -> Tell | None:
        grammars = [(row, item) for row, item in enumerate(samplers) if item is not None and item.grammar is not None]
        told = self._logprobs(logits, tokens, samplers)
        if not grammars and told is None:
            return None

        def tell(chosen: Ints) -> None:
            for row, sampler in grammars:
                sampler.take(int(chosen[row]))
            if told is not None:
                told()

        return tell

    def _logprobs(
        self, logits: Tensor, tokens: Tensor, samplers: Sequence[RequestSampler | None]
    ) -> Callable[[], None] | None:
        asking = [
            (row, sampler)
            for row, sampler in enumerate(samplers)
            if sampler is not None and sampler.request.logprobs is not None
        ]
        if not asking:
            return None
        at = self._buffers.send(np.array([row for row, _ in asking], np.int64))
        scores = torch.log_softmax(logits.index_select(0, at).float(), 1)
        most = max(sampler.request.logprobs or 0 for _, sampler in asking)
        top, ids = scores.topk(most, dim=1)
        chosen = scores.gather(1, tokens.index_select(0, at).clamp(min=0)[:, None])
        held = [self._buffers.bring(item) for item in (chosen, top, ids)]

        def told() -> None:
            for place, (_, sampler) in enumerate(asking):
                count = sampler.request.logprobs or 0
                likeliest = zip(held[2][place, :count].tolist(), held[1][place, :count].tolist(), strict=True)
                sampler.logprobs.append(TokenLogprobs(float(held[0][place, 0]), list(likeliest)))

        return told


def masked(scores: Tensor, bits: Tensor) -> Tensor:
    """Scores [R, V] where the bits int32 [R, W] are set, -inf elsewhere, and beyond them."""
    places = torch.arange(32, dtype=torch.int32, device=bits.device)
    follows = ((bits[:, :, None] >> places) & 1).bool().flatten(1)[:, : scores.shape[1]]
    beyond = scores.shape[1] - follows.shape[1]
    return scores.masked_fill(~torch.nn.functional.pad(follows, (0, beyond)), float("-inf"))
