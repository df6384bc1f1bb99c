"""A token of each row of logits that top-k, top-p or min-p cuts: see `optc::sample_`.

The race of `choose` among all tokens has the same winner as the race among the tokens that stay, if that winner stays.
So without top-k there is no threshold to be found: the winner stays if what is above it has less than p of the sum and
it has enough of the largest. Where it goes, so do all that are not above it, and the race is run again among those that
are: what is left shrinks by a factor of e on average, as in quickselect.

With top-k, `choose` has left a bound (the k-th largest maximum of groups of neighbours, each of which has a score that
large): the few tokens that are not below it are listed, and the thresholds are found in the list.

Programs are [chunks of the vocabulary, rows], and the last one of a row ends it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optc.compiler.kernels.cuda.primitives import wait_for_producer
from optc.compiler.kernels.cuda.sampling.row import (
    LOWEST,
    NOWHERE,
    STATISTICS,
    cuts_of,
    first_best,
    heat_of,
    leave_choice,
    merged,
    merged_scores,
    penalties_of,
    scores_of,
    times_from,
    times_of,
)
from optc.compiler.kernels.cuda.sampling.threshold import threshold, weigh


@triton.jit
def _chosen_of_list(
    listed, listed_ids, count, floor, top, most, share, lowest_likely, seed, step, BLOCK: tl.constexpr
):  # fmt: skip
    """The token that wins among those of the list that top-k, top-p and min-p keep."""
    cut = threshold(listed, count, floor, top, most, most, top, False, BLOCK)
    lane = tl.arange(0, BLOCK)
    if share < 1:
        total = tl.full([], 0, tl.int64)
        for start in range(0, count, BLOCK):
            score = tl.load(listed + start + lane, mask=start + lane < count, other=float("-inf"), cache_modifier=".cg")
            total += tl.sum(tl.where(score >= cut, weigh(score, top, True), 0), 0)
        wanted = (share.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
        cut = threshold(listed, count, cut, top, wanted, wanted, top, True, BLOCK)
    cut = tl.maximum(cut, lowest_likely)
    best = tl.full([], float("-inf"), tl.float32)
    chosen = tl.full([], NOWHERE, tl.int32)
    for start in range(0, count, BLOCK):
        inside = start + lane < count
        score = tl.load(listed + start + lane, mask=inside, other=float("-inf"), cache_modifier=".cg")
        token = tl.load(listed_ids + start + lane, mask=inside, other=NOWHERE, cache_modifier=".cg")
        stays = inside & (score >= cut)
        time, first = first_best(tl.where(stays, times_of(score, token, seed, step), float("-inf")), token)
        better = (time > best) | ((time == best) & (first < chosen))
        best = tl.where(better, time, best)
        chosen = tl.where(better, first, chosen)
    return chosen


@triton.jit
def _mass_above(scores_at, floor, top):
    return tl.sum(tl.where(scores_at > floor, tl.exp(scores_at - top), 0.0), 0)


@triton.jit(do_not_specialize=["vocabulary"])
def cut_and_choose(
    logits, temperatures, top_k, top_p, min_p, repetitions, presences, frequencies, seen, counts, seeds, steps,
    tokens, logprobs, statistics, arrivals, floors, candidates, listed, listed_ids, lengths, row_stride, vocabulary,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """listed float32 and listed_ids int32 [rows, V]; lengths int32 [rows] is zero before and after. The others as in
    `choose`."""
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
    lane = tl.arange(0, CHUNKS)
    there = lane < chunks
    all_chunks = statistics + wide_row * chunks * STATISTICS
    top, total, is_bad = merged_scores(all_chunks, lane, there)
    if has_cut & ~(is_greedy | is_bad):
        logits += wide_row * row_stride
        listed += wide_row * vocabulary
        listed_ids += wide_row * vocabulary
        floor = tl.load(floors + row)
        lowest_likely = tl.where(least > 0, top + tl.log(tl.maximum(least, 1e-30)), LOWEST)
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        if (most > 0) | (share < 1):
            raw, score = scores_of(
                logits, seen, counts, repetition, presence, frequency, temperature, vocabulary, token
            )  # fmt: skip
            if most > 0:
                stays = (score >= floor).to(tl.int32)
                found = tl.sum(stays, 0)
                if found > 0:
                    place = tl.atomic_add(lengths + row, found, sem="relaxed") + tl.cumsum(stays, 0) - 1
                    tl.store(listed + place, score, mask=stays > 0)
                    tl.store(listed_ids + place, token, mask=stays > 0)
            else:
                tl.store(all_chunks + chunk * STATISTICS + 6, _mass_above(score, floor, top))
        tl.debug_barrier()  # what all threads wrote is there before one of them says so
        if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == chunks - 1:
            tl.store(arrivals + row, 0)
            chosen = tl.load(candidates + row)
            if most > 0:
                count = tl.load(lengths + row, cache_modifier=".cg")
                tl.debug_barrier()  # all threads have read it
                tl.store(lengths + row, 0)
                chosen = _chosen_of_list(
                    listed, listed_ids, count, floor, top, most, share, lowest_likely, seed, step, BLOCK
                )  # fmt: skip
            else:
                masses = tl.load(all_chunks + lane * STATISTICS + 6, mask=there, other=0.0, cache_modifier=".cg")
                above = tl.where(share < 1, tl.sum(masses, 0), 0.0)
                share = tl.where(share < 1, share, 2.0)
                while (floor < lowest_likely) | (above >= share * total):
                    best = tl.full([], float("-inf"), tl.float32)
                    for start in range(0, vocabulary, CHUNK):
                        token = start + tl.arange(0, CHUNK)
                        raw, score = scores_of(
                            logits, seen, counts, repetition, presence, frequency, temperature, vocabulary, token
                        )  # fmt: skip
                        times = times_from(score, start, seed, step, CHUNK)
                        stays = (score > floor) & (score >= lowest_likely)
                        time, first = first_best(tl.where(stays, times, float("-inf")), token)
                        chosen = tl.where(time > best, first, chosen)
                        best = tl.maximum(best, time)
                    raw_chosen, floor = scores_of(
                        logits, seen, counts, repetition, presence, frequency, temperature, vocabulary, chosen
                    )  # fmt: skip
                    above = 0.0
                    if share <= 1:
                        for start in range(0, vocabulary, CHUNK):
                            raw, score = scores_of(
                                logits, seen, counts, repetition, presence, frequency, temperature, vocabulary,
                                start + tl.arange(0, CHUNK),
                            )  # fmt: skip
                            above += _mass_above(score, floor, top)
            raw_top, raw_total = merged(all_chunks, lane, there)
            leave_choice(chosen, is_bad, row, logits, raw_top, raw_total, tokens, logprobs, seen, counts)
