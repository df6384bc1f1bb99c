"""Runs engines in tests: requests in, all their answers out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from optc.runtime.serving.interface import Engine
from optc.runtime.serving.request import Answer, Generate


@dataclass
class Got:
    """All answers to one request."""

    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    answers: list[Answer] = field(default_factory=list)


def run(
    engine: Engine, requests: Iterable[Generate] = (), *, got: dict[str, Got] | None = None, most: int = 2000
) -> dict[str, Got]:
    """Submit and step until all have ended; adds to `got`."""
    got = {} if got is None else got
    for request in requests:
        engine.submit(request)
    for _ in range(most):
        if engine.idle:
            return got
        take(got, engine.step())
    raise AssertionError("requests are left")


def take(got: dict[str, Got], answers: Sequence[Answer]) -> None:
    for answer in answers:
        item = got.setdefault(answer.id, Got())
        assert item.finish is None, "an answer after the last"
        item.tokens += answer.tokens
        item.finish = answer.finish
        item.answers.append(answer)
