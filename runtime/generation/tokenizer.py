"""Text to token ids and back, through the artifact's `tokenizer.json`; text that arrives in pieces."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import normalizers
from tokenizers.normalizers import Lowercase

from optc.compiler.diagnostics import JSON_ERRORS, InputError, foreign_errors
from optc.compiler.files import read_plain
from optc.compiler.json_text import parse_json
from optc.runtime.generation.tokenizer_bounds import bounded_file, within

_MAX_JSON = 1 << 20
_MAX_TOKENIZER = 64 << 20
_OTHER = "use a tokenizer.json written by the tokenizers library"
_BROKEN = "\ufffd"
_BROKEN_MOST = 3  # bytes of a character that is not complete
_WINDOW, _LONGEST = 8, 64  # tokens that are decoded together, and where none of the last ones has text


class Tokenizer:
    """A `tokenizer.json`.

    Args:
        core: of the library.
        slow_to_encode, slow_to_decode: such calls may never return, and are given up after a time.
    """

    def __init__(self, core: Any, *, slow_to_encode: bool = False, slow_to_decode: bool = False) -> None:
        self._core, self._slow_to_encode, self._slow_to_decode = core, slow_to_encode, slow_to_decode

    @property
    def size(self) -> int:
        """Ids that the tokenizer knows, added tokens included."""
        return int(self._core.get_vocab_size(with_added_tokens=True))

    @functools.cached_property
    def longest_token(self) -> int:
        """Characters of the longest token as the vocabulary writes it, at least the bytes of its text."""
        return max(map(len, self.vocabulary), default=1)

    def first_difference(self, other: Tokenizer) -> tuple[int, str | None, str | None] | None:
        """The smallest id that has different tokens here and there (None: no token), with both; None where all are equal."""
        ours, theirs = ({number: token for token, number in item.vocabulary.items()} for item in (self, other))
        different = (number for number in ours.keys() | theirs.keys() if ours.get(number) != theirs.get(number))
        first = min(different, default=None)
        return None if first is None else (first, ours.get(first), theirs.get(first))

    @property
    def vocabulary(self) -> dict[str, int]:
        """The id of each token, as the vocabulary writes it; added tokens included."""
        return dict(self._core.get_vocab(with_added_tokens=True))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids, with the special tokens that `tokenizer.json` adds (as transformers does) unless told not to."""

        def encode() -> list[int]:
            return list(self._core.encode_batch([text], add_special_tokens=special)[0].ids)  # a batch lets threads run

        with foreign_errors("the tokenizer cannot encode the text", where="tokenizer.json", remedy=_OTHER):
            return within(encode, len(text)) if self._slow_to_encode else encode()

    def encode_cut(self, text: str, most: int) -> list[int]:
        """`encode`, with the text's own tokens cut so that they are at most `most` with the special ones."""
        found = self.encode(text)
        if len(found) <= most:
            return found

        def cut() -> list[int]:
            plain = self._core.encode_batch([text], add_special_tokens=False)[0]
            plain.truncate(max(0, most - self._core.num_special_tokens_to_add(is_pair=False)))
            return list(self._core.post_process(plain).ids)

        with foreign_errors("the tokenizer cannot encode the text", where="tokenizer.json", remedy=_OTHER):
            return within(cut, len(text)) if self._slow_to_encode else cut()

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the tokens without special ones; incomplete UTF-8 becomes U+FFFD."""
        return self._decoded(list(tokens), skip=True)

    def token_text(self, token: int) -> str:
        """Text of one token, a special one's as it is written; part of a character is U+FFFD."""
        return self._decoded([token], skip=False)

    def _decoded(self, tokens: list[int], skip: bool) -> str:
        with foreign_errors("the tokenizer cannot decode tokens", where="tokenizer.json", remedy=_OTHER):
            if not self._slow_to_decode:
                return str(self._core.decode(tokens, skip_special_tokens=skip))
            batch = functools.partial(self._core.decode_batch, [tokens], skip_special_tokens=skip)  # lets threads run
            return str(within(batch, len(tokens))[0])


class TextStream:
    """Text of tokens that come one by one, never cut inside a character.

    Tokens of a byte-level vocabulary may hold parts of a character, and a decoder may treat the start of a text
    specially (SentencePiece drops its leading space). So the last tokens are decoded together each time; what an
    incomplete character may still change is held back. That is three replacement characters at most, one for each of its
    bytes: more of them are bytes that never become text, and a stream of these costs no more than any other.
    The pieces and `finish()` together are `tokenizer.decode` of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []  # the last ones
        self._given = 0  # characters of their text that are given out

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        self._tokens.append(token)
        return self._take(held=_BROKEN_MOST)

    def finish(self) -> str:
        """The rest, an incomplete character as U+FFFD."""
        return self._take(held=0)

    def _take(self, held: int) -> str:
        text = self._tokenizer.decode(self._tokens)
        broken = len(text) - len(text.rstrip(_BROKEN))
        end = len(text) - min(broken, 0 if len(self._tokens) > _LONGEST else held)
        piece = text[self._given : end]
        self._given = max(self._given, end)
        if len(self._tokens) > _WINDOW:
            self._forget(len(text) - self._given)
        return piece

    def _forget(self, left: int) -> None:
        """Keep the last tokens, where the characters that are held back are theirs (special tokens have no text)."""
        last = self._tokens[-_WINDOW // 2 :]
        length = len(self._tokenizer.decode(last))
        if length >= left:
            self._tokens, self._given = last, length - left


def load_tokenizer(folder: Path, *, lower_case: bool = False) -> Tokenizer | None:
    """The tokenizer of a folder, or None where there is no `tokenizer.json`.

    Args:
        lower_case: texts are lower-cased first (special tokens in them are not).

    Raises:
        InputError: it does not parse, or would take too much time or memory.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    found = bounded_file(read_plain(path, "reading the tokenizer", most=_MAX_TOKENIZER), str(path))
    with foreign_errors("the tokenizer cannot be read", where=str(path), remedy=_OTHER):
        core = tokenizers.Tokenizer.from_buffer(found.data)
        core.no_padding()
        core.no_truncation()
        if lower_case:
            before = [Lowercase()] + ([] if core.normalizer is None else [core.normalizer])
            core.normalizer = normalizers.Sequence(before)
    return Tokenizer(core, slow_to_encode=found.slow_to_encode, slow_to_decode=found.slow_to_decode)


def eos_token_ids(folder: Path, default: Iterable[int] = ()) -> tuple[int, ...]:
    """Ids that end a text: from `generation_config.json`, else `config.json`, else `default`.

    Raises:
        InputError: a config that is not JSON, or ids that are not integers.
    """
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        found = read_config(path).get("eos_token_id")
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(type(item) is int for item in ids):
            raise InputError(
                "eos_token_id is not an integer or a list of them",
                where=str(path),
                remedy="give token ids there, or remove the key",
            )
        return tuple(ids)
    return tuple(default)


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object of a model's folder, {} where there is no such file.

    Raises:
        InputError: too large, not JSON, or no object.
    """
    if not path.is_file():
        return {}
    try:
        found = parse_json(read_plain(path, "reading a config", most=_MAX_JSON))
    except JSON_ERRORS as error:
        raise InputError(
            "the file is not JSON", where=str(path), why=str(error), remedy="correct the line, or write it again"
        ) from error
    if not isinstance(found, dict):
        raise InputError("the file does not hold a JSON object", where=str(path), remedy="download the file again")
    return found
