"""Choice of the next token from logits [B, V], per row and without leaving the device.

The order is that of transformers' `generate`: penalties, temperature, top-k, top-p, min-p, then a draw. Each of the
three cuts keeps a token where its score reaches a threshold, so that equals stay or go together:

- top-k (Fan et al. 2018, https://arxiv.org/abs/1805.04833): the k-th largest score;
- top-p (Holtzman et al. 2020, https://arxiv.org/abs/1904.09751): the largest with which the probability of those kept
  reaches p;
- min-p (Nguyen et al. 2024, https://arxiv.org/abs/2407.01082): p times the probability of the likeliest.

Repetition penalty: Keskar et al. 2019 (CTRL), https://arxiv.org/abs/1909.05858; presence and frequency penalty as in
OpenAI's API.

A draw is a race (the Gumbel trick): token i's clock rings after E_i / p_i with E_i exponential, and the first one wins.
E_i is made from a counter, (seed, step, i // 4), by Philox (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405):
the same seed and step give the same token, whatever else is in the batch and on whichever device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optc.compiler.ops.library import define

PHILOX_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
NO_TOKEN = -1
"""What a row yields whose largest logit is not finite."""


def philox(seed: Tensor, counters: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10. seed int64: its low and high word are the key; counters and results: int64 that hold 32 bits."""
    low, high = seed & _WORD, (seed >> 32) & _WORD
    a, b, c, d = counters
    for _ in range(PHILOX_ROUNDS):
        first, second = _product(a, _MULTIPLIERS[0]), _product(c, _MULTIPLIERS[1])
        a, b, c, d = second[0] ^ b ^ low, second[1], first[0] ^ d ^ high, first[1]
        low, high = (low + _WEYL[0]) & _WORD, (high + _WEYL[1]) & _WORD
    return a, b, c, d


def _product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low word of the product of 32-bit numbers, whose 64 bits int64 does not hold as a positive number."""
    low, high = (x & 0xFFFF) * factor, (x >> 16) * factor
    middle = (low >> 16) + high
    return (middle >> 16) & _WORD, ((middle << 16) | (low & 0xFFFF)) & _WORD


def exponential(seed: Tensor, step: Tensor, size: int) -> Tensor:
    """float32 [B, size]: E_i = -log(u_i) of each row's seed and step, with u in 2^23 steps that are neither 0 nor 1.

    The four words of a counter are of four tokens.
    """
    counter = torch.arange(-(-size // 4), device=seed.device)[None]
    zero = torch.zeros_like(counter)
    words = philox(seed[:, None], (counter, step[:, None] & _WORD, zero, zero))
    bits = torch.stack(words, -1).flatten(1)[:, :size]
    return -torch.log(((bits >> 9).float() + 0.5) * 2.0**-23)


def penalized(
    logits: Tensor,
    repetition: Tensor | None,
    presence: Tensor | None,
    frequency: Tensor | None,
    seen: Tensor | None,
    counts: Tensor | None,
) -> Tensor:
    """Scores float32 [B, V] after penalties, see `_sample`; None changes nothing."""
    scores = logits.float()
    if repetition is not None and seen is not None:
        factor = repetition[:, None]
        scores = torch.where(seen, torch.where(scores > 0, scores / factor, scores * factor), scores)
    if presence is not None and counts is not None:
        scores = scores - presence[:, None] * (counts > 0)
    if frequency is not None and counts is not None:
        scores = scores - frequency[:, None] * counts
    return scores


def kept(scores: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Which tokens of a row may be drawn; scores float32 [V] after the temperature."""
    weights = torch.exp((scores - scores.max()).double())
    keep = torch.ones_like(scores, dtype=torch.bool)
    if 0 < top_k < len(scores):
        keep &= scores >= torch.topk(scores, top_k).values[-1]
    if top_p < 1:
        order = torch.argsort(scores, descending=True)
        sorted_weights = weights[order] * keep[order]
        before = sorted_weights.cumsum(0) - sorted_weights
        count = int((before < top_p * sorted_weights.sum()).sum())
        keep &= scores >= scores[order[max(count, 1) - 1]]
    return keep & (weights >= min_p)


def _sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    repetition_penalty: Tensor | None,
    presence_penalty: Tensor | None,
    frequency_penalty: Tensor | None,
    seen: Tensor | None,
    counts: Tensor | None,
    seed: Tensor,
    step: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token per row, and its log probability by the logits as they were given.

    Args:
        logits: [B, V], of any floating type; computed in float32.
        temperature: float32 [B]; 0 takes the largest score (after penalties), the smallest id among equals.
        top_k: int32 [B]; 0 keeps all. top_p, min_p: float32 [B]; 1 and 0 keep all. None: all rows keep all.
        repetition_penalty, presence_penalty, frequency_penalty: float32 [B]; 1, 0 and 0 change nothing.
        seen: bool [B, V], tokens of the prompt or generated, for the repetition penalty; updated with the choice.
        counts: int32 [B, V], how often a token was generated, for the other penalties; updated with the choice.
        seed: int64 [B]. step: int64 [B], what must differ between the draws of one seed: the position, for one.

    Returns:
        int64 [B] and float32 [B]. A row whose largest score is not finite yields `NO_TOKEN` and NaN.
    """
    batch, size = logits.shape
    scores = penalized(logits, repetition_penalty, presence_penalty, frequency_penalty, seen, counts)
    clocks = exponential(seed, step, size)
    tokens = torch.full((batch,), NO_TOKEN, dtype=torch.int64, device=logits.device)
    logprobs = torch.full((batch,), float("nan"), device=logits.device)
    for row in range(batch):
        if not bool(torch.isfinite(scores[row].max())):
            continue
        token = argmax(scores[row][None])[0]
        if float(temperature[row]) > 0:
            heated = scores[row] / temperature[row]
            most = 0 if top_k is None else int(top_k[row])
            share, least = (off if cut is None else float(cut[row]) for cut, off in ((top_p, 1.0), (min_p, 0.0)))
            keep = kept(heated, most, share, least)
            token = argmax((heated - torch.log(clocks[row])).masked_fill(~keep, float("-inf"))[None])[0]
        tokens[row], logprobs[row] = token, torch.log_softmax(logits[row].float(), 0)[token]
        if seen is not None:
            seen[row, token] = True
        if counts is not None:
            counts[row, token] += 1
    return tokens, logprobs


def argmax(logits: Tensor) -> Tensor:
    """int64 [B]: the token of the largest logit of [B, V], the smallest id among equals; `NO_TOKEN` if not finite."""
    # Both find the first of equals, and NaN before all; on a CPU NumPy takes a fifth of torch's time.
    if logits.device.type == "cpu":
        wide = logits if logits.dtype == torch.float64 else logits.float()
        first = torch.from_numpy(wide.detach().resolve_neg().numpy().argmax(1))
    else:
        first = logits.argmax(1)
    top = logits.gather(1, first[:, None])[:, 0]
    return torch.where(torch.isfinite(top), first, NO_TOKEN)


def _tokens(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


define("argmax(Tensor logits) -> Tensor", argmax, _tokens)
define(
    "sample_(Tensor logits, Tensor temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p, "
    "Tensor? repetition_penalty, Tensor? presence_penalty, Tensor? frequency_penalty, Tensor(a!)? seen, "
    "Tensor(b!)? counts, Tensor seed, Tensor step) -> (Tensor, Tensor)",
    _sample,
    lambda logits, *_: (_tokens(logits), logits.new_empty(logits.shape[0], dtype=torch.float32)),
)
