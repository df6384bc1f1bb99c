"""What guesses the next tokens of requests: one interface, and nothing of it can change what is generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch import Tensor

from optc.compiler.ir.contract import OutputRole
from optc.runtime.sampling import Sampling
from optc.runtime.speculative.shape import Shape

Tokens = npt.NDArray[np.integer]
Uniforms = npt.NDArray[np.float64]


class Ask(NamedTuple):
    """A request whose next tokens are to be guessed.

    Attributes:
        id: of the request; its `tokens` only grow from one ask to the next.
        tokens: [n], its prompt and all that it generated; not to be kept or changed.
        most: tokens that can be used, 1 at least.
        sampling: how the next tokens are drawn; greedy ones are not.
        shape: of the draft, where it is a tree; `most` is that of its guesses then.
        uniforms: float64 [most], the numbers that they are drawn by, one after another; empty where they are not.
    """

    id: str
    tokens: Tokens
    most: int
    sampling: Sampling = Sampling()
    uniforms: Uniforms = np.zeros(0)
    shape: Shape | None = None


class Verified(NamedTuple):
    """What the model said to a draft.

    Attributes:
        tokens: [n] as the request asked.
        drafted: [k], the tokens that were fed.
        decided: [k + 1], what the model says is next behind the last token, and behind each drafted one.
        accepted: so many drafted tokens were kept; `decided[:accepted + 1]` are the request's next tokens.
    """

    id: str
    tokens: Tokens
    drafted: Tokens
    decided: Tokens
    accepted: int


class Fed(NamedTuple):
    """Tokens of a request that a step fed, and what the program gave at them beside their logits.

    Attributes:
        start: position of the first of them.
        kept: so many of them stay the request's, 1 at least; those behind were drafted and rejected.
        outputs: by role, each [n, ...] with a row per token, n at least `kept`; on the device of the model.
    """

    id: str
    start: int
    kept: int
    outputs: Mapping[OutputRole, Tensor]


class Drafter(Protocol):
    """Guesses tokens. Its cost is measured by whoever calls it, around both calls."""

    def propose(self, asks: Sequence[Ask]) -> Sequence[Sequence[int]]:
        """For each request the tokens that may come next, `most` at most; empty where there is no guess."""

    def observe(self, verified: Sequence[Verified]) -> None:
        """Learn from a step; some of what was proposed may not have been fed."""

    def forget(self, identity: str) -> None:
        """A request has ended; one that never asked is no error."""

    def close(self) -> None: ...


@runtime_checkable
class ReadingDrafter(Drafter, Protocol):
    """A drafter that guesses from what the program gives beside its logits."""

    def read(self, fed: Sequence[Fed]) -> None:
        """Take what a step gave, of every request that it fed: decodes, drafted tokens or none behind them, and prompts.

        Of a prompt these are all tokens; but outputs that a program selects with its logits are there at the last one alone.
        Tokens whose keys and values the pool held already were not fed, and have no rows.
        """
