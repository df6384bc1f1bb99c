"""JSON of strangers: bytes that Python's parser takes and that are no text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optc.compiler.diagnostics import JSON_ERRORS, InputError
from optc.compiler.json_text import parse_json
from optc.compiler.model_folder.checkpoint import read_tensors
from optc.compiler.model_folder.config_file import read_config, read_json_list
from optc.compiler.model_folder.draft_origin import ORIGIN, Origin
from optc.compiler.model_folder.eagle3 import read_eagle3_config
from optc.compiler.model_folder.sentence import modules_behind
from optc.runtime.generation.tokenizer import eos_token_ids
from optc.runtime.serving.tool_calls import read_tool_call

HALVES = {
    "escape": b'{"a": "\\ud800"}',
    "capitals": b'{"a": "x\\uDFFFx"}',
    "name": b'{"\\udc00": 1}',
    "bytes": b'{"a": "\xed\xa0\x80"}',
    "UTF-16 with an escape": '{"a": "\\ud800"}'.encode("utf-16"),
    "UTF-16 of a half": '{"a": "\ud800"}'.encode("utf-16", "surrogatepass"),
    "UTF-32 of a half": '{"a": "\ud800"}'.encode("utf-32", "surrogatepass"),
}


@pytest.mark.parametrize("case", HALVES)
def test_half_of_a_surrogate_pair_is_no_text(case: str) -> None:
    with pytest.raises(JSON_ERRORS):
        parse_json(HALVES[case])


def test_text_is_taken() -> None:
    assert parse_json(b'{"a": "\\ud83d\\ude00"}') == {"a": "\N{GRINNING FACE}"}
    assert parse_json(b'"\\\\ud800"') == "\\ud800"  # a backslash and letters
    assert parse_json('\ufeff["\u2028é"]'.encode()) == ["\u2028é"]


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "index": ("model.safetensors.index.json", read_tensors),
    "config": ("config.json", lambda folder: read_config(folder, trust_remote_code=None)),
    "list": ("modules.json", lambda folder: read_json_list(folder / "modules.json")),
    "modules": ("modules.json", modules_behind),
    "draft model": ("config.json", read_eagle3_config),
    "origin": (ORIGIN, Origin.read),
    "generation": ("generation_config.json", eos_token_ids),
}


@pytest.mark.parametrize("name", READERS)
def test_readers_name_the_file(name: str, tmp_path: Path) -> None:
    file, read = READERS[name]
    (tmp_path / file).write_bytes(b'[{"weight_map": {"a": "\xed\xa0\x80"}}]')
    with pytest.raises(InputError, match=r"JSON|UTF-8") as caught:
        read(tmp_path)
    assert file in str(caught.value.where)
    assert caught.value.remedy


def test_a_call_with_half_a_character_is_none() -> None:
    assert read_tool_call('{"name": "f", "arguments": {"x": "\\ud83d"}}') is None
    assert read_tool_call('{"name": "f", "arguments": {"x": "\\ud83d\\ude00"}}') is not None
