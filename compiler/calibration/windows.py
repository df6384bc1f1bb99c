"""Parts of a large file, drawn at random: calibration needs about a megabyte, and corpora have many gigabytes.

The file is divided into as many equal parts as there are windows, and each gives one from a random place (stratified
sampling: no two windows overlap, and all of the file is represented).
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from optc.compiler.diagnostics import InputError, os_errors

WHOLE = 8 << 20
"""Bytes of a file that is read whole."""
BYTES_PER_TOKEN = 16
"""Read for each token that is wanted: text has 3 to 5, other scripts and lists of ids up to 8."""
_LONGEST_LINE = 64 << 20


@dataclass(frozen=True)
class Draw:
    """What is wanted of a file.

    Attributes:
        tokens: at least so many. windows: from so many places. seed: which places.
    """

    tokens: int
    windows: int
    seed: int

    @property
    def bytes(self) -> int:
        """To be read."""
        return self.tokens * BYTES_PER_TOKEN

    def applies(self, path: Path) -> bool:
        """Whether the file is larger than what is read whole, and than what would be read of it.

        Raises:
            InputError: it cannot be asked for.
        """
        with os_errors("reading the calibration file", str(path)):
            return path.is_file() and path.stat().st_size > max(WHOLE, 2 * self.bytes)

    def places(self, size: int) -> list[int]:
        """Where windows begin in a file of so many bytes, in order."""
        rng, part = random.Random(self.seed), size / self.windows
        room = max(0, int(part) - self.bytes // self.windows)
        return [int(index * part) + rng.randint(0, room) for index in range(self.windows)]


def text_windows(path: Path, draw: Draw) -> Iterator[tuple[str, str]]:
    """(place, text) of windows of a UTF-8 text, from the first space in them to the last.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    length = draw.bytes // draw.windows
    with os_errors("reading the calibration file", str(path)), path.open("rb") as file:
        for place in draw.places(os.fstat(file.fileno()).st_size):
            file.seek(place)
            data = _whole_characters(file.read(length))
            where = f"{path}, byte {place}"
            text = _decoded(data, where).removeprefix("\ufeff")
            words = text.split(" ")
            yield where, " ".join(words[1:-1] if len(words) > 2 else words)


def line_windows(path: Path, draw: Draw) -> Iterator[tuple[str, str]]:
    """(place, line) of the whole lines of windows, without empty ones.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    length = draw.bytes // draw.windows
    with os_errors("reading the calibration file", str(path)), path.open("rb") as file:
        for place in draw.places(os.fstat(file.fileno()).st_size):
            file.seek(place)
            if place:
                _line(file, path)  # begins before
            while file.tell() < place + length:
                where = f"{path}, byte {file.tell()}"
                data = _line(file, path)
                if not data:
                    return
                if data.strip():
                    yield where, _decoded(data, where).removeprefix("\ufeff")


def _line(file: BinaryIO, path: Path) -> bytes:
    data = file.readline(_LONGEST_LINE)
    if len(data) == _LONGEST_LINE:
        raise InputError(
            f"a line of the calibration file has more than {_LONGEST_LINE >> 20} MiB",
            where=f"{path}, byte {file.tell() - len(data)}",
            remedy="write one document a line",
        )
    return data


def _whole_characters(data: bytes) -> bytes:
    """Without the parts of characters at both ends: UTF-8's continuation bytes are 10xxxxxx, at most 3 of them."""
    start = next((index for index in range(min(3, len(data))) if data[index] & 0xC0 != 0x80), min(3, len(data)))
    for back in range(1, min(4, len(data)) + 1):
        lead = data[-back]
        if lead & 0xC0 != 0x80:
            size = 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return data[start : len(data) - back if size > back else None]
    return data[start:]


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            "the calibration file is not UTF-8", where=where, why=str(error), remedy="convert it to UTF-8"
        ) from error
