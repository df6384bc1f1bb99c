"""What speculation gave since an engine was opened."""

from __future__ import annotations

from typing import Any

from msgspec import Struct


class SpeculativeFigures(Struct, frozen=True, kw_only=True):
    """Counters, and gauges of now.

    Attributes:
        verified: drafts that were verified, each in one step of its request.
        drafted: tokens of them.
        drafted_at: of them, how many had a token at each place of the draft; of trees, at each depth.
        accepted_at: how many had it accepted.
        draft_seconds: spent in the drafter.
        depth: tokens that are drafted at the moment, at most, one behind the other; 0 where drafts do not pay.
        tree: guesses of the tree that is drafted at the moment; 0 where it is a chain.
        speedup: tokens of a step with drafts over its cost relative to a plain one, in the last steps; None before it is known.
    """

    method: str
    verified: int = 0
    drafted: int = 0
    drafted_at: list[int] = []
    accepted_at: list[int] = []
    draft_seconds: float = 0.0
    depth: int = 0
    tree: int = 0
    speedup: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON, with what follows from the counters."""
        return {
            "method": self.method,
            "acceptance_length": self.acceptance_length,
            "acceptance_by_position": self.acceptance_by_position,
            "verified": self.verified,
            "drafted_tokens": self.drafted,
            "accepted_tokens": self.accepted_tokens,
            "draft_seconds": self.draft_seconds,
            "depth": self.depth,
            "tree": self.tree,
            "speedup": self.speedup,
        }

    @property
    def accepted_tokens(self) -> int:
        return sum(self.accepted_at)

    @property
    def acceptance_length(self) -> float | None:
        """Mean tokens that a step gave to a request whose draft it verified, 1 at least."""
        return 1 + self.accepted_tokens / self.verified if self.verified else None

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of the drafts that had a token at each place in which it was accepted."""
        return [kept / made for kept, made in zip(self.accepted_at, self.drafted_at, strict=True) if made]
