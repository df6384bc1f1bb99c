"""The processes of a training run."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """The processes that torchrun started; one without it."""

    size: int = 1
    rank: int = 0
    local_rank: int = 0

    @staticmethod
    def from_environment() -> World:
        """WORLD_SIZE, RANK and LOCAL_RANK."""
        read = {
            key: os.environ.get(key, default)
            for key, default in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))
        }
        return World(int(read["WORLD_SIZE"]), int(read["RANK"]), int(read["LOCAL_RANK"]))
