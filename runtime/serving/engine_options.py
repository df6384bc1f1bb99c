"""How an engine is opened."""

from __future__ import annotations

from dataclasses import dataclass

from optc.compiler.diagnostics import UsageError
from optc.compiler.settings.fields import check_range
from optc.runtime.bounds import Count


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine is opened.

    Attributes:
        max_running: requests that run together.
        max_waiting: requests that wait besides; more are refused.
        token_budget: most tokens of a step, of decodes and prompts together; above `max_running`.
        max_context: most tokens of a request; None takes the model's context.
        patience: see `scheduler`.
        threads, num_blocks: see `SessionOptions`.
    """

    max_running: int = 64
    max_waiting: int = 1024
    token_budget: int = 512
    max_context: int | None = None
    patience: int = 256
    threads: int | None = None
    num_blocks: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_running", "max_waiting", "token_budget", "patience"):
            check_range(name.replace("_", "-"), getattr(self, name), Count)
        if self.max_context is not None:
            check_range("max-context", self.max_context, Count)
        if self.token_budget <= self.max_running:
            raise UsageError(
                f"a budget of {self.token_budget} tokens leaves no room for prompts",
                why=f"{self.max_running} requests that run take one each",
                remedy="give a larger --token-budget, or a smaller --max-running",
            )
