"""Seeds of several answers to one prompt."""

from __future__ import annotations

import hashlib


def choice_seed(seed: int, choice: int) -> int:
    """The first choice has the seed that was given; each of the others one that follows from it."""
    if choice == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed} {choice}".encode(), digest_size=7).digest(), "big")
