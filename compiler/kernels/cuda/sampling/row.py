"""What the kernels that choose tokens share: scores, statistics of chunks of a row, the race, and what a choice leaves."""

from __future__ import annotations

import triton
import triton.language as tl

STATISTICS = tl.constexpr(8)
"""Floats that a chunk leaves: maximum and sum of exponentials of the logits, the same of the scores, whether one is
not a number, the best time of the race, and the sum of exponentials of scores above that of the winner."""
NO_TOKEN = tl.constexpr(-1)
NOWHERE = tl.constexpr(2**31 - 1)
LOWEST = tl.constexpr(-3.0e38)
"""Below all scores that can be drawn, as -inf cannot."""


@triton.jit
def heat_of(temperatures, row):
    """Whether the row takes its largest score, and what scores are divided by."""
    given = tl.load(temperatures + row)
    is_greedy = given <= 0
    return is_greedy, tl.where(is_greedy, 1.0, given)


@triton.jit
def penalties_of(repetitions, presences, frequencies, row):
    repetition = 1.0
    presence = 0.0
    frequency = 0.0
    if repetitions is not None:
        repetition = tl.load(repetitions + row)
    if presences is not None:
        presence = tl.load(presences + row)
    if frequencies is not None:
        frequency = tl.load(frequencies + row)
    return repetition, presence, frequency


@triton.jit
def cuts_of(top_k, top_p, min_p, row, vocabulary):
    """k (0 where all are kept), p and the share of min-p of a row, and whether any of them cuts."""
    most = row * 0
    share = tl.full([], 1.0, tl.float32)
    least = tl.full([], 0.0, tl.float32)
    if top_k is not None:
        most = tl.load(top_k + row)
        most = tl.where(most < vocabulary, most, 0)
    if top_p is not None:
        share = tl.load(top_p + row)
    if min_p is not None:
        least = tl.load(min_p + row)
    return most, share, least, (most > 0) | (share < 1) | (least > 0)


@triton.jit
def scores_of(logits, seen, counts, repetition, presence, frequency, temperature, vocabulary, token):
    """Logits of a row and their scores after penalties and temperature, float32; -inf beyond the vocabulary."""
    inside = token < vocabulary
    raw = tl.load(logits + token, mask=inside, other=float("-inf")).to(tl.float32)
    score = raw
    if seen is not None:
        was_seen = tl.load(seen + token, mask=inside, other=0) != 0
        penalized = tl.where(score > 0, score / repetition, score * repetition)
        score = tl.where(was_seen, penalized, score)
    if counts is not None:
        count = tl.load(counts + token, mask=inside, other=0).to(tl.float32)
        score = score - tl.where(count > 0, presence, 0.0)
        score = score - frequency * count
    return raw, tl.where(inside, score / temperature, float("-inf"))


@triton.jit
def _words(seed, counter, step):
    """Four words of 32 bits for each counter: of the tokens 4 * counter and the next three."""
    nothing = counter * 0
    return tl.philox(seed, counter, nothing + step.to(tl.uint32), nothing, nothing)


@triton.jit
def _later(score, word):
    """score - log E with the exponential number E that a word makes: the largest wins the race."""
    uniform = ((word >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608.0)
    return score - tl.log(-tl.log(uniform))


@triton.jit
def times_from(score, start, seed, step, COUNT: tl.constexpr):
    """Times of COUNT neighbours, of which the first is token `start`, a multiple of four."""
    counter = (start // 4 + tl.arange(0, COUNT // 4)).to(tl.uint32)
    first, second, third, fourth = _words(seed, counter, step)
    words = tl.join(tl.join(first, third), tl.join(second, fourth))
    return _later(score, tl.reshape(words, [COUNT]))


@triton.jit
def times_of(score, token, seed, step):
    """Times of tokens in any order."""
    first, second, third, fourth = _words(seed, (token // 4).to(tl.uint32), step)
    place = token % 4
    low = tl.where(place == 0, first, second)
    return _later(score, tl.where(place < 2, low, tl.where(place == 2, third, fourth)))


@triton.jit
def merged(statistics, chunk, there):
    """Maximum and sum of exponentials of a row, of the pair of statistics at which the pointer is."""
    tops = tl.load(statistics + chunk * STATISTICS, mask=there, other=float("-inf"), cache_modifier=".cg")
    sums = tl.load(statistics + chunk * STATISTICS + 1, mask=there, other=0.0, cache_modifier=".cg")
    top = tl.max(tops, 0)
    return top, tl.sum(tl.where(sums > 0, sums * tl.exp(tops - top), 0.0), 0)


@triton.jit
def merged_scores(statistics, chunk, there):
    """As `merged`, of the scores, and whether no token can be taken: the best one is not finite."""
    top, total = merged(statistics + 2, chunk, there)
    marks = tl.load(statistics + chunk * STATISTICS + 4, mask=there, other=0.0, cache_modifier=".cg")
    return top, total, (tl.max(marks, 0) > 0) | (tl.abs(top) == float("inf"))


@triton.jit
def first_best(value, token):
    """The largest value, and the smallest of the tokens that have it."""
    best = tl.max(value, 0)
    return best, tl.min(tl.where(value == best, token, NOWHERE), 0)


@triton.jit
def best_of_chunks(values, ids, chunk, there):
    """`first_best` of what chunks left at these pointers."""
    value = tl.load(values + chunk * STATISTICS, mask=there, other=float("-inf"), cache_modifier=".cg")
    token = tl.load(ids + chunk * 2, mask=there, other=NOWHERE, cache_modifier=".cg")
    return first_best(value, token)


@triton.jit
def leave_choice(chosen, is_bad, row, logits, raw_top, raw_total, tokens, logprobs, seen, counts):
    """Token and log probability of a row; its tables hold the token from now on."""
    if logprobs is not None:
        taken = tl.load(logits + chosen, mask=~is_bad, other=0.0).to(tl.float32)
        tl.store(logprobs + row, tl.where(is_bad, float("nan"), taken - raw_top - tl.log(raw_total)))
    if seen is not None:
        tl.store(seen + chosen, 1, mask=~is_bad)
    if counts is not None:
        tl.store(counts + chosen, tl.load(counts + chosen, mask=~is_bad, other=0) + 1, mask=~is_bad)
    tl.store(tokens + row, tl.where(is_bad, NO_TOKEN, chosen).to(tl.int64))
