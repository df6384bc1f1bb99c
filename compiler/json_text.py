"""JSON that strangers wrote, as plain values: what `json` takes beyond the standard is refused in one place."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from optc.compiler.nesting import check_nesting


def check_values(data: bytes, most: int) -> None:
    """Refuse JSON of too many values before it is parsed: as objects of Python they take up to a hundred times its bytes.

    Args:
        most: values, each element of a list, key, list and object counted as one; so are commas and the like in texts.

    Raises:
        ValueError: there are more.
    """
    found = sum(map(data.count, (b",", b":", b"[", b"{")))
    if found > most:
        raise ValueError(f"it holds up to {found} values; at most {most} are read")


def unique_keys(pairs: list[tuple[str, Any]]) -> None:
    """Refuse an object with a key twice, of which readers may take either (an `object_pairs_hook` of `json.loads`).

    Raises:
        ValueError: names the key.
    """
    keys = {key for key, _ in pairs}
    if len(keys) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        shown = twice[:200] if twice.isprintable() else twice[:200].encode("unicode_escape").decode()
        raise ValueError(f"the key '{shown}' stands twice")


def parse_json(data: bytes) -> Any:
    """The value of JSON text in UTF-8.

    Its strings can be encoded again: half of a surrogate pair, which `json` takes as an escape, as bytes that are no
    UTF-8, and in UTF-16, is no text (RFC 8259, 8.2) and would be an error of everything that reads or prints it.

    Raises:
        ValueError, RecursionError (`JSON_ERRORS`): not JSON, not UTF-8, half of a surrogate pair, or nested too deep.
    """
    text = data.decode("utf-8-sig")
    value = json.loads(text)
    check_nesting(value)
    if "\\ud" in text.lower():  # an escape of a surrogate, or of one that is escaped itself
        json.dumps(value, ensure_ascii=False).encode()
    return value
