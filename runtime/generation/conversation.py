"""A chat with one model: turns through its template, and a cache that keeps what earlier turns have computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from optc.compiler.diagnostics import InputError
from optc.runtime.generation.chat_template import ChatTemplate
from optc.runtime.generation.generate import StopReason, generate
from optc.runtime.generation.tokenizer import TextStream, Tokenizer
from optc.runtime.sampling import Sampling
from optc.runtime.sessions.session import Session


class StoppedError(Exception):
    """Raised by `on_text` to end an answer where it is."""


class Conversation:
    """Messages so far, and the session that holds the beginning of their prompt.

    Attributes:
        computed: tokens of the last prompt that were computed, the others being in the cache.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        stop_ids: tuple[int, ...],
        system: str = "",
    ) -> None:
        self._session, self._tokenizer, self._template, self._stop_ids = session, tokenizer, template, stop_ids
        self._system = system
        self._cached: list[int] = []  # tokens that the session's row holds, at least
        self.computed = 0
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self._messages: list[dict[str, Any]] = [{"role": "system", "content": self._system}] if self._system else []

    def say(
        self, text: str, *, max_new_tokens: int, sampling: Sampling, on_text: Callable[[str], None]
    ) -> StopReason | None:
        """Ask, and give out the answer as it comes; returns why it ended, None where `on_text` raised `StoppedError`.

        Raises:
            InputError: the template refuses the messages, or the chat does not fit the context. Nothing was said then.
        """
        messages = [*self._messages, {"role": "user", "content": text}]
        prompt = self._tokenizer.encode(self._template.render(messages), special=False)
        if len(prompt) >= self._session.context_length:
            raise InputError(
                f"the chat has {len(prompt)} tokens and does not fit the context of {self._session.context_length}",
                remedy="/reset begins a new one",
            )
        answer = _Answer(self._tokenizer, self._stop_ids, on_text)
        held = min(_common(self._cached, prompt), len(prompt) - 1)
        self.computed = len(prompt) - held
        self._cached = []  # until the row is known again
        reason: StopReason | None = None
        try:
            reason = generate(
                self._session,
                [prompt],
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                stop_ids=self._stop_ids,
                on_token=answer.push,
                held=[held] if held else None,
            ).stop[0]
            answer.finish()
        except StoppedError:
            pass
        self._cached = [*prompt, *answer.tokens][: self._session.lengths[0]]
        self._messages = [*messages, {"role": "assistant", "content": answer.text}]
        return reason


class _Answer:
    """The text of an answer, without the token that ends it."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: tuple[int, ...], on_text: Callable[[str], None]) -> None:
        self._stream, self._stop_ids, self._on_text = TextStream(tokenizer), stop_ids, on_text
        self.tokens: list[int] = []
        self.text = ""

    def push(self, _row: int, token: int) -> None:
        self.tokens.append(token)
        if token not in self._stop_ids:
            self._tell(self._stream.push(token))

    def finish(self) -> None:
        self._tell(self._stream.finish())

    def _tell(self, piece: str) -> None:
        self.text += piece
        self._on_text(piece)


def _common(held: list[int], prompt: list[int]) -> int:
    """Tokens that both begin with."""
    return next(
        (count for count, (one, other) in enumerate(zip(held, prompt, strict=False)) if one != other),
        min(len(held), len(prompt)),
    )
