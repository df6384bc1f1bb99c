"""Mutations of JSON trees and of bytes: what a hostile or broken writer would put there.

Structure-aware mutation of a parsed seed reaches behind the parser, where blind flips of bytes end (cf. Aschermann et
al., "NAUTILUS: Fishing for Deep Bugs with Grammars", NDSS 2019); both are needed.
"""

from __future__ import annotations

import json
import random
import sys
from typing import Any

BIG = "x" * 100_000
# fmt: off
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 255, 256, 2**31, 2**31 - 1, -(2**31), 2**32, 2**48, 2**60, 2**63, 2**63 - 1, -(2**63),
    2**64, 10**12, 10**30, 10**400, 0.0, 0.5, -0.0, 1.5, 1e308, 1e-320, float("nan"), float("inf"), float("-inf"),
    "", "a", "0", "-1", "NaN", "null", "../x", "../../../../etc/passwd", "/etc/passwd", "/dev/zero", "/proc/self/mem", ".", "..",
    "/", "\\\\host\\share", "C:\\x", "\ud800", "\udfff\ud800", "\u202e", "\x00", "\x1b[2J", "\n", "é" * 300, BIG, "a/b", "a.b.c",
    "__class__", "{{7*7}}", "${HOME}", "%s%n", "'; import os", "torch.float32", "re:(a+)+$", "re:[", "org/kernels", [], {}, [[]],
    {"": {}}, [None], [1, 2, 3], ["a"], {"a": 1}, [0] * 2000, [-1], {"__class__": "os.system"}, [[1]], [1.5], {"type": "x"},
]
"""Put in place of any value."""
TOKENS = [
    b"9" * 400, b"-", b'"', b"{", b"}", b"[", b"]", b"\0", b"\xff", b"1e999", b"NaN", b"Infinity", b",", b"\\ud800", b"null", b"true",
    b":", b"\xed\xa0\x80", b"-0", b"../", b"\r\n", b"\x1b[2J",
]
"""Put between any two bytes."""
# fmt: on
_KEYS = ["", "x", "../x", "\ud800", "__proto__", "a" * 5000]
_WORDS = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\0\0\0\x80", b"\xff\xff\xff\x7f"]

Path = tuple[Any, ...]


def places(tree: Any, path: Path = ()) -> list[Path]:
    """The path of every value below the root; of long lists the first 40."""
    found: list[Path] = [path] if path else []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:40]) if isinstance(tree, list) else ()
    if len(path) < 60:
        for key, value in items:
            found += places(value, (*path, key))
    return found


def mutated(tree: Any, rng: random.Random, among: list[Path] | None = None) -> Any:
    """A copy with one to three changes, at `among` or anywhere."""
    tree = _copied(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        paths = among or places(tree)
        if not paths:
            return tree
        try:
            _mutate(tree, rng.choice(paths), paths, rng)
        except (KeyError, IndexError, TypeError, AttributeError, OverflowError, ValueError):
            continue  # an earlier change removed the place
    return tree


def text_of(tree: Any, rng: random.Random | None = None) -> bytes:
    """JSON text, now and then in another encoding, with a key twice, or nested without end."""
    limit, digits = sys.getrecursionlimit(), sys.get_int_max_str_digits()
    sys.setrecursionlimit(20_000)
    sys.set_int_max_str_digits(0)
    try:
        text = json.dumps(tree)
    except (RecursionError, ValueError):
        text = "[" * 2000 + "]" * 2000
    finally:
        sys.setrecursionlimit(limit)
        sys.set_int_max_str_digits(digits)
    data = text.encode()
    chance = rng.random() if rng else 1.0
    if chance < 0.03 and b"{" in data:
        place = data.find(b"{") + 1
        return data[:place] + b'"format_version":1,"model_type":"x",' + data[place:]
    if chance < 0.04:
        return b"\xef\xbb\xbf" + data
    if chance < 0.05:
        return text.encode("utf-16")
    if chance < 0.06:
        return data + b"\n" + data
    if rng and chance < 0.07:
        return b"[" * rng.choice((1000, 100_000))
    return data


def blind(data: bytes, rng: random.Random, end: int | None = None) -> bytes:
    """Up to 16 changes of bytes that know nothing of the format, before `end`."""
    out = bytearray(data)
    end = min(end or len(out), len(out))
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if not out:
            break
        place, kind = rng.randrange(max(1, min(end, len(out)))), rng.randrange(8)
        if kind == 0:
            out[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[place : place + rng.randrange(1, 64)]
        elif kind == 2:
            out[place:place] = rng.choice(TOKENS)
        elif kind == 3:
            out[place] = rng.randrange(256)
        elif kind == 4:
            start = rng.randrange(len(out))
            out[place:place] = out[start : start + rng.randrange(1, 200)]
        elif kind == 5:
            del out[place:]
        elif kind == 6:
            out[place : place + 4] = rng.choice(_WORDS)
        else:
            other = rng.randrange(len(out))
            out[place], out[other] = out[other], out[place]
    return bytes(out)


def _copied(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    return [_copied(value) for value in tree] if isinstance(tree, list) else tree


def _at(tree: Any, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _mutate(tree: Any, path: Path, paths: list[Path], rng: random.Random) -> None:
    parent, key, kind = _at(tree, path[:-1]), path[-1], rng.randrange(10)
    if kind < 5:
        parent[key] = _copied(rng.choice(VALUES))
    elif kind == 5:
        del parent[key]
    elif kind == 6:
        parent[key] = _copied(_at(tree, rng.choice(paths)))
    elif kind == 7 and isinstance(parent, dict):
        parent[rng.choice([*_KEYS, f"{key} "])] = parent.pop(key)
    elif kind == 7:
        parent.append(_copied(parent[key]))
    elif kind == 8:
        parent[key] = _near(parent[key], rng)
    else:
        parent[key] = _nested(rng) if rng.random() < 0.3 else [_copied(parent[key])]


def _near(value: Any, rng: random.Random) -> Any:
    """A value much like it."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return rng.choice([value + 1, value - 1, -value, value * 2, float(value), str(value), value << 20, value + 0.5])
    if isinstance(value, str):
        many = value * 50 if len(value) <= len(BIG) // 5 else value
        forms = [value + "x", value[:-1], value.upper(), value + "\0", many, "../" + value, value + "\ud800"]
        return rng.choice(forms)
    if isinstance(value, list):
        return rng.choice([value * 2, value[::-1], value[:-1], value * 500 if _is_small(value) else value])
    if isinstance(value, float):
        return rng.choice([-value, value * 1e300, str(value)])
    return value


def _is_small(value: list[Any]) -> bool:
    """Whether it may be there some hundred times: what an input takes of memory is its reader's, not that of its making."""
    return len(value) < 50 and len(repr(value)) < 10_000


def _nested(rng: random.Random) -> Any:
    value: Any = 1
    lists = rng.random() < 0.5
    for _ in range(rng.choice((50, 900, 3000))):
        value = [value] if lists else {"a": value}
    return value
