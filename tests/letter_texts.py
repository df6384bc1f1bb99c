"""Texts of letters for the tests of training: a token for each, chat templates, and files of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, pre_tokenizers

from optc.runtime.generation.chat_template import ChatTemplate
from optc.runtime.generation.tokenizer import Tokenizer

LETTERS = {"<unk>": 0} | {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz:\n|", 3)}
CHAT = ChatTemplate(
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}|{% endfor %}{% if add_generation_prompt %}a:{% endif %}",
    {},
    "test",
)
SHORTENS = ChatTemplate("{% for m in messages[-2:] %}{{ m.role[0] }}:{{ m.content }}|{% endfor %}", {}, "test")


def letters() -> Tokenizer:
    """A token for each letter: "a" is 3, "b" 4, ":" 29, "|" 31."""
    core = Core(models.WordLevel(LETTERS, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return Tokenizer(core)


def rows(path: Path, *found: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path
