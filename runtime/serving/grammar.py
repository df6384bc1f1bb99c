"""Answers that hold to a grammar: JSON, a JSON schema, a regular expression, or a grammar in Lark's notation.

Which tokens may follow is computed by llguidance (https://github.com/guidance-ai/llguidance), the extra `grammar`, from the
artifact's tokenizer: a parser over the bytes of tokens and a trie of the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from optc.compiler.diagnostics import InputError, TargetError
from optc.runtime.serving.request import Grammar

Bits = npt.NDArray[np.int32]
"""[ceil(V / 32)]: bit i % 32 of word i // 32 says whether token i may follow."""

_SPACES = {"whitespace_flexible": True, "whitespace_pattern": "[ \\t\\n]{0,20}"}
"""Between parts of JSON: enough to indent ten times, and an end for models that would go on with nothing else."""

MOST_SOURCE = 1 << 16
"""Characters of a grammar: what it is compiled into may be many times as large."""


class GrammarState:
    """Where an answer stands in its grammar.

    Attributes:
        bits: of the tokens that may follow.
        complete: the answer is whole, and no token but one that ends it can follow.
        problem: why no token can follow, where something is wrong; else "".
    """

    def __init__(self, matcher: Any, words: int) -> None:
        self._matcher = matcher
        self.bits: Bits = np.zeros(words, np.int32)
        self.complete, self.problem = False, ""
        self._note()

    def take(self, token: int) -> None:
        """The answer goes on with this token."""
        self._matcher.consume_token(token)
        self._note()

    def ahead(self, draft: Sequence[int]) -> list[Bits]:
        """What may follow now, and behind each of these tokens, as far as they may follow each other.

        A token that would complete the answer is where it ends, too: nothing follows it. The state stays what it is.
        """
        found, taken = [self.bits.copy()], 0
        for token in draft:
            if not found[-1][token // 32] >> (token % 32) & 1:
                break
            taken += 1
            if not self._matcher.consume_token(token) or self._matcher.is_stopped():
                break
            bits = np.zeros_like(self.bits)
            self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
            found.append(bits)
        if taken:
            self._matcher.rollback(taken)
        return found

    def _note(self) -> None:
        if self._matcher.is_error():
            self.problem = f"the answer cannot hold to its grammar: {self._matcher.get_error()[:300]}"
        self.complete = self._matcher.is_stopped()
        if not self.complete:
            self._matcher.unsafe_compute_mask_ptr(self.bits.ctypes.data, self.bits.nbytes)


class Grammars:
    """Grammars over the tokens of an artifact.

    Args:
        folder: with `tokenizer.json`. stop_ids: tokens that end a text.
    """

    def __init__(self, folder: Path, vocabulary: int, stop_ids: tuple[int, ...]) -> None:
        self._path, self._vocabulary, self._stop_ids = folder / "tokenizer.json", vocabulary, stop_ids
        self._tokenizer: Any = None

    def open(self, grammar: Grammar) -> GrammarState:
        """The state before an answer.

        Raises:
            InputError: a grammar that cannot be compiled, or an artifact without a tokenizer.
            TargetError: llguidance is not installed.
        """
        try:
            import llguidance
        except ImportError as error:
            raise TargetError(
                "answers that hold to a grammar need the package llguidance, which is not installed",
                remedy="pip install 'optc[grammar]', where the server runs",
            ) from error
        if len(grammar.source) > MOST_SOURCE:
            raise _refused(f"{len(grammar.source)} characters; {MOST_SOURCE} at most")
        if self._tokenizer is None:
            self._tokenizer = self._open_tokenizer(llguidance)
        matcher = llguidance.LLMatcher(self._tokenizer, _compiled(llguidance.LLMatcher, grammar), log_level=0)
        if matcher.is_error():
            raise _refused(matcher.get_error()[:500])
        state = GrammarState(matcher, -(-self._tokenizer.vocab_size // 32))
        if state.complete:
            raise _refused("it allows no text")
        return state

    def _open_tokenizer(self, llguidance: Any) -> Any:
        if not self._path.is_file():
            raise InputError(
                "the model has no tokenizer, by which a grammar is compiled", remedy="leave the grammar out"
            )
        try:
            return llguidance.LLTokenizer(
                str(self._path), n_vocab=self._vocabulary, eos_token=list(self._stop_ids) or None
            )
        except ValueError as error:
            raise InputError(
                "the tokenizer cannot be used with grammars",
                where=self._path.name,
                why=str(error)[:300],
                remedy="leave response_format and grammars out for this model",
            ) from error


def _compiled(matcher: Any, grammar: Grammar) -> str:
    if grammar.kind == "regex":
        return str(matcher.grammar_from_regex(grammar.source))
    if grammar.kind == "grammar":
        return str(matcher.grammar_from_lark(grammar.source))
    source = "{}" if grammar.kind == "json" else grammar.source
    try:
        schema = json.loads(source)
        return str(matcher.grammar_from_json_schema(json.dumps(schema), defaults=_SPACES))
    except (ValueError, RecursionError) as error:
        raise _refused(str(error)[:300]) from error


def _refused(why: str) -> InputError:
    return InputError(
        "the grammar cannot be compiled",
        where="grammar",
        why=why,
        remedy="simplify the grammar, or correct what is named",
    )


def allowed(bits: Bits, vocabulary: int) -> npt.NDArray[np.bool_]:
    """bool [V], of the tokens that may follow; none beyond those of the tokenizer."""
    found = np.zeros(vocabulary, np.bool_)
    spread = np.unpackbits(bits.view(np.uint8), bitorder="little")[:vocabulary].astype(np.bool_)
    found[: len(spread)] = spread
    return found
