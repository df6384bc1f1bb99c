"""What the scheduler is given and gives: requests, steps, and requests that ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import numpy as np
from torch import Tensor

from optc.compiler.ir.contract import OutputRole
from optc.runtime.serving.request import EngineMetrics, Finish
from optc.runtime.serving.rows import Ints, Kind
from optc.runtime.speculative.figures import SpeculativeFigures
from optc.runtime.speculative.shape import Shape


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """A request as it is scheduled.

    Attributes:
        tokens: the prompt, and what was generated when it was last made to wait.
        prompt_length: of them, the prompt's.
        end: tokens in all at which it ends with `end_reason`.
        single: none of its tokens may be fed before the host has seen it. kind: see `Rows`.
        arrival: a number that grows.
        overtaken: later arrivals that were admitted while it was the first of all that wait.
        row: where it runs, or -1.
        found: of the prompt, tokens that the pool held; None before the first admission.
        told, plain: while it has no row, see `Rows`.
    """

    id: str
    tokens: list[int]
    prompt_length: int
    end: int
    end_reason: Finish
    stops: list[int]
    priority: int = 0
    single: bool = False
    kind: Kind = Kind.GREEDY
    arrival: int = 0
    urgent: bool = False
    overtaken: int = 0
    row: int = -1
    found: int | None = None
    waits: bool = False
    told: int = 0
    plain: bool = False

    @property
    def rank(self) -> tuple[bool, int, int]:
        """Smaller ones go first and give way last."""
        return (not self.urgent, 0 if self.urgent else self.priority, self.arrival)


class Piece(NamedTuple):
    """Tokens of a row from `start` on, `size` of them; `last` says that the next one is to be chosen."""

    row: int
    start: int
    size: int
    last: bool


@dataclass(slots=True)
class Plan:
    """A step.

    Attributes:
        decodes: int64 [D], rows that are fed the token that was chosen last, ascending, at `positions`.
        drafted: int64 [D], how many drafted tokens, see `Rows`, each of them is fed behind it.
        pieces: of prompts.
        rows: int64 [D + P], the rows that get tokens: `decodes`, then those of last pieces, in order.
        serials: of them, see `Rows`.
        grown: rows and columns of `Rows.tables` that are new since the plan before.
        moved: rows whose requests have other rows since then: from, to.
        copied: blocks that are to be copied in front of the step: from which by to which; see `BlockManager.fork`.
        shape: of the drafts, where they are trees; a row with fewer tokens has the first of them.
        steps: of decodes alone that follow each other, each fed what the one before chose; 1 with drafts or pieces.
    """

    decodes: Ints
    positions: Ints
    drafted: Ints
    pieces: list[Piece]
    rows: Ints
    serials: Ints
    grown: list[tuple[int, int]]
    moved: list[tuple[int, int]]
    steps: int = 1
    copied: dict[int, int] = field(default_factory=dict)
    shape: Shape | None = None

    @property
    def tokens(self) -> int:
        """That each of its steps feeds."""
        return len(self.decodes) + int(self.drafted.sum()) + sum(piece.size for piece in self.pieces)


class Rounds(NamedTuple):
    """What M rounds of drafts that follow each other on the device gave to the D decodes of a plan.

    Attributes:
        verified: int64 [M, D], drafted tokens that were fed behind a row's last token.
        kept: int64 [M, D], the row's next tokens; 0 where it had no slots left.
        steady: they followed those of the step before without a pause.
    """

    verified: Ints
    kept: Ints
    steady: bool


class Chosen(NamedTuple):
    """What a step gave to the R rows of its plan.

    Attributes:
        tokens: int64 [R, W], behind each token that a row was fed the one that the model says is next; `NO_TOKEN` (-1) where
            its logits were not finite. What fills up the row is no token.
        counts: int64 [R], 1 to W: so many are the row's next ones. Those behind follow a drafted token that was rejected.
        rounds: of a step of rounds, see `Rounds`.
        path: int64 [R, W], of trees: behind which of the tokens that a row was fed each of its next ones stands.
        outputs: what the program gave beside the logits, by role: [N, ...], of the tokens that were fed, or, of a program
            that selects rows, of those whose logits were wanted; in the order in which they were fed.
    """

    tokens: Ints
    counts: Ints
    outputs: Mapping[OutputRole, Tensor] = {}
    rounds: Rounds | None = None
    path: Ints | None = None

    @classmethod
    def one_each(cls, tokens: Ints) -> Self:
        """Of a step without drafts, from tokens [R]."""
        return cls(tokens[:, None], np.ones(len(tokens), np.int64))


class Ended(NamedTuple):
    """A request that ended, with all its tokens, and the number of those of its prompt."""

    request: Request
    tokens: list[int]
    finish: Finish


@dataclass(slots=True)
class Counts:
    """Since the start."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    admissions: int = 0  # first ones
    finished: dict[str, int] = field(default_factory=dict)

    def metrics(
        self,
        *,
        running: int,
        waiting: int,
        host_us: float,
        used_blocks: int = 0,
        speculation: SpeculativeFigures | None = None,
    ) -> EngineMetrics:
        """With gauges of now."""
        return EngineMetrics(
            running=running,
            waiting=waiting,
            used_blocks=used_blocks,
            steps=self.steps,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            generated_tokens=self.generated_tokens,
            preemptions=self.preemptions,
            finished=dict(self.finished),
            host_us_per_step=host_us,
            speculation=speculation,
        )
