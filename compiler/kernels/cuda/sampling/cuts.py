"""A token of each row of logits that top-k, top-p or min-p shortens: see `optc::sample_`.

`choose` has left statistics of chunks. `count_scores` counts tokens by how far they are below the largest score, which
says of all tokens but a few whether the cuts keep them: a bucket bounds the probabilities in it, so that some buckets
stay for certain, and some go. `draw` runs the race among tokens that stay and lists those that may; the program of a row
that ends last finds the exact thresholds in the list, in the order of the vocabulary, and ends the race.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optc.compiler.kernels.cuda.primitives import wait_for_producer
from optc.compiler.kernels.cuda.sampling.row import (
    LOWEST,
    NOWHERE,
    STATISTICS,
    best_of_chunks,
    cuts_of,
    first_best,
    heat_of,
    leave_choice,
    merged,
    merged_scores,
    penalties_of,
    scores_of,
    time_of,
)
from optc.compiler.kernels.cuda.sampling.threshold import threshold

BUCKETS = tl.constexpr(2048)
EVEN = tl.constexpr(1536)
"""Buckets of equal width; the others are sixteen for each doubling of the distance."""
EVEN_BITS = tl.constexpr(0x44C00000)
"""1536.0 as bits."""
BOUNDS = tl.constexpr(3)
"""Integers of a row: from which bucket on tokens may go, from which on behind it they go, tokens before the first."""
SLACK = tl.constexpr(1e-4)
"""Sums in another order differ by less."""


@triton.jit
def _scale(most, share, total, vocabulary):
    """Buckets per unit of score: for top-p so many that tokens beyond the even ones are less than 1 - p together."""
    rest = tl.maximum(0.5 * (1.0 - share) * total / vocabulary, 1e-30)
    return tl.where(most > 0, 64.0, 1.0 / tl.maximum(-tl.log(rest), 0.1) * EVEN)


@triton.jit
def _bucket(score, top, scale):
    """The bucket of scores, by their distance from the top; the first has the largest."""
    distance = tl.maximum(top - score, 0.0) * scale
    beyond = ((distance.to(tl.int32, bitcast=True) - EVEN_BITS) >> 19) + EVEN
    return tl.where(distance < EVEN, tl.minimum(distance, EVEN).to(tl.int32), tl.minimum(beyond, BUCKETS - 1))


@triton.jit
def _edge(bucket, scale):
    """The least distance in a bucket; infinite behind the last one."""
    beyond = (((bucket - EVEN) << 19) + EVEN_BITS).to(tl.float32, bitcast=True)
    edge = tl.where(bucket < EVEN, bucket.to(tl.float32), beyond)
    return tl.where(bucket < BUCKETS, edge / scale, float("inf"))


@triton.jit
def _bounds(held, most, share, total, scale):
    """See BOUNDS, of the numbers of tokens in buckets."""
    bucket = tl.arange(0, BUCKETS)
    reached = tl.cumsum(held, 0)
    weight = held.to(tl.float32)
    target = share * total
    highest = tl.cumsum(weight * tl.exp(-_edge(bucket, scale)), 0)
    lowest = tl.cumsum(weight * tl.exp(-_edge(bucket + 1, scale)), 0)
    sure = tl.sum((highest < target * (1.0 - SLACK)).to(tl.int32), 0)
    last = tl.sum((lowest < target * (1.0 + SLACK)).to(tl.int32), 0)
    if most > 0:
        last = tl.sum((reached < most).to(tl.int32), 0)
        sure = tl.where(share < 1, 0, last)  # what top-p is a share of is the sum of all that top-k keeps
    return sure, last, tl.sum(tl.where(bucket < sure, held, 0), 0)


@triton.jit(do_not_specialize=["vocabulary"])
def count_scores(
    logits, temperatures, top_k, top_p, min_p, repetitions, presences, frequencies, seen, counts,
    statistics, histogram, bounds, arrivals, row_stride, vocabulary,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """histogram int32 [rows, BUCKETS] and arrivals int32 [rows] are zero before and after; bounds int32 [rows, BOUNDS]
    is what this is for."""
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    wide_row = row.to(tl.int64)
    chunks = tl.num_programs(0)
    is_greedy, temperature = heat_of(temperatures, row)
    most, share, least, has_cut = cuts_of(top_k, top_p, min_p, row, vocabulary)
    repetition, presence, frequency = penalties_of(repetitions, presences, frequencies, row)
    if seen is not None:
        seen += wide_row * vocabulary
    if counts is not None:
        counts += wide_row * vocabulary
    wait_for_producer(PDL)
    if ~is_greedy & ((most > 0) | (share < 1)):
        lane = tl.arange(0, CHUNKS)
        top, total, is_bad = merged_scores(statistics + wide_row * chunks * STATISTICS, lane, lane < chunks)
        if ~is_bad:
            scale = _scale(most, share, total, vocabulary)
            token = chunk * CHUNK + tl.arange(0, CHUNK)
            raw, score = scores_of(
                logits + wide_row * row_stride, seen, counts, repetition, presence, frequency, temperature, vocabulary,
                token,
            )  # fmt: skip
            found = tl.histogram(_bucket(score, top, scale), BUCKETS, mask=token < vocabulary)
            places = histogram + wide_row * BUCKETS + tl.arange(0, BUCKETS)
            tl.atomic_add(places, found, mask=found > 0, sem="relaxed")
            tl.debug_barrier()  # all threads have counted before one of them says so
            if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == chunks - 1:
                tl.store(arrivals + row, 0)
                held = tl.load(places, cache_modifier=".cg")
                tl.store(places, 0)
                sure, last, before = _bounds(held, most, share, total, scale)
                tl.store(bounds + row * BOUNDS, sure)
                tl.store(bounds + row * BOUNDS + 1, last)
                tl.store(bounds + row * BOUNDS + 2, before)


@triton.jit
def _gather(listed, listed_ids, statistics, chunks, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """Move what chunks listed at their places together, to the front; returns how many there are, the lowest score and
    the highest."""
    chunk = tl.arange(0, CHUNKS)
    sizes = tl.load(statistics + chunk * STATISTICS + 7, mask=chunk < chunks, other=0.0, cache_modifier=".cg")
    ends = tl.cumsum(sizes.to(tl.int32), 0)
    count = tl.max(ends, 0)
    lowest = tl.full([BLOCK], float("inf"), tl.float32)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < count
        ended = ends[None, :] <= place[:, None]
        owner = tl.sum(ended.to(tl.int32), 1)
        source = owner * CHUNK + place - tl.max(tl.where(ended, ends[None, :], 0), 1)
        score = tl.load(listed + source, mask=inside, other=0.0, cache_modifier=".cg")
        token = tl.load(listed_ids + source, mask=inside, other=0, cache_modifier=".cg")
        tl.debug_barrier()  # a place is read before another thread writes there
        tl.store(listed + place, score, mask=inside)
        tl.store(listed_ids + place, token, mask=inside)
        lowest = tl.minimum(lowest, tl.where(inside, score, float("inf")))
        highest = tl.maximum(highest, tl.where(inside, score, float("-inf")))
    tl.debug_barrier()  # the list is read by other threads than those that wrote it
    return count, tl.min(lowest, 0), tl.max(highest, 0)


@triton.jit
def _mass_from(listed, count, cut, top, BLOCK: tl.constexpr):
    """The sum of exponentials of the list's scores that are not below `cut`."""
    lane = tl.arange(0, BLOCK)
    kept = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        score = tl.load(listed + start + lane, mask=start + lane < count, other=float("-inf"), cache_modifier=".cg")
        kept += tl.where(score >= cut, tl.exp(score - top), 0.0)
    return tl.sum(kept, 0)


@triton.jit
def _race(listed, listed_ids, count, cut, seed, step, BLOCK: tl.constexpr):
    """The best time of the list's tokens whose scores are not below `cut`, and the token."""
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_token = tl.full([BLOCK], NOWHERE, tl.int32)
    for start in range(0, count, BLOCK):
        inside = start + lane < count
        score = tl.load(listed + start + lane, mask=inside, other=float("-inf"), cache_modifier=".cg")
        token = tl.load(listed_ids + start + lane, mask=inside, other=0, cache_modifier=".cg")
        time = tl.where(inside & (score >= cut), time_of(score, token, seed, step), float("-inf"))
        better = time > best
        best = tl.where(better, time, best)
        best_token = tl.where(better, token, best_token)
    return first_best(best, best_token)


@triton.jit(do_not_specialize=["vocabulary"])
def draw(
    logits, temperatures, top_k, top_p, min_p, repetitions, presences, frequencies, seen, counts, seeds, steps,
    tokens, logprobs, statistics, best, bounds, listed, listed_ids, arrivals, row_stride, vocabulary,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """listed float32 and listed_ids int32 [rows, chunks * CHUNK]; the others as in `choose` and `count_scores`."""
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    wide_row = row.to(tl.int64)
    chunks = tl.num_programs(0)
    is_greedy, temperature = heat_of(temperatures, row)
    most, share, least, has_cut = cuts_of(top_k, top_p, min_p, row, vocabulary)
    repetition, presence, frequency = penalties_of(repetitions, presences, frequencies, row)
    seed = tl.load(seeds + row)
    step = tl.load(steps + row)
    if seen is not None:
        seen += wide_row * vocabulary
    if counts is not None:
        counts += wide_row * vocabulary
    wait_for_producer(PDL)
    if has_cut & ~is_greedy:
        lane = tl.arange(0, CHUNKS)
        there = lane < chunks
        all_chunks = statistics + wide_row * chunks * STATISTICS
        top, total, is_bad = merged_scores(all_chunks, lane, there)
        if ~is_bad:
            logits += wide_row * row_stride
            listed += wide_row * chunks * CHUNK
            listed_ids += wide_row * chunks * CHUNK
            sure = row * 0 + BUCKETS  # min-p alone: its threshold is known
            last = row * 0
            before = row * 0
            if (most > 0) | (share < 1):
                sure = tl.load(bounds + row * BOUNDS)
                last = tl.load(bounds + row * BOUNDS + 1)
                before = tl.load(bounds + row * BOUNDS + 2)
            lowest_likely = tl.where(least > 0, top + tl.log(tl.maximum(least, 1e-30)), LOWEST)
            token = chunk * CHUNK + tl.arange(0, CHUNK)
            raw, score = scores_of(
                logits, seen, counts, repetition, presence, frequency, temperature, vocabulary, token
            )  # fmt: skip
            bucket = _bucket(score, top, _scale(most, share, total, vocabulary))
            stays = (score > float("-inf")) & (bucket < sure)
            mine = all_chunks + chunk * STATISTICS
            ids = best + wide_row * chunks * 2 + 1
            time = tl.where(stays & (score >= lowest_likely), time_of(score, token, seed, step), float("-inf"))
            time, winner = tl.max(time, 0, return_indices=True)
            tl.store(mine + 5, time)
            tl.store(ids + chunk * 2, chunk * CHUNK + winner)
            tl.store(mine + 6, tl.sum(tl.where(stays, tl.exp(score - top), 0.0), 0))
            may = ((score > float("-inf")) & (bucket >= sure) & (bucket <= last)).to(tl.int32)
            place = chunk * CHUNK + tl.cumsum(may, 0) - 1
            tl.store(listed + place, score, mask=may > 0)
            tl.store(listed_ids + place, token, mask=may > 0)
            tl.store(mine + 7, tl.sum(may, 0).to(tl.float32))
            tl.debug_barrier()  # all threads have listed before one of them says so
            if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == chunks - 1:
                tl.store(arrivals + row, 0)
                count, cut, highest = _gather(listed, listed_ids, all_chunks, chunks, CHUNK, CHUNKS, BLOCK)
                if count > 0:
                    if most > 0:
                        wanted = (most - before).to(tl.float32)
                        cut = threshold(listed, count, cut, highest, wanted, top, False, BLOCK)
                        if share < 1:
                            total = _mass_from(listed, count, cut, top, BLOCK)
                    if share < 1:
                        masses = tl.load(
                            all_chunks + lane * STATISTICS + 6, mask=there, other=0.0, cache_modifier=".cg"
                        )
                        wanted = share * total - tl.sum(masses, 0)
                        cut = threshold(listed, count, cut, highest, wanted, top, True, BLOCK)
                best_time, chosen = best_of_chunks(all_chunks + 5, ids, lane, there)
                other_time, other = _race(
                    listed, listed_ids, count, tl.maximum(cut, lowest_likely), seed, step, BLOCK
                )  # fmt: skip
                better = (other_time > best_time) | ((other_time == best_time) & (other < chosen))
                raw_top, raw_total = merged(all_chunks, lane, there)
                leave_choice(
                    tl.where(better, other, chosen), is_bad, row, logits, raw_top, raw_total, tokens, logprobs, seen,
                    counts,
                )  # fmt: skip
