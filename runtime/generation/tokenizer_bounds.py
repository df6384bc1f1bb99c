"""What a `tokenizer.json` may cost before it is given to its library, which takes any time and memory for some files.

Its matcher of added tokens takes memory by their text, its parser time by the nesting of what comes before and behind the
model, and a normalizer can make a text a thousand times longer, again and again. Regular expressions may backtrack for
ever (Davis et al., "The Impact of Regular Expression Denial of Service (ReDoS) in Practice", ESEC/FSE 2018), which no
look at them rules out: calls of a tokenizer that has some are given up after a time (`within`).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import msgspec

from optc.compiler.diagnostics import InputError

T = TypeVar("T")

MOST_ADDED, MOST_ADDED_TEXT = 1 << 16, 1 << 20
"""Added tokens, and characters of all of them. Vocabularies of today have up to 7000, of 100 kB."""
MOST_KEYS, MOST_BESIDE = 100, 16 << 20
"""Keys of the file, and bytes of what they name beside the model, which is not looked into: values take 30 times as many."""
MOST_PARTS, DEEPEST = 5000, 24
"""Values of normalizer, pre-tokenizer, post-processor and decoder together, and how deep they are nested."""
MOST_GROWTH = 1000
"""By what factor normalizers may lengthen a text."""
SECONDS, SECONDS_PER_CHARACTER = 20.0, 1e-4
"""Until a call is given up: tokenizers take 1e-6 s for a character."""
_OTHER = "use a tokenizer.json written by the tokenizers library"
_AROUND = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


class Bounded(NamedTuple):
    """A file that can be loaded in seconds, and whether regular expressions encode and decode."""

    data: bytes
    slow_to_encode: bool
    slow_to_decode: bool


def bounded_file(data: bytes, where: str) -> Bounded:
    """What may be given to the library of a `tokenizer.json`.

    Keys that are there twice are left out, so that the library reads what was looked at.

    Raises:
        InputError: it is no JSON object, or it would cost too much.
    """
    try:
        tree = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        _check_size(tree, where)
        read: dict[str, Any] = {key: msgspec.json.decode(raw) for key, raw in tree.items() if key != "model"}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError("the tokenizer cannot be read", where=where, why=str(error), remedy=_OTHER) from error
    _check_added(read.get("added_tokens"), where)
    around = [read.get(key) for key in _AROUND]
    _check_parts(around, where)
    growth = _growth(read.get("normalizer"))
    if growth > MOST_GROWTH:
        raise _too_much(f"its normalizers make a text up to {growth:.0f} times longer", f"{MOST_GROWTH}", where)
    whole = {key: read.get(key, raw) for key, raw in tree.items()}
    encodes, decodes = around[:-1], around[-1:]
    return Bounded(msgspec.json.encode(whole), _has_expression(encodes), _has_expression(decodes))


def within(call: Callable[[], T], characters: int) -> T:
    """The result of a call that may never return; one that is given up goes on in its thread until the process ends.

    Args:
        characters: of the text that it works on.

    Raises:
        InputError: it takes too long. Whatever the call raises.
    """
    results: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put((call(), None))
        except BaseException as error:  # noqa: BLE001 (raised below, in the thread that asked)
            results.put((None, error))

    threading.Thread(target=run, daemon=True, name="tokenizer").start()
    seconds = SECONDS + SECONDS_PER_CHARACTER * characters
    try:
        value, error = results.get(timeout=seconds)
    except queue.Empty:
        raise InputError(
            "the tokenizer does not come to an end",
            where="tokenizer.json",
            why=f"{characters} characters took more than {seconds:.0f} s: one of its regular expressions backtracks",
            remedy=_OTHER,
        ) from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def _check_size(tree: dict[str, msgspec.Raw], where: str) -> None:
    if len(tree) > MOST_KEYS:
        raise _too_much(f"it has {len(tree)} keys", f"{MOST_KEYS}", where)
    beside = sum(memoryview(raw).nbytes for key, raw in tree.items() if key != "model")
    if beside > MOST_BESIDE:
        raise _too_much(f"it has {beside} bytes beside its model", f"{MOST_BESIDE}", where)


def _check_added(tokens: Any, where: str) -> None:
    if not isinstance(tokens, list):
        return
    if len(tokens) > MOST_ADDED:
        raise _too_much(f"it adds {len(tokens)} tokens", f"{MOST_ADDED}", where)
    texts = [item.get("content") for item in tokens if isinstance(item, dict)]
    characters = sum(len(text) for text in texts if isinstance(text, str))
    if characters > MOST_ADDED_TEXT:
        raise _too_much(f"its added tokens have {characters} characters", f"{MOST_ADDED_TEXT}", where)


def _check_parts(parts: list[Any], where: str) -> None:
    level, count, depth = parts, 0, 0
    while level:
        count, depth = count + len(level), depth + 1
        if count > MOST_PARTS or depth > DEEPEST:
            raise _too_much(
                "its normalizer, pre-tokenizer, post-processor and decoder have too many parts",
                f"{MOST_PARTS}, nested up to {DEEPEST} deep",
                where,
            )
        level = [value for item in level for value in _children(item)]


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _growth(part: Any) -> float:
    """An upper bound of how much longer a text can get, each `Replace` at its worst."""
    if isinstance(part, dict) and part.get("type") == "Replace":
        content, pattern = part.get("content"), part.get("pattern")
        literal = pattern.get("String") if isinstance(pattern, dict) else None
        shortest = len(literal) if isinstance(literal, str) else 1
        return max(1.0, (len(content) if isinstance(content, str) else 1) / max(1, shortest))
    total = 1.0
    for value in _children(part):
        total = min(1e30, total * _growth(value))
    return total


def _has_expression(part: Any) -> bool:
    if isinstance(part, dict) and "Regex" in part:
        return True
    return any(map(_has_expression, _children(part)))


def _too_much(what: str, most: str, where: str) -> InputError:
    return InputError(
        "the tokenizer would take too much time or memory",
        where=where,
        why=f"{what}; at most {most} are read",
        remedy=_OTHER,
    )
