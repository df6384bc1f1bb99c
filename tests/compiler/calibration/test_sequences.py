"""Calibration files: every form they may have, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optc.compiler.calibration.documents import read_documents
from optc.compiler.calibration.sequences import cut_sequences, random_calibration
from optc.compiler.diagnostics import InputError


class _Bytes:
    """A tokenizer whose tokens are bytes."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def _cut(documents: list[list[int]], **changes: int) -> list[list[int]]:
    options = {"samples": 4, "length": 16, "vocab_size": 256, "seed": 0, **changes}
    return cut_sequences(documents, source="here", **options).tokens.tolist()  # type: ignore[arg-type]


def test_text_and_token_files(tmp_path: Path) -> None:
    files = {
        "a.txt": "ab",
        "b.jsonl": '{"text": "ab"}\n\n{"tokens": [1, 2]}\n{"input_ids": [3]}\n',
        "c.json": "[5, 6, 7]",
        "d.json": "[[5], [6, 7]]",
        "e.ndjson": '\ufeff{"text": "a\u2028b"}\r\n{"text": "\u2029\x85"}\n',
        "f.JSONL": '{"tokens": [1]}',
        "g.JSON": "\ufeff[8]",
        "h.txt": "\ufeffab\u2028",
    }
    expected = {
        "a.txt": [[97, 98]],
        "b.jsonl": [[97, 98], [1, 2], [3]],
        "c.json": [[5, 6, 7]],
        "d.json": [[5], [6, 7]],
        "e.ndjson": [list("a\u2028b".encode()), list("\u2029\x85".encode())],
        "f.JSONL": [[1]],
        "g.JSON": [[8]],
        "h.txt": [list("ab\u2028".encode())],
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        assert read_documents(tmp_path / name, _Bytes()) == expected[name]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.jsonl", b'{"text": 3}\n', "neither text nor lists"),
        ("a.jsonl", b'{"tokens": [1, true]}\n', "neither text nor lists"),
        ("a.jsonl", b"{\n", "is not JSON"),
        ("a.json", b'{"a": 1}', "neither text nor lists"),
        ("a.json", b"[" * 100_000, "is not JSON"),
        ("a.txt", b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_malformed(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=what) as caught:
        read_documents(tmp_path / name, _Bytes())
    assert str(tmp_path / name) in str(caught.value.where)


def test_the_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"tokens": [1]}) + "\n{oops\n")
    with pytest.raises(InputError) as caught:
        read_documents(path, None)
    assert caught.value.where == f"{path}:2"


def test_text_without_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(InputError, match="needs a tokenizer"):
        read_documents(tmp_path / "a.txt", None)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        read_documents(tmp_path / "none.txt", _Bytes())


def test_pieces_do_not_overlap_and_a_seed_draws_them() -> None:
    stream = list(range(160))
    pieces = _cut([stream[:50], stream[50:]])
    assert len(pieces) == 4
    starts = [piece[0] for piece in pieces]
    assert all(piece == list(range(start, start + 16)) for piece, start in zip(pieces, starts, strict=True))
    assert all(start % 16 == 0 for start in starts)
    assert len(set(starts)) == 4
    assert _cut([stream]) == pieces
    assert _cut([stream], seed=1) != pieces
    assert sorted(piece[0] for piece in _cut([stream], samples=99)) == list(range(0, 160, 16))


@pytest.mark.parametrize("stream", [[], [1] * 15])
def test_too_short(stream: list[int]) -> None:
    with pytest.raises(InputError, match="too short") as caught:
        _cut([stream])
    assert f"{len(stream)} tokens" in str(caught.value)


def test_sequences_too_short_to_say_anything() -> None:
    with pytest.raises(InputError, match="at least 16"):
        _cut([[1] * 100], length=8)


@pytest.mark.parametrize(("token", "place"), [(256, 3), (-1, 3)])
def test_token_outside_the_vocabulary(token: int, place: int) -> None:
    stream = [1] * 40
    stream[place] = token
    with pytest.raises(InputError, match=f"token {token} is outside the vocabulary of 256") as caught:
        _cut([stream])
    assert f"token number {place}" in str(caught.value.where)


def test_digest_tells_calibrations_apart() -> None:
    first, second = (random_calibration(50, samples=2, length=16, seed=seed) for seed in (0, 1))
    assert first.digest == random_calibration(50, samples=2, length=16, seed=0).digest
    assert first.digest != second.digest
    assert "2 x 16 tokens of random tokens" in repr(first)
