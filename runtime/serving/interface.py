"""What an engine is to those who ask it."""

from __future__ import annotations

from typing import Protocol, TypeVar

from optc.runtime.serving.answers import Answers
from optc.runtime.serving.request import Embed, EngineInfo, EngineMetrics, Generate

RequestT = TypeVar("RequestT", contravariant=True)


class Runs(Protocol[RequestT]):
    """Runs requests of one kind; one thread calls it."""

    @property
    def info(self) -> EngineInfo: ...

    def submit(self, request: RequestT) -> None:
        """Let a request wait for its turn.

        Raises:
            InputError: a prompt that is empty, holds a token outside the vocabulary, or leaves no room in the context
                or in the whole pool; a token of the bias or of the stops outside the vocabulary.
            BusyError: too many wait.
        """

    def cancel(self, identity: str) -> None:
        """See `Cancel`."""

    def step(self) -> Answers:
        """Run one step of whatever can run, and give what is new; nothing where no request is there. The caller's from then on.

        Raises:
            OptcError: the engine cannot go on; all requests are lost. A fault of one request is its `Answer`.
        """

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs."""

    def metrics(self) -> EngineMetrics: ...

    def close(self) -> None: ...


Engine = Runs[Generate]
Embedder = Runs[Embed]
