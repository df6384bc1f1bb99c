"""Which requests a drafter's own KV cache has room for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from optc.compiler.execution.block_manager import BlockManager
from optc.runtime.speculative.drafter import Ask


def fitting(
    asks: Sequence[Ask],
    manager: BlockManager,
    held: Iterable[str],
    forget: Callable[[str], None],
) -> list[Ask]:
    """Those of the asks whose tokens and drafts fit into a cache, where requests that asked longest ago have given way.

    Args:
        held: requests that the cache holds, those that asked last come last.
        forget: gives up what the cache holds of a request.
    """
    found: list[Ask] = []
    needed, size = 0, manager.block_size
    asking, known = {ask.id for ask in asks}, list(held)
    others = [name for name in known if name not in asking]
    for ask in asks:
        owned = len(manager.blocks(ask.id)) if ask.id in known else 0
        missing = max(0, -(-(len(ask.tokens) + ask.most) // size) - owned) + 1  # one more where a shared one is left
        while others and manager.free_blocks < needed + missing:
            forget(others.pop(0))
        if manager.free_blocks >= needed + missing:
            needed += missing
            found.append(ask)
    return found
