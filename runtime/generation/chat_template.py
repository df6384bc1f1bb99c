"""The model's own chat template: messages in, the text of a prompt out.

The template is code that came with the model. It runs in Jinja's sandbox, with what transformers gives it
(`apply_chat_template`): a few filters, no access to the machine, and bounds of time and memory (`template_sandbox`).
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils
from jinja2.ext import Extension

from optc.compiler.diagnostics import InputError, foreign_errors
from optc.compiler.files import read_plain
from optc.runtime.generation.template_sandbox import BoundedEnvironment
from optc.runtime.generation.tokenizer import read_config

_LARGEST = 1 << 18
"""Characters of a template, and bytes of its file: the longest have 30 000; a character takes 10 us to compile."""
_CORRECT = "correct the template, or use the one of the model that was fine-tuned"


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


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """The filter `tojson`, and what arguments of tool calls are written by."""
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
        environment = BoundedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.add_filter("tojson", to_json)
        environment.globals |= {"raise_exception": _raise, "strftime_now": _now, "namespace": _Namespace}
        with foreign_errors("the chat template does not parse", where=where, remedy=_CORRECT):
            # Deep nesting ends in errors of Python's own compiler.
            self._template = environment.from_string(source)
            names = environment.variables(source)
        self._tokens, self._where = dict(tokens), where
        self.takes_tools, self.source = "tools" in names, source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        asks: bool = True,
        **extra: Any,
    ) -> str:
        """The messages as text.

        Args:
            asks: the prompt that asks for the assistant's next message; without it, what was said alone.

        Raises:
            InputError: the template refuses the messages, or fails on them.
        """
        given = {"messages": messages, "tools": tools, "add_generation_prompt": asks}
        try:
            return self._template.render(**{**self._tokens, **extra, **given})
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise InputError(
                "the chat template refuses the messages",
                where=self._where,
                why=str(error),
                remedy="send messages as the template takes them: their roles, their order",
            ) from error
        except RecursionError as error:
            raise InputError(
                "the chat template does not end on these messages",
                where=self._where,
                remedy="use the template of the model that was fine-tuned",
            ) from error


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
        named = (item for item in found if isinstance(item, dict) and item.get("name") == "default")
        found = next((item.get("template") for item in named), None)
    if found is None:
        return None
    if not isinstance(found, str) or len(found) > _LARGEST:
        raise InputError(
            "the chat template is not text, or too long",
            where=where,
            remedy="put a template of jinja into chat_template",
        )
    return ChatTemplate(found, tokens, where)


def _token(value: Any) -> str | None:
    """A special token of tokenizer_config.json: its text, or an object with it."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read(path: Path) -> str:
    try:
        return read_plain(path, "reading the chat template", most=_LARGEST).decode()
    except UnicodeDecodeError as error:
        raise InputError(
            "the chat template is not UTF-8", where=str(path), why=str(error), remedy="convert it to UTF-8"
        ) from error
