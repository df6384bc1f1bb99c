"""Feeds tokens of requests to a paged program, in calls of a bounded size: what sessions and models that draft do alike."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from optc.compiler.execution.block_manager import BlockManager, StepInputs

Work = Sequence[tuple[Hashable, Sequence[int]]]
"""Requests, each once, and the tokens that they get, one at least."""
Compute = Callable[[StepInputs], Any]
"""A call -> logits [.., V], which stay as they are in the next one."""


def feed(manager: BlockManager, work: Work, chunk: int, compute: Compute) -> list[Any]:
    """Logits [V] behind the tokens of each request, in calls of `chunk` tokens at most.

    Args:
        compute: gives the logits of the last token of each request of a call.

    Raises:
        ResourceError: the pool has too few free blocks; what was called before stays.
    """
    found: dict[Hashable, Any] = {}
    group: list[tuple[Hashable, Sequence[int]]] = []
    room = chunk

    def flush() -> None:
        found.update(zip((request for request, _ in group), feed_once(manager, group, compute), strict=True))
        group.clear()

    for request, tokens in work:
        rest = tokens
        while len(rest) > room:
            if room:
                group.append((request, rest[:room]))
            rest, room = rest[room:], chunk
            flush()
        group.append((request, rest))
        room -= len(rest)
    flush()
    return [found[request] for request, _ in work]


def feed_once(manager: BlockManager, work: Work, compute: Compute) -> Any:
    """One call; its logits as `compute` gives them. Full blocks can be found by other requests then."""
    logits = compute(manager.step(work))
    for request, _ in work:
        manager.commit(request)
    return logits
