"""Regular expressions of others, in bounded time: those of a folder's config, and those that a user copied.

Python's `re` takes exponential time for some; the library `regex` (a requirement of transformers) stops after a while.
"""

from __future__ import annotations

import functools
from typing import Any

SECONDS = 0.5
LONGEST = 1000
"""Characters of a pattern."""


def begins_with(pattern: str, text: str) -> bool:
    """Whether a regular expression fits the beginning of a text, as `re.match` has it.

    Raises:
        ValueError: the pattern is none, is longer than LONGEST, or takes longer than SECONDS on this text; says which.
    """
    try:
        return _compiled(pattern).match(text, timeout=SECONDS) is not None
    except TimeoutError as error:
        raise ValueError(f"it takes longer than {SECONDS} s for '{text[:80]}'") from error


@functools.lru_cache(maxsize=256)
def _compiled(pattern: str) -> Any:
    import regex  # here: few folders have patterns

    if len(pattern) > LONGEST:
        raise ValueError(f"it has {len(pattern)} characters, more than {LONGEST}")
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError) as error:
        raise ValueError(f"it is no regular expression: {error}") from error
