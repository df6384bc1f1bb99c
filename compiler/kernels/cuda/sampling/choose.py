"""A token of each row of logits: see `optc::sample_`, `optc::argmax`.

Programs [chunks of the vocabulary, rows] leave statistics of their chunk; the one of a row that ends last makes its
choice. Rows that cut nothing run the race inside the chunks. For the others the last program first drops what no cut
can keep, by bounds that are cheap (see `_floor`), writes the rest as a list, and finds the exact thresholds in it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optc.compiler.kernels.cuda.primitives import wait_for_producer
from optc.compiler.kernels.cuda.sampling.threshold import threshold

STATISTICS = tl.constexpr(8)
"""Floats that a chunk leaves: maximum and sum of exponentials of the logits, the same of the scores, whether one is
not a number, and the best time of the race."""
NO_TOKEN = tl.constexpr(-1)
LOWEST = tl.constexpr(-3.0e38)
"""Below all scores that can be drawn, as -inf cannot."""
GROUP = tl.constexpr(64)
"""Neighbours of which only the maximum is kept, to bound the k-th largest score."""


@triton.jit
def _scores(
    logits, seen, counts, repetition, presence, frequency, temperature, vocabulary, token
):  # fmt: skip
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
def _race(score, token, seed, step):
    """score - log E with the exponential number E of (seed, step, token): the largest wins."""
    counter = token.to(tl.uint32)
    nothing = counter * 0
    bits, _, _, _ = tl.philox(seed, counter, nothing + step.to(tl.uint32), nothing, nothing)
    uniform = ((bits >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608.0)
    return score - tl.log(-tl.log(uniform))


@triton.jit
def _merge_chunks(statistics, chunk, there):
    """Maximum and sum of exponentials of a row, of the pair of statistics at which the pointer is."""
    tops = tl.load(statistics + chunk * STATISTICS, mask=there, other=float("-inf"), cache_modifier=".cg")
    sums = tl.load(statistics + chunk * STATISTICS + 1, mask=there, other=0.0, cache_modifier=".cg")
    top = tl.max(tops, 0)
    return top, tl.sum(tl.where(sums > 0, sums * tl.exp(tops - top), 0.0), 0)


@triton.jit
def _first_best(values, ids, chunk, there):
    """The id of the largest of the chunks' values, the smallest among equals."""
    value = tl.load(values + chunk * STATISTICS, mask=there, other=float("-inf"), cache_modifier=".cg")
    token = tl.load(ids + chunk * 2, mask=there, other=2147483647, cache_modifier=".cg")
    return tl.min(tl.where(there & (value == tl.max(value, 0)), token, 2147483647), 0)


@triton.jit
def _floor(maxima, groups, top, total, vocabulary, most, share, least, BLOCK: tl.constexpr):
    """A score that is not above any threshold of the cuts.

    top-k: the k-th largest maximum of groups, as each has a score that large. Without it: min-p's threshold itself, and
    for top-p a weight below (1 - p) / V of the sum, as all of those together are less than 1 - p. With top-k these two
    must stay out: what top-p is a share of is the sum of all that top-k keeps.
    """
    floor = top * 0 + LOWEST
    if most > 0:
        if most <= groups:
            floor = threshold(maxima, groups, floor, top, most.to(tl.float32), top, False, BLOCK)
    else:
        floor = tl.maximum(floor, _least_score(top, least))
        if share < 1:  # half of it: sums are rounded
            floor = tl.maximum(floor, top + tl.log(0.5 * (1.0 - share) * total / vocabulary))
    return floor


@triton.jit
def _least_score(top, least):
    """min-p's threshold."""
    return tl.where(least > 0, top + tl.log(tl.maximum(least, 1e-30)), LOWEST)


@triton.jit
def _draw(
    logits, seen, counts, repetition, presence, frequency, temperature, vocabulary, maxima, listed, listed_ids,
    top, total, most, share, least, seed, step, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The token of a row with cuts."""
    groups = tl.cdiv(vocabulary, GROUP)
    most = tl.where(most < vocabulary, most, 0)
    floor = _floor(maxima, groups, top, total, vocabulary, most, share, least, BLOCK)
    count = vocabulary * 0
    lane = tl.arange(0, CHUNK)
    for start in range(0, vocabulary, CHUNK):
        _, score = _scores(
            logits, seen, counts, repetition, presence, frequency, temperature, vocabulary, start + lane
        )  # fmt: skip
        stays = (score >= floor).to(tl.int32)
        place = count + tl.cumsum(stays, 0) - 1
        tl.store(listed + place, score, mask=stays > 0)
        tl.store(listed_ids + place, start + lane, mask=stays > 0)
        count += tl.sum(stays, 0)
    tl.debug_barrier()  # the list is read by other threads than those that wrote it
    cut = floor
    if most > 0:
        cut = threshold(listed, count, floor, top, most.to(tl.float32), top, False, BLOCK)
    lane = tl.arange(0, BLOCK)
    if share < 1:
        if most > 0:  # top-p is of what top-k kept
            kept = tl.zeros([BLOCK], tl.float32)
            for start in range(0, count, BLOCK):
                score = tl.load(listed + start + lane, mask=start + lane < count, other=float("-inf"))
                kept += tl.where(score >= cut, tl.exp(score - top), 0.0)
            total = tl.sum(kept, 0)
        cut = threshold(listed, count, cut, top, share * total, top, True, BLOCK)
    cut = tl.maximum(cut, _least_score(top, least))
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_token = tl.full([BLOCK], 2147483647, tl.int32)
    for start in range(0, count, BLOCK):
        inside = start + lane < count
        score = tl.load(listed + start + lane, mask=inside, other=float("-inf"))
        token = tl.load(listed_ids + start + lane, mask=inside, other=0)
        time = tl.where(inside & (score >= cut), _race(score, token, seed, step), float("-inf"))
        better = time > best
        best = tl.where(better, time, best)
        best_token = tl.where(better, token, best_token)
    return tl.min(tl.where(best == tl.max(best, 0), best_token, 2147483647), 0)


@triton.jit(do_not_specialize=["vocabulary"])
def choose(
    logits, temperatures, top_k, top_p, min_p, repetitions, presences, frequencies, seen, counts, seeds, steps,
    tokens, logprobs, statistics, best, maxima, listed, listed_ids, arrivals,
    row_stride, vocabulary,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, GREEDY: tl.constexpr, CUTS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One row in tl.num_programs(0) chunks (CHUNKS: padded). GREEDY: `argmax`, which takes logits and tokens only.
    CUTS: there are any of top_k, top_p and min_p.

    statistics float32 [rows, chunks, STATISTICS] and best int32 [rows, chunks, 2] are what chunks leave; maxima float32
    [rows, ceil(V / GROUP)], listed float32 and listed_ids int32 [rows, V] are for cuts; arrivals int32 [rows] is zero
    before and after.
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    wide_row = row.to(tl.int64)
    chunks = tl.num_programs(0)
    temperature = 1.0
    repetition = 1.0
    presence = 0.0
    frequency = 0.0
    is_greedy = row >= 0
    has_cut = row < 0
    most = row * 0
    share = tl.full([], 1.0, tl.float32)
    least = tl.full([], 0.0, tl.float32)
    if not GREEDY:
        given = tl.load(temperatures + row)
        is_greedy = given <= 0
        temperature = tl.where(is_greedy, 1.0, given)
        if top_k is not None:
            most = tl.load(top_k + row)
        if top_p is not None:
            share = tl.load(top_p + row)
        if min_p is not None:
            least = tl.load(min_p + row)
        has_cut = (most > 0) | (share < 1) | (least > 0)
        if repetitions is not None:
            repetition = tl.load(repetitions + row)
        if presences is not None:
            presence = tl.load(presences + row)
        if frequencies is not None:
            frequency = tl.load(frequencies + row)
        seed = tl.load(seeds + row)
        step = tl.load(steps + row)
        if seen is not None:
            seen += wide_row * vocabulary
        if counts is not None:
            counts += wide_row * vocabulary
    wait_for_producer(PDL)

    logits += wide_row * row_stride
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    raw, score = _scores(logits, seen, counts, repetition, presence, frequency, temperature, vocabulary, token)
    here = wide_row * chunks + chunk
    mine = statistics + here * STATISTICS
    raw_top = tl.max(raw, 0)
    top, first = tl.max(score, 0, return_indices=True)
    tl.store(mine, raw_top)
    tl.store(mine + 1, tl.sum(tl.where(raw > float("-inf"), tl.exp(raw - raw_top), 0.0), 0))
    tl.store(mine + 2, top)
    tl.store(mine + 3, tl.sum(tl.where(score > float("-inf"), tl.exp(score - top), 0.0), 0))
    tl.store(mine + 4, tl.max((score != score).to(tl.float32), 0))
    tl.store(best + here * 2, chunk * CHUNK + first)
    if not GREEDY:
        if CUTS:
            if has_cut:
                group = chunk * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP)
                groups = tl.cdiv(vocabulary, GROUP)
                highest = tl.max(tl.reshape(score, [CHUNK // GROUP, GROUP]), 1)
                tl.store(maxima + wide_row * groups + group, highest, mask=group < groups)
        if not (has_cut | is_greedy):
            time, winner = tl.max(_race(score, token, seed, step), 0, return_indices=True)
            tl.store(mine + 5, time)
            tl.store(best + here * 2 + 1, chunk * CHUNK + winner)
    tl.debug_barrier()  # all threads' statistics are written before the one that counts says so
    if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == chunks - 1:
        tl.store(arrivals + row, 0)
        lane = tl.arange(0, CHUNKS)
        there = lane < chunks
        all_chunks = statistics + wide_row * chunks * STATISTICS
        ids = best + wide_row * chunks * 2
        raw_top, raw_total = _merge_chunks(all_chunks, lane, there)
        top, total = _merge_chunks(all_chunks + 2, lane, there)
        is_bad = tl.max(tl.load(all_chunks + lane * STATISTICS + 4, mask=there, other=0.0, cache_modifier=".cg"), 0) > 0
        is_bad = is_bad | (tl.abs(top) == float("inf"))
        chosen = _first_best(all_chunks + 2, ids, lane, there)
        if not GREEDY:
            if not (is_greedy | is_bad):
                if not has_cut:
                    chosen = _first_best(all_chunks + 5, ids + 1, lane, there)
                elif CUTS:
                    chosen = _draw(
                        logits, seen, counts, repetition, presence, frequency, temperature, vocabulary,
                        maxima + wide_row * tl.cdiv(vocabulary, GROUP), listed + wide_row * vocabulary,
                        listed_ids + wide_row * vocabulary, top, total, most, share, least, seed, step, CHUNK, BLOCK,
                    )  # fmt: skip
            taken = tl.load(logits + chosen, mask=~is_bad, other=0.0).to(tl.float32)
            logprob = taken - raw_top - tl.log(raw_total)
            tl.store(logprobs + row, tl.where(is_bad, float("nan"), logprob))
            if seen is not None:
                tl.store(seen + chosen, 1, mask=~is_bad)
            if counts is not None:
                tl.store(counts + chosen, tl.load(counts + chosen, mask=~is_bad, other=0) + 1, mask=~is_bad)
        tl.store(tokens + row, tl.where(is_bad, NO_TOKEN, chosen).to(tl.int64))
