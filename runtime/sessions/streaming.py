"""Sessions that choose tokens on their device, so that steps follow each other without the host."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from optc.runtime.sessions.session import Logits, Session


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How the tokens of a row are chosen; the arguments of `optc::sample_`.

    Attributes:
        temperature: divides the logits; 0 takes the largest, whatever the rest says.
        top_k, top_p, min_p: cuts; 0, 1 and 0 keep all.
        repetition_penalty, presence_penalty, frequency_penalty: 1, 0 and 0 change nothing; others hold for greedy rows
            too.
        prompt_length: tokens of the row that were not generated.
        seed: 64 bits, signed. With the position of the token that was fed last it fixes what is drawn.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    prompt_length: int = 0
    seed: int = 0

    @property
    def penalizes(self) -> bool:
        """Whether the choice depends on which tokens the row holds."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


Choice = Literal["greedy", "drawn", "penalized"]
"""What a batch needs: the largest logits, draws, or draws with tables of tokens."""


def choice_of(draws: Sequence[Draw]) -> Choice:
    """The least that serves all rows."""
    if any(draw.penalizes for draw in draws):
        return "penalized"
    return "drawn" if any(draw.temperature > 0 for draw in draws) else "greedy"


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
