"""Encoding as transformers does; streamed text that is never cut inside a character."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from conftest import EXAMPLE
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from optc.compiler.diagnostics import InputError
from optc.runtime.generation.tokenizer import TextStream, Tokenizer, eos_token_ids, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = load_tokenizer(EXAMPLE)
    assert found is not None
    return found


def test_encodes_and_decodes_as_transformers(tokenizer: Tokenizer) -> None:
    other = AutoTokenizer.from_pretrained(EXAMPLE)
    text = "The old man looked at the sea — “and”, naïvely, at 日本 🐟.\n\tEnd"
    tokens = tokenizer.encode(text)
    assert tokens == other(text)["input_ids"]
    assert tokens[0] == 0, "tokenizer.json adds the begin-of-text token"
    assert tokenizer.decode(tokens) == other.decode(tokens, skip_special_tokens=True) == text


def test_stream_holds_back_incomplete_characters(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("é🐟a")[1:]
    stream, pieces = TextStream(tokenizer), []
    for token in tokens:
        pieces.append(stream.push(token))
    assert "".join(pieces) == "é🐟a"
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces, "the fish takes more than one token, so some push completes nothing"
    assert stream.finish() == ""


def test_stream_cut_inside_a_character_ends_as_decode_does(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("a🐟")[1:-1]
    stream = TextStream(tokenizer)
    assert "".join(map(stream.push, tokens)) == "a"
    assert stream.finish() == "\ufffd"
    assert tokenizer.decode(tokens) == "a\ufffd"


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(0, 8191), max_size=40))
def test_stream_is_decode_in_pieces(tokenizer: Tokenizer, tokens: list[int]) -> None:
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(tokens)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_stream_of_broken_bytes_is_decode_in_pieces(tokenizer: Tokenizer, data: st.DataObject) -> None:
    broken = [token for token in range(600) if "\ufffd" in tokenizer.token_text(token)]
    assert len(broken) > 100
    tokens = data.draw(st.lists(st.one_of(st.sampled_from(broken), st.integers(0, 600)), max_size=90))
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(tokens)


def test_a_stream_of_bytes_that_never_become_text_stays_cheap(tokenizer: Tokenizer) -> None:
    class Counting(Tokenizer):
        decoded = 0

        def decode(self, tokens: Sequence[int]) -> str:
            Counting.decoded += len(tokens)
            return tokenizer.decode(tokens)

    token = next(token for token in range(600) if tokenizer.token_text(token) == "\ufffd")
    stream, text = TextStream(Counting(None)), ""
    for _ in range(2000):
        text += stream.push(token)
    assert text + stream.finish() == "\ufffd" * 2000
    assert Counting.decoded < 2000 * 12


def test_special_tokens_inside_a_character(tokenizer: Tokenizer) -> None:
    fish = tokenizer.encode("🐟", special=False)
    tokens = [*fish[:-1], *[1] * 30, fish[-1]]
    stream = TextStream(tokenizer)
    assert "".join(map(stream.push, tokens)) + stream.finish() == tokenizer.decode(tokens) == "🐟"
    endless = TextStream(tokenizer)
    assert "".join(map(endless.push, [fish[0], *[1] * 500])) == "\ufffd"


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_stream_of_text_has_no_replacement_character(tokenizer: Tokenizer, text: str) -> None:
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces).replace("\ufffd", "") == tokenizer.decode(tokenizer.encode(text)).replace("\ufffd", "")
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_stream_keeps_the_spaces_of_a_metaspace_vocabulary() -> None:
    vocabulary = {"▁the": 0, "▁old": 1, "er": 2, "<0xC3>": 3, "<0xA9>": 4}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="er"))
    core.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(content=" ", left=1),
        ]
    )
    stream = TextStream(Tokenizer(core))
    assert [stream.push(token) for token in (0, 1, 2, 3, 4, 1)] == ["the", " old", "er", "", "é", " old"]


def test_absent_tokenizer_is_none(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None


def test_broken_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    with pytest.raises(InputError) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.what == "the tokenizer cannot be read"
    assert caught.value.where == str(tmp_path / "tokenizer.json")


def test_eos_ids_prefer_the_generation_config(tmp_path: Path) -> None:
    assert eos_token_ids(tmp_path, (7,)) == (7,)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    assert eos_token_ids(tmp_path, (7,)) == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert eos_token_ids(tmp_path, (7,)) == (3, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "the file is not JSON"),
        ("[1]", "the file does not hold a JSON object"),
        ('{"eos_token_id": "2"}', "eos_token_id is not an integer or a list of them"),
        ('{"eos_token_id": [true]}', "eos_token_id is not an integer or a list of them"),
        ("[" * 100_000, "the file is not JSON"),
    ],
)
def test_bad_generation_config(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(InputError) as caught:
        eos_token_ids(tmp_path)
    assert caught.value.what == message
