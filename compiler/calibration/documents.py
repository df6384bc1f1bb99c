"""Texts and token ids from files: what training and calibration read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from optc.compiler.calibration.dataset_rows import MASK, is_dataset, read_rows
from optc.compiler.calibration.windows import Draw, line_windows, text_windows
from optc.compiler.diagnostics import JSON_ERRORS, InputError
from optc.compiler.files import read_plain

_MORE = 4  # tokens read of a dataset for each that is wanted, as pieces are drawn of them


class Encoder(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...


def draw_documents(path: Path, encoder: Encoder | None, draw: Draw) -> list[list[int]]:
    """As `read_documents` for calibration; of a large file of text or lines, or a dataset, as much as is asked for.

    Where what was drawn has fewer tokens, all is read. A list in `.json` is always read whole.

    Raises:
        InputError, UsageError: as `read_documents`; of what was not read nothing is said.
    """
    suffix = path.suffix.lower()
    found: list[list[int]] = []
    tokens = 0
    if is_dataset(path):
        for number, row in enumerate(read_rows(path, kind="calibration", seed=draw.seed), 1):
            found.append(_record(row, f"{path}, drawn row {number}", encoder, "calibration"))
            tokens += len(found[-1])
            if tokens >= _MORE * draw.tokens:
                break
        return found
    if suffix == ".json" or not draw.applies(path):
        return read_documents(path, encoder)
    if suffix in (".jsonl", ".ndjson"):
        for where, line in line_windows(path, draw):
            found.append(_record(_json(line, where, "calibration"), where, encoder, "calibration"))
    else:
        found = [encode_text(text, where, encoder, "calibration") for where, text in text_windows(path, draw)]
    return found if sum(map(len, found)) >= draw.tokens else read_documents(path, encoder)


def read_documents(path: Path, encoder: Encoder | None, *, kind: str = "calibration") -> list[list[int]]:
    """The token sequences of a file of text or tokens.

    `.jsonl` or `.ndjson`: one object per line with "text" (needs a tokenizer), or "tokens" or "input_ids", a list of
    ids. `.json`: a list of ids, or a list of such lists. `.parquet`, or a folder by `datasets.save_to_disk`: the same
    keys as columns (extra `datasets`). Anything else is UTF-8 text. Endings in capitals mean the same; a byte order
    mark is no part of the text.

    Args:
        kind: what the file is for, as errors name it.

    Raises:
        InputError: unreadable, malformed (with the line), text without a tokenizer, or token ids of which some do not
            count: an "attention_mask" with zeros.
        UsageError: a dataset without the extra.
    """
    return [_record(row, where, encoder, kind) for where, row in rows_of(path, kind)]


def rows_of(path: Path, kind: str) -> Iterator[tuple[str, Any]]:
    """(place, row) of such a file: objects, or lists that are not looked at; a text is {"text": ...}.

    Raises:
        InputError: unreadable, or not UTF-8 or JSON (with the line). UsageError: a dataset without the extra.
    """
    if is_dataset(path):
        for number, row in enumerate(read_rows(path, kind=kind), 1):
            yield f"{path}, row {number}", row
        return
    data = read_plain(path, f"reading the {kind} file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"the {kind} file is not UTF-8", where=str(path), why=str(error), remedy="convert it to UTF-8"
        ) from error
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        # Not splitlines: a string of JSON may hold U+2028, U+2029 and U+0085, which end lines there.
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{path}:{number}", _json(line, f"{path}:{number}", kind)
        return
    if suffix != ".json":
        yield str(path), {"text": text}
        return
    rows = _json(text, str(path), kind)
    if isinstance(rows, list) and rows and isinstance(rows[0], int):
        rows = [rows]
    if not isinstance(rows, list):
        raise _malformed(str(path), kind)
    for row in rows:
        yield str(path), token_ids(row, str(path), kind)


def _json(text: str, where: str, kind: str) -> Any:
    try:
        return json.loads(text)
    except JSON_ERRORS as error:
        raise InputError(
            f"the {kind} file is not JSON", where=where, why=str(error), remedy="correct the line, or write it again"
        ) from error


def _record(row: Any, where: str, encoder: Encoder | None, kind: str) -> list[int]:
    if not isinstance(row, dict):
        return token_ids(row, where, kind)
    if isinstance(row.get("text"), str):
        return encode_text(row["text"], where, encoder, kind)
    ids = token_ids(row.get("tokens", row.get("input_ids")), where, kind)
    mask = row.get(MASK)
    if mask is not None and mask != [1] * len(ids):
        raise InputError(
            f"'{MASK}' leaves out some tokens of the {kind} file, and all would be used",
            where=where,
            why="padding would be taken for text",
            remedy=f"write the tokens that count, and no '{MASK}'",
        )
    return ids


def encode_text(text: str, where: str, encoder: Encoder | None, kind: str) -> list[int]:
    """Tokens of a text.

    Raises:
        InputError: there is no tokenizer, or it fails.
    """
    if encoder is None:
        raise InputError(
            f"{kind} text needs a tokenizer, and the model has none",
            where=where,
            remedy='give token ids: lines of {"tokens": [...]} in a .jsonl file',
        )
    return encoder.encode(text)


def token_ids(row: Any, where: str, kind: str) -> list[int]:
    """A row that is a list of token ids.

    Raises:
        InputError: it is none.
    """
    if not isinstance(row, list) or not all(isinstance(item, int) and not isinstance(item, bool) for item in row):
        raise _malformed(where, kind)
    return row


def _malformed(where: str, kind: str) -> InputError:
    return InputError(
        f"the {kind} file holds neither text nor lists of token ids",
        where=where,
        remedy='write text, or lines of {"text": "..."} or {"tokens": [1, 2, 3]} in a .jsonl file',
    )
