"""What is refused when a request is submitted, the same for every engine."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from optc.compiler.diagnostics import BusyError, InputError
from optc.runtime.serving.request import Finish, Generate

NOT_FINITE = "the model computed logits that are not finite: a value overflowed, most likely in half precision"
"""`Answer.error` of such a request."""


@dataclass(frozen=True)
class Limits:
    """Of an engine; `context` is the most tokens that a request can hold in the cache."""

    vocabulary: int
    context: int
    max_waiting: int


def check_request(request: Generate, limits: Limits, known: Collection[str], waiting: int) -> tuple[int, Finish]:
    """How many tokens the request has in all when it ends by its limit or the context's, and which of them it is.

    The last token of a row is not fed: a full context has one more.

    Raises:
        InputError, BusyError: see `Engine.submit`.
    """
    if request.id in known:
        raise InputError(
            "a request of this name has not ended",
            where=f"request {request.id[:80]!r}",
            remedy="give the request another id, or wait",
        )
    if waiting >= limits.max_waiting:
        raise BusyError(
            "too many requests wait", why=f"{waiting} of {limits.max_waiting} at most", remedy="send it again later"
        )
    if not request.prompt:
        raise InputError("the prompt is empty", remedy="give at least one token")
    for where, tokens in (
        ("the prompt", request.prompt), ("stop_ids", request.stop_ids), ("logit_bias", request.logit_bias)
    ):  # fmt: skip
        if tokens and (min(tokens) < 0 or max(tokens) >= limits.vocabulary):  # of a prompt, in C
            token = next(token for token in tokens if not 0 <= token < limits.vocabulary)
            raise InputError(
                f"token id {token} is outside the vocabulary",
                where=where,
                why=f"the model has {limits.vocabulary} token ids, from 0 to {limits.vocabulary - 1}",
                remedy="encode the text with the model's own tokenizer",
            )
    for token, bias in request.logit_bias.items():
        if not math.isfinite(bias):
            raise InputError(
                f"the bias of token {token} is not a finite number",
                where="logit_bias",
                remedy="give a number from -100 to 100",
            )
    if len(request.prompt) > limits.context:
        raise InputError(
            f"a prompt of {len(request.prompt)} tokens does not fit the context of {limits.context}",
            remedy=f"shorten it by {len(request.prompt) - limits.context} token(s)",
        )
    wanted = len(request.prompt) + request.max_new_tokens
    return (wanted, "length") if wanted <= limits.context + 1 else (limits.context + 1, "context")
