"""Sessions that choose tokens on their device, so that steps follow each other without the host."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from optc.runtime.sampling import Sampling
from optc.runtime.sessions.session import Logits, Session


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How the tokens of a row are chosen.

    Attributes:
        sampling: its seed does not count here.
        prompt_length: tokens of the row that were not generated.
        seed: 64 bits, signed. With the position of the token that was fed last it fixes what is drawn.
    """

    sampling: Sampling = field(default_factory=Sampling)
    prompt_length: int = 0
    seed: int = 0


Choice = Literal["greedy", "drawn", "penalized"]
"""What a batch needs: the largest logits, draws, or draws with tables of tokens."""


def choice_of(draws: Sequence[Draw]) -> Choice:
    """The least that serves all rows."""
    if any(draw.sampling.penalizes for draw in draws):
        return "penalized"
    return "drawn" if any(not draw.sampling.greedy for draw in draws) else "greedy"


class StreamingSession(Session):
    """A session that chooses tokens.

    What a row draws depends on its own logits, seed and position, and on nothing else: not on the other rows, and not on
    how steps are divided between calls.
    """

    @abstractmethod
    def choose(self, logits: Logits, draws: Sequence[Draw]) -> list[int]:
        """The next token of every row, from its last logits [B, V].

        Raises:
            GateError: logits that are not finite.
        """

    @abstractmethod
    def stream(
        self, tokens: Sequence[int | None], steps: int, draws: Sequence[Draw] | None = None
    ) -> Iterator[list[int | None]]:
        """Append one token to every row and yield the chosen next ones, which are appended in turn, and so on.

        Each yield is a `decode` of the tokens before it, and a choice. A caller may stop at any time; the tokens of the
        last yield are not in the cache.

        Args:
            tokens: one per row, of which there is one at least; a row with None stays as it is, and yields None.
            steps: most yields.
            draws: one per row; None takes the largest logit everywhere.

        Raises:
            InputError: as `decode`.
            GateError: logits that are not finite.
        """
