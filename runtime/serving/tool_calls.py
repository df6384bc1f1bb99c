"""Calls of tools in an answer, where the model's chat template says that they stand in JSON between two marks."""

from __future__ import annotations

from msgspec import Struct

from optc.compiler.json_text import parse_json
from optc.runtime.generation.chat_template import ChatTemplate, to_json
from optc.runtime.serving.text import held_back

CALL, CALL_END = "<tool_call>", "</tool_call>"
"""Around each call of a tool, in the form that Hermes began and Qwen and others took over: JSON with name, arguments."""


def calls_are_read(template: ChatTemplate) -> bool:
    """Whether calls have the form that is read here."""
    return template.takes_tools and CALL in template.source


class ToolCall(Struct, frozen=True):
    """A function that the model wants called.

    Attributes:
        arguments: JSON text, as OpenAI gives it.
    """

    name: str
    arguments: str


def read_tool_call(text: str) -> ToolCall | None:
    """What stands between `CALL` and `CALL_END`; None where it is not a call."""
    try:
        found = parse_json(text.encode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", {})
    return ToolCall(found["name"], arguments if isinstance(arguments, str) else to_json(arguments))


class ToolText:
    """An answer's text, divided into what is said and what is called, as it comes."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, piece: str, *, last: bool = False) -> tuple[str, list[ToolCall]]:
        """(text that is no part of a call, calls that are complete). What only looks like a call stays text."""
        self._held += piece
        said, calls = "", list[ToolCall]()
        while True:
            start = self._held.find(CALL)
            if start < 0:
                kept = 0 if last else held_back(self._held, (CALL,), len(CALL))
                said += self._held[: len(self._held) - kept]
                self._held = self._held[len(self._held) - kept :]
                return said, calls
            end = self._held.find(CALL_END, start)
            if end < 0:
                said, self._held = said + self._held[:start], self._held[start:]
                if last:
                    said, self._held = said + self._held, ""
                return said, calls
            call = read_tool_call(self._held[start + len(CALL) : end])
            end += len(CALL_END)
            said += self._held[:start] if call is not None else self._held[:end]
            calls += [call] if call is not None else []
            self._held = self._held[end:]
