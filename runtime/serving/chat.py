"""The model's own chat template: messages in, the text of a prompt out; calls of tools found in an answer.

The template is code that came with the model. It runs in Jinja's sandbox, with what transformers gives it
(`apply_chat_template`): a few filters, no access to the machine.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils
from jinja2.ext import Extension
from msgspec import Struct

from optc.compiler.diagnostics import InputError
from optc.runtime.generation.tokenizer import read_config

_LARGEST = 1 << 20  # characters of a template, and bytes of its file

CALL, CALL_END = "<tool_call>", "</tool_call>"
"""Around each call of a tool, in the form that Hermes began and Qwen and others took over: JSON with name, arguments."""


class _Generation(Extension):
    """`{% generation %}` marks what the model said, for training; here it is passed through."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own interface

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's own would keep names such as __class__ for a template that looks for a way out (as in transformers)."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.sandbox.SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)


def _raise(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


class ChatTemplate:
    """A compiled template.

    Args:
        source: text of the template.
        tokens: of the tokenizer, by the names that templates use: bos_token and the like.

    Raises:
        InputError: it does not parse.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], where: str) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": _now, "namespace": _Namespace}
        try:
            self._template = environment.from_string(source)
            names = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as error:
            raise InputError("the chat template does not parse", where=where, why=str(error)) from error
        self._tokens, self._where = dict(tokens), where
        self.takes_tools = "tools" in names
        self.calls_in_json = self.takes_tools and CALL in source

    def render(self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Any] | None = None, **extra: Any) -> str:
        """The prompt that asks for the assistant's next message.

        Raises:
            InputError: the template refuses the messages, or fails on them.
        """
        given = {"messages": messages, "tools": tools, "add_generation_prompt": True}
        try:
            return self._template.render(**{**self._tokens, **extra, **given})
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise InputError("the chat template refuses the messages", where=self._where, why=str(error)) from error
        except RecursionError as error:
            raise InputError("the chat template does not end on these messages", where=self._where) from error


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """The template of an artifact or a model folder; None where it has none.

    Raises:
        InputError: a file that is too large, is not text or JSON, or holds no template that parses.
    """
    config = read_config(folder / "tokenizer_config.json")
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
    tokens = {name: text for name in names if (text := _token(config.get(name))) is not None}
    path = folder / "chat_template.jinja"
    if path.is_file():
        return ChatTemplate(_read(path), tokens, str(path))
    path = folder / "chat_template.json"
    found = read_config(path).get("chat_template") or config.get("chat_template")
    where = str(path if path.is_file() else folder / "tokenizer_config.json")
    if isinstance(found, list):  # several by name
        named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
        found = named.get("default")
    if found is None:
        return None
    if not isinstance(found, str) or len(found) > _LARGEST:
        raise InputError("the chat template is not text, or too long", where=where)
    return ChatTemplate(found, tokens, where)


def _token(value: Any) -> str | None:
    """A special token of tokenizer_config.json: its text, or an object with it."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST:
            raise InputError("the chat template is too long", where=str(path), why=f"more than {_LARGEST} bytes")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError("the chat template is not UTF-8", where=str(path), why=str(error)) from error


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
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", {})
    return ToolCall(found["name"], arguments if isinstance(arguments, str) else _to_json(arguments))


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
                kept = 0 if last else _beginning(self._held)
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


def _beginning(text: str) -> int:
    """Length of the longest end of the text that `CALL` begins with."""
    return next((n for n in range(min(len(CALL) - 1, len(text)), 0, -1) if CALL.startswith(text[-n:])), 0)
