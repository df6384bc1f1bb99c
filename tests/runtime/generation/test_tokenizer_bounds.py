"""Tokenizers that would take any time or memory are refused before, or given up after, their library is asked."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import EXAMPLE
from tokenizers import Tokenizer as Core

from optc.compiler.diagnostics import InputError
from optc.runtime.generation import tokenizer_bounds
from optc.runtime.generation.tokenizer import load_tokenizer

LETTERS = {chr(code): code - 32 for code in range(32, 127)}


def written(folder: Path, **parts: Any) -> Path:
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    model = {"type": "WordLevel", "vocab": LETTERS, "unk_token": " "}
    tree = {"version": "1.0", **empty, "added_tokens": [], "model": model, **parts}
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    return folder


def added(number: int, content: str) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": 95 + number, "content": content, **plain}


def nested(depth: int) -> dict[str, Any]:
    part: dict[str, Any] = {"type": "NFC"}
    for _ in range(depth):
        part = {"type": "Sequence", "normalizers": [part]}
    return part


def replacing(content: str, pattern: dict[str, str]) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def split(expression: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ({"added_tokens": [added(index, f"x{index}" * 500) for index in range(1000)]}, "characters"),
        ({"added_tokens": [added(index, "x") for index in range(70_000)]}, "adds 70000 tokens"),
        ({"normalizer": nested(40)}, "nested up to 24 deep"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 6000}}, "too many parts"),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [replacing("a" * 100, {"String": "a"})] * 3}},
            "1000000 times",
        ),
        ({"normalizer": replacing("a" * 2000, {"Regex": "b?"})}, "2000 times"),
    ],
)
def test_what_would_take_long_is_refused_at_once(parts: dict[str, Any], why: str, tmp_path: Path) -> None:
    folder = written(tmp_path, **parts)
    begin = time.process_time()
    with pytest.raises(InputError) as refused:
        load_tokenizer(folder)
    assert time.process_time() - begin < 2
    assert why in str(refused.value)


def test_a_key_that_is_there_twice_is_read_once(tmp_path: Path) -> None:
    folder = written(tmp_path)
    path = folder / "tokenizer.json"
    many = json.dumps([added(index, "x" * 300) for index in range(10_000)])
    path.write_text('{"added_tokens": ' + many + "," + path.read_text()[1:])
    found = load_tokenizer(folder)
    assert found is not None
    assert found.size == len(LETTERS)


def test_an_expression_that_backtracks_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expression of exponential time, on a text for which it takes some seconds; then the thread ends."""
    monkeypatch.setattr(tokenizer_bounds, "SECONDS", 0.05)
    found = load_tokenizer(written(tmp_path, pre_tokenizer=split("(([a-z])+.)+[A-Z]([a-z])+$")))
    assert found is not None
    assert found.encode("ab") == [0]  # a word that the vocabulary lacks is the token of a space
    with pytest.raises(InputError, match="backtracks"):
        found.encode("a" * 35)


def test_known_tokenizers_are_read_as_before(tmp_path: Path) -> None:
    for folder in (EXAMPLE, written(tmp_path, pre_tokenizer=split("[a-z]"), decoder={"type": "Fuse"})):
        found, core = load_tokenizer(folder), Core.from_file(str(folder / "tokenizer.json"))
        core.no_truncation()
        core.no_padding()
        assert found is not None
        ids = found.encode("The old man, 1952 \u00e9")
        assert ids == core.encode("The old man, 1952 \u00e9").ids
        assert found.decode(ids) == core.decode(ids)


def test_a_decoder_with_an_expression_decodes(tmp_path: Path) -> None:
    decoder = {"type": "Sequence", "decoders": [replacing("", {"Regex": "b+"}), {"type": "Fuse"}]}
    found = load_tokenizer(written(tmp_path, pre_tokenizer=split("."), decoder=decoder))
    assert found is not None
    assert found.decode(found.encode("abba")) == "aa"
