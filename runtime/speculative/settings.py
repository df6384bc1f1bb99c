"""How a model is decoded speculatively."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

Method = Literal["ngram", "suffix"]
DraftTokens = Annotated[int, Meta(ge=1, le=64)]


class Speculation(Struct, frozen=True, kw_only=True):
    """How an engine drafts.

    Attributes:
        draft_tokens: most of them in a step.
        adaptive: draft only while it is faster; see `switch`. False is for measuring.
    """

    method: Method
    draft_tokens: DraftTokens = 8
    adaptive: bool = True
