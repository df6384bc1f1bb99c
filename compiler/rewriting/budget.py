"""What a lossy pass may cost, stated by the pass."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The most that a pass may move a program's outputs; every number is finite.

    Attributes:
        kl: mean KL(before || after), nats per token (or per answer of a classifier).
        top1: least share of the same most likely token, among those that the reference decides (`decisive_lead`).
        perplexity: largest relative increase, on text.
        relative: |after - before| / |before|, L2; of logits less their mean.
        cosine: least cosine, mean over tokens (of a plain module: of each output).

    Raises:
        ValueError: a number is not finite.
    """

    kl: float
    top1: float
    perplexity: float
    relative: float
    cosine: float

    def __post_init__(self) -> None:
        for item in fields(self):
            if not math.isfinite(getattr(self, item.name)):
                raise ValueError(f"a budget must be finite: {item.name} is {getattr(self, item.name)}")

    @property
    def decisive_lead(self) -> float:
        """Lead log(p1 / p2) of the most likely token above which its change counts against `top1`.

        Errors of logits with standard deviation s move a broad distribution by KL = s^2 / 2, and the difference of
        two logits by s * sqrt(2) = 2 sqrt(KL). A lead of less than two of that may be overturned by what the budget
        allows, so its change says nothing.
        """
        return 4.0 * math.sqrt(self.kl)


def total_budget(budgets: Iterable[Budget]) -> Budget:
    """What several passes may cost together: losses of roundings that know nothing of each other.

    Squares of such errors add up; KL and 1 - cosine are squares already. Shares of changed tokens add up at worst,
    increases of perplexity multiply. That is less than the worst case, in which the errors point one way.
    """
    rows = list(budgets)
    return Budget(
        kl=sum(row.kl for row in rows),
        top1=max(0.0, 1.0 - sum(1.0 - row.top1 for row in rows)),
        perplexity=math.prod(1.0 + row.perplexity for row in rows) - 1.0,
        relative=math.sqrt(sum(row.relative**2 for row in rows)),
        cosine=max(-1.0, 1.0 - sum(1.0 - row.cosine for row in rows)),
    )
