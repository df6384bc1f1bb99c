"""How the next token is chosen: the parameters, as flags and calls from Python give them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, get_type_hints

from optc.compiler.diagnostics import UsageError
from optc.compiler.settings.fields import check_range
from optc.runtime.bounds import CountOrZero, MinP, Penalty, RepetitionPenalty, Seed, Temperature, TopP

COLDEST, HOTTEST = 1e-30, 1e30


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 is greedy, which takes the largest logit (the smallest id
            among equals).
        top_k: keep the k likeliest tokens, and those as likely as the k-th; 0 keeps all.
        top_p: of those, keep the fewest likeliest tokens whose probabilities reach `top_p`, and
            those as likely as the last; 1 keeps all.
        min_p: of those, keep what is at least `min_p` times as likely as the likeliest; 0 keeps all.
        repetition_penalty: divides the logits above 0 of tokens of the row, and multiplies those below; before all
            else, as the other penalties. 1 changes nothing.
        presence_penalty, frequency_penalty: taken from the logit of a generated token, once, and for each time that it
            was generated. 0 changes nothing.
        seed: with the prompt, it fixes the draws.

    Raises:
        UsageError: a value out of range, or one of the cuts with greedy decoding.
    """

    temperature: Temperature = 0.0
    top_k: CountOrZero = 0
    top_p: TopP = 1.0
    min_p: MinP = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    seed: Seed = 0

    def __post_init__(self) -> None:
        for name, kind in _ranges().items():
            check_range(name.replace("_", "-"), getattr(self, name), kind)
        if self.greedy and (self.top_k or self.top_p < 1 or self.min_p):
            raise UsageError(
                "top-k, top-p and min-p have no effect at temperature 0",
                remedy="give a temperature above 0, or leave them out",
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def heat(self) -> float:
        """The temperature, or the nearest that float32 logits can be divided by without becoming infinite or nothing; 0
        where it is greedy."""
        return 0.0 if self.greedy else min(max(self.temperature, COLDEST), HOTTEST)

    @property
    def penalizes(self) -> bool:
        """Whether the choice depends on which tokens the row holds."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


@functools.cache
def _ranges() -> dict[str, Any]:
    return get_type_hints(Sampling, include_extras=True)
