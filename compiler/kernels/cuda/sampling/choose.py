"""A token of each row of logits: see `optc::sample_`, `optc::argmax`.

Programs [chunks of the vocabulary, rows] leave statistics of their chunk and run the race in it; the one of a row that
ends last chooses. Rows that top-k, top-p or min-p cut are ended by `cuts`: this leaves the winner of the race among all
tokens, or where top-k cuts a score that the k-th largest is not below.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optc.compiler.kernels.cuda.primitives import wait_for_producer
from optc.compiler.kernels.cuda.sampling.row import (
    LOWEST,
    STATISTICS,
    best_of_chunks,
    cuts_of,
    heat_of,
    leave_choice,
    merged,
    merged_scores,
    penalties_of,
    scores_of,
    times_from,
)
from optc.compiler.kernels.cuda.sampling.threshold import threshold

GROUP = tl.constexpr(64)
"""Neighbours of which only the maximum is kept, to bound the k-th largest score."""


@triton.jit(do_not_specialize=["vocabulary"])
def choose(
    logits, temperatures, top_k, top_p, min_p, repetitions, presences, frequencies, seen, counts, seeds, steps,
    tokens, logprobs, statistics, best, arrivals, maxima, floors, candidates, row_stride, vocabulary,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, GREEDY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row in tl.num_programs(0) chunks (CHUNKS: padded). GREEDY: `argmax`, which takes logits and tokens only.

    statistics float32 [rows, chunks, STATISTICS] and best int32 [rows, chunks, 2] are what chunks leave; arrivals int32
    [rows] is zero before and after. Where there are cuts, maxima float32 [rows, ceil(V / GROUP)] is for top-k, and
    floors float32 [rows] and candidates int32 [rows] are what this leaves: for top-k a score that no kept one is below;
    otherwise the winner and its score.
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    wide_row = row.to(tl.int64)
    chunks = tl.num_programs(0)
    temperature = 1.0
    is_greedy = row >= 0
    has_cut = row < 0
    repetition, presence, frequency = penalties_of(repetitions, presences, frequencies, row)
    if not GREEDY:
        is_greedy, temperature = heat_of(temperatures, row)
        most, share, least, has_cut = cuts_of(top_k, top_p, min_p, row, vocabulary)
        has_cut = has_cut & ~is_greedy
        most = tl.where(is_greedy, 0, most)
        seed = tl.load(seeds + row)
        step = tl.load(steps + row)
    if seen is not None:
        seen += wide_row * vocabulary
    if counts is not None:
        counts += wide_row * vocabulary
    wait_for_producer(PDL)

    logits += wide_row * row_stride
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    raw, score = scores_of(logits, seen, counts, repetition, presence, frequency, temperature, vocabulary, token)
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
        if most > 0:
            if maxima is not None:
                groups = tl.cdiv(vocabulary, GROUP)
                maxima += wide_row * groups
                group = chunk * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP)
                highest = tl.max(tl.reshape(score, [CHUNK // GROUP, GROUP]), 1)
                tl.store(maxima + group, highest, mask=group < groups)
        elif not is_greedy:
            times = times_from(score, chunk * CHUNK, seed, step, CHUNK)
            time, winner = tl.max(times, 0, return_indices=True)
            tl.store(mine + 5, time)
            tl.store(best + here * 2 + 1, chunk * CHUNK + winner)
    tl.debug_barrier()  # all threads' statistics are written before the one that counts says so
    if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == chunks - 1:
        tl.store(arrivals + row, 0)
        lane = tl.arange(0, CHUNKS)
        there = lane < chunks
        all_chunks = statistics + wide_row * chunks * STATISTICS
        ids = best + wide_row * chunks * 2
        raw_top, raw_total = merged(all_chunks, lane, there)
        score_top, score_total, is_bad = merged_scores(all_chunks, lane, there)
        best_value, chosen = best_of_chunks(all_chunks + 2, ids, lane, there)
        if not GREEDY:
            if not (is_greedy | is_bad):
                best_value, chosen = best_of_chunks(all_chunks + 5, ids + 1, lane, there)
            if candidates is not None:
                tl.store(candidates + row, chosen)
                floor = tl.full([], LOWEST, tl.float32)
                if most > 0:
                    if most <= tl.cdiv(vocabulary, GROUP):
                        floor = threshold(
                            maxima, tl.cdiv(vocabulary, GROUP), floor, score_top, most, most + most // 4, score_top,
                            False, BLOCK,
                        )  # fmt: skip
                else:
                    raw_chosen, floor = scores_of(
                        logits, seen, counts, repetition, presence, frequency, temperature, vocabulary, chosen
                    )  # fmt: skip
                tl.store(floors + row, floor)
        if is_bad | ~has_cut:
            leave_choice(chosen, is_bad, row, logits, raw_top, raw_total, tokens, logprobs, seen, counts)
