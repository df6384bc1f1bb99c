"""Calibration reads parts of a large file: whole words and lines, from everywhere in it, the same for the same seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optc.compiler.calibration import windows
from optc.compiler.calibration.documents import draw_documents, read_documents
from optc.compiler.calibration.windows import Draw
from optc.compiler.diagnostics import InputError

DRAW = Draw(tokens=400, windows=4, seed=0)  # 6400 bytes


class Words:
    """A token for each word, its number; counts what it was given."""

    def __init__(self) -> None:
        self.characters = 0

    def encode(self, text: str) -> list[int]:
        self.characters += len(text)
        return [int(word.removeprefix("\u00e9\u20ac\U0001f600")) for word in text.split()]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "WHOLE", 10_000)


def text_file(folder: Path, words: int) -> Path:
    """Words of 1 to 4 bytes a character, so that a window begins inside a character now and then."""
    path = folder / "text.txt"
    path.write_text(" ".join(f"\u00e9\u20ac\U0001f600{number}" for number in range(words)), encoding="utf-8")
    return path


def test_windows_of_a_text(tmp_path: Path) -> None:
    path, words = text_file(tmp_path, 20_000), Words()
    found = draw_documents(path, words, DRAW)
    assert len(found) == 4
    assert words.characters < DRAW.bytes
    assert sum(map(len, found)) >= DRAW.tokens
    for index, row in enumerate(found):
        assert row == list(range(row[0], row[0] + len(row)))  # whole words, none left out
        assert index * 4000 <= row[0] < (index + 1) * 5500  # a window of each quarter
    assert found == draw_documents(path, Words(), DRAW)
    assert found != draw_documents(path, Words(), Draw(tokens=400, windows=4, seed=1))


def test_windows_of_lines(tmp_path: Path) -> None:
    path, words = tmp_path / "rows.JSONL", Words()
    path.write_text("".join(json.dumps({"text": f"{number} {number}"}) + "\n" for number in range(5000)))
    found = draw_documents(path, words, DRAW)
    assert words.characters < 2 * DRAW.bytes
    firsts = [row[0] for row in found]
    assert firsts == sorted(set(firsts))
    assert firsts[-1] > 3500
    path.write_text(path.read_text() + '{"text": 5}\n' * 2000)
    with pytest.raises(InputError, match="neither text nor lists") as caught:
        draw_documents(path, Words(), DRAW)
    assert ", byte " in str(caught.value.where)


def test_what_is_small_or_too_little_is_read_whole(tmp_path: Path) -> None:
    path = text_file(tmp_path, 900)
    assert path.stat().st_size > windows.WHOLE
    assert draw_documents(path, Words(), DRAW) == read_documents(path, Words())  # not twice of what would be read
    path = text_file(tmp_path, 3000)
    few = Draw(tokens=2000, windows=2, seed=0)
    assert path.stat().st_size < 2 * few.bytes
    assert draw_documents(path, Words(), few) == read_documents(path, Words())
    path.write_text(("1 " + " " * 60) * 1000)  # one token in 62 bytes
    assert draw_documents(path, Words(), Draw(tokens=500, windows=2, seed=0)) == [[1] * 1000]


@pytest.mark.parametrize("letter", ["a", "\u00e9", "\u20ac", "\U0001f600"])
def test_characters_are_never_cut(letter: str) -> None:
    data = (letter * 8).encode()
    size = len(letter.encode())
    for start in range(len(data)):
        for end in range(start, len(data) + 1):
            whole = max(0, end // size - -(-start // size))
            assert windows._whole_characters(data[start:end]).decode() == letter * whole


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "_LONGEST_LINE", 1 << 16)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "' + "x" * 200_000)
    with pytest.raises(InputError, match="a line of the calibration file has more than"):
        draw_documents(path, Words(), DRAW)
