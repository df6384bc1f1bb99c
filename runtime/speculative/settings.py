"""How a model is decoded speculatively: flags of commands, and what engines are given."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct

from optc.compiler.diagnostics import UsageError

Method = Literal["ngram", "suffix", "lookahead", "draft", "eagle3", "medusa"]

_DRAFT_TOKENS: dict[Method, int] = {"ngram": 8, "suffix": 8, "lookahead": 6, "draft": 4, "eagle3": 4, "medusa": 0}

_MODELS: tuple[Method, ...] = ("draft", "eagle3")
"""Methods that may open another artifact."""

MethodFlag = Annotated[
    Method,
    Meta(
        description="Draft the next tokens and verify them in one step: by what followed the same tokens before (ngram, "
        "suffix), by guesses that the model corrects (lookahead), by a smaller model (draft), by a layer that reads the "
        "model's hidden states (eagle3), or by heads of the model itself (medusa)."
    ),
]
DraftFlag = Annotated[
    Path,
    Meta(
        description="With --speculative draft or eagle3: artifact of the model that drafts; paged KV cache, the same tokenizer.",
        extra={"default": "the one that was compiled into ARTIFACT"},
    ),
]
DraftTokens = Annotated[
    int,
    Meta(
        ge=1,
        le=64,
        description="With --speculative: most tokens drafted in a step.",
        extra={"default": "ngram, suffix 8; lookahead 6; draft, eagle3 4; medusa all heads"},
    ),
]


DraftShape = Literal["auto", "chain", "tree"]

ShapeFlag = Annotated[
    DraftShape,
    Meta(
        description="With --speculative medusa: draft a chain of the heads' likeliest guesses, or the tree of guesses that "
        "was compiled in by --speculative-tree; auto takes what gives more tokens for its time.",
        extra={"default": "auto"},
    ),
]


class Speculation(Struct, frozen=True, kw_only=True):
    """How an engine drafts.

    Attributes:
        draft: artifact of the model that drafts, for the methods "draft" and "eagle3"; None takes the one that was compiled
            into the target's.
        draft_tokens: most of them in a step; 0: as many as the model has heads.
        shape: of drafts, see `ShapeFlag`; where nothing is adaptive, auto is the tree, where there is one.
        adaptive: draft only while it is faster; see `switch`. False is for measuring.
    """

    method: Method
    draft: Path | None = None
    draft_tokens: int = 4
    shape: DraftShape = "auto"
    adaptive: bool = True


def speculation_of(
    method: Method | None,
    draft: Path | None,
    draft_tokens: int | None,
    shape: DraftShape | None = None,
    *,
    adaptive: bool = True,
) -> Speculation | None:
    """What the flags ask for; None where decoding is plain.

    Raises:
        UsageError: flags that do not go together.
    """
    if method is None:
        for name, value in (("draft", draft), ("draft-tokens", draft_tokens), ("draft-shape", shape)):
            if value is not None:
                raise UsageError(f"--{name} has no effect without --speculative", remedy="leave it out")
        return None
    if method not in _MODELS and draft is not None:
        raise UsageError(
            f"--draft has no effect with --speculative {method}",
            remedy="leave it out, or give --speculative draft or eagle3",
        )
    if method != "medusa" and shape is not None:
        raise UsageError(
            f"--draft-shape has no effect with --speculative {method}",
            why="only heads make trees of guesses",
            remedy="leave it out, or give --speculative medusa",
        )
    return Speculation(
        method=method,
        draft=draft,
        draft_tokens=draft_tokens or _DRAFT_TOKENS[method],
        shape=shape or "auto",
        adaptive=adaptive,
    )
