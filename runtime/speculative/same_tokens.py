"""Whether the token ids of a model that drafts mean what they mean in the model that verifies."""

from __future__ import annotations

from pathlib import Path

from optc.compiler.diagnostics import InputError
from optc.runtime.generation.tokenizer import load_tokenizer


def check_same_tokens(draft: Path, base: Path | None) -> None:
    """Refuse a draft model whose token ids mean other tokens.

    Args:
        draft, base: folders of models, or artifacts; no `base` has no tokenizer.

    Raises:
        InputError: see above; it names the first id. Or one of them has no tokenizer.
    """
    theirs = load_tokenizer(draft)
    ours = None if base is None else load_tokenizer(base)
    if theirs is None or ours is None:
        raise InputError(
            "the tokens of the model that drafts cannot be compared",
            where=str(draft if theirs is None else base or "the model in memory"),
            why="there is no tokenizer.json",
            remedy="compile both models from folders with their tokenizers",
        )
    found = ours.first_difference(theirs)
    if found is not None:
        number, our, their = found
        raise InputError(
            "the model that drafts has another tokenizer",
            where=str(draft),
            why=f"token id {number} is {_shown(their)} there and {_shown(our)} in the model that verifies",
            remedy="draft with a model of the same family, or with --speculative ngram, suffix or lookahead",
        )


def _shown(token: str | None) -> str:
    return "no token" if token is None else repr(token[:40])
