"""What a load consists of: lengths of prompts and answers, and when requests come."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta, Struct

from optc.compiler.diagnostics import JSON_ERRORS, InputError
from optc.compiler.files import read_plain
from optc.runtime.bounds import Count

_LARGEST_TRACE = 1 << 28


class TraceRow(Struct, frozen=True):
    """A request of a trace: its lengths in tokens, and when it came, in seconds since the trace's start."""

    prompt_tokens: Count
    output_tokens: Count
    at: Annotated[float, Meta(ge=0)] | None = None


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests of random tokens, so that no prompt begins as another.

    Attributes:
        prompt_tokens, new_tokens: medians of the lengths.
        sigma: lengths are lognormal with this deviation of their logarithm; 0 makes all equal.
        longest: most tokens of a prompt with its answer.
        vocab_size: tokens are drawn below it.
        trace: lengths (and times) of these, in turn, in place of drawn ones.
        body: further fields of each body.
        embeds: the embeddings of prompts are asked for, one a request.
    """

    prompt_tokens: int
    new_tokens: int
    longest: int
    vocab_size: int
    sigma: float = 0.0
    trace: tuple[TraceRow, ...] = ()
    seed: int = 0
    body: dict[str, Any]
    embeds: bool = False

    def lengths(self, count: int) -> list[tuple[int, int]]:
        """(prompt, answer) of each request, cut to what the context holds."""
        if self.trace:
            rows = [self.trace[i % len(self.trace)] for i in range(count)]
            drawn = np.array([(row.prompt_tokens, row.output_tokens) for row in rows], np.float64)
        else:
            draws = np.random.default_rng([self.seed, 0]).normal(size=(count, 2))
            drawn = np.array([self.prompt_tokens, self.new_tokens]) * np.exp(self.sigma * draws)
        new = np.clip(np.rint(drawn[:, 1]), 2, max(2, self.longest // 2)).astype(int)
        if self.embeds:
            new[:] = 0
        prompt = np.clip(np.rint(drawn[:, 0]), 1, self.longest - new).astype(int)
        return list(zip(prompt.tolist(), new.tolist(), strict=True))

    def bodies(self, count: int) -> Iterator[bytes]:
        """Bodies of the requests, the same for the same seed."""
        draw = np.random.default_rng([self.seed, 1])
        low = min(100, self.vocab_size // 2)  # the first ids are special tokens in many vocabularies
        for prompt, new in self.lengths(count):
            tokens = draw.integers(low, self.vocab_size, prompt).tolist()
            if self.embeds:
                yield msgspec.json.encode({**self.body, "input": tokens})
                continue
            stream = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
            yield msgspec.json.encode({**self.body, "prompt": tokens, "max_tokens": new, **stream})

    def arrivals(self, count: int, rate: float) -> list[float]:
        """Seconds at which requests come: as in the trace, scaled to the rate, else a Poisson process."""
        if self.trace and all(row.at is not None for row in self.trace):
            times = np.array([row.at for row in self.trace], np.float64)
            span = times[-1] * (1 + 1 / len(times)) if times[-1] else 1.0
            rounds = np.arange(-(-count // len(times)))[:, None] * span
            found = (rounds + times[None]).ravel()[:count]
            mean = len(times) / span
            return (found * (mean / rate)).tolist()
        draws = np.random.default_rng([self.seed, 2]).exponential(1 / rate, count)
        return (np.cumsum(draws) - draws[0]).tolist()


def read_trace(path: Path) -> tuple[TraceRow, ...]:
    """A trace of JSON lines, see `TraceRow`.

    Raises:
        InputError: it cannot be read, a line is not of this form, or times go backwards.
    """
    lines = read_plain(path, "reading the trace", most=_LARGEST_TRACE).splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(msgspec.json.decode(line, type=TraceRow))
        except JSON_ERRORS as error:
            raise InputError(
                "a line of the trace cannot be read",
                where=f"{path}, line {number}",
                why=str(error),
                remedy='write {"prompt_tokens": 128, "output_tokens": 64, "at": 0.5}; "at" may be left out',
            ) from error
    if not rows:
        raise InputError("the trace is empty", where=str(path), remedy="write a request a line")
    times = [row.at for row in rows if row.at is not None]
    if times != sorted(times):
        raise InputError("the times of the trace go backwards", where=str(path), remedy="sort its lines by 'at'")
    return tuple(rows)
