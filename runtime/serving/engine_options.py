"""How an engine is opened."""

from __future__ import annotations

from dataclasses import dataclass

from optc.compiler.diagnostics import UsageError
from optc.compiler.settings.fields import check_range
from optc.runtime.bounds import Count
from optc.runtime.speculative.settings import Speculation

_RUNNING = {True: 256, False: 32}
_BUDGET = {True: 4096, False: 512}
"""Where tokens are chosen on the device, and elsewhere."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine is opened.

    Attributes:
        max_running: requests that run together; None takes 256 on a GPU, and 32 elsewhere.
        max_waiting: requests that wait besides; more are refused.
        token_budget: most tokens of a step, of decodes and prompts together, above `max_running`; None takes 4096 on a GPU,
            and 512 elsewhere.
        max_context: most tokens of a request; None takes the model's context.
        patience: how often a request that waits may be overtaken; see `scheduler`.
        warm_up: on a GPU, compile kernels and capture steps and some calls before the engine is open, for a server: it may
            take a minute. Else the requests that come first wait for what they need.
        dequantized_copies: on a GPU, keep packed weights in the type that is computed in as well, where memory has room:
            steps of more requests than the kernels for packed weights take need not make them.
        speculation: drafts and their verification; None decodes plainly. It needs a paged KV cache.
        threads, num_blocks: see `SessionOptions`.
        trust: run native code that nobody vouches for; see `artifact.folder.check_trusted`.
    """

    max_running: int | None = None
    max_waiting: int = 1024
    token_budget: int | None = None
    max_context: int | None = None
    patience: int = 256
    warm_up: bool = False
    dequantized_copies: bool = False
    speculation: Speculation | None = None
    threads: int | None = None
    num_blocks: int | None = None
    trust: bool = False

    def __post_init__(self) -> None:
        for name in ("max_running", "max_waiting", "token_budget", "max_context", "patience"):
            value = getattr(self, name)
            if value is not None:
                check_range(name.replace("_", "-"), value, Count)

    def batch(self, *, on_device: bool) -> tuple[int, int]:
        """Requests that run together, and tokens of a step.

        Raises:
            UsageError: the tokens are no more than the requests.
        """
        running = self.max_running or _RUNNING[on_device]
        budget = self.token_budget or max(_BUDGET[on_device], 2 * running)
        if budget <= running:
            raise UsageError(
                f"a budget of {budget} tokens leaves no room for prompts",
                why=f"{running} requests that run take one each",
                remedy="give a larger --token-budget, or a smaller --max-running",
            )
        return running, budget
