"""Log-probabilities of tokens in the two forms that OpenAI has for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from optc.runtime.generation.tokenizer import Tokenizer
from optc.runtime.serving.request import TokenLogprobs

Rows = Sequence[tuple[int, TokenLogprobs]]

_LOWEST = -9999.0  # stands for a probability of 0, as JSON has no infinity


def completion_logprobs(tokenizer: Tokenizer, rows: Rows, offset: int) -> dict[str, Any]:
    """Of /v1/completions. `offset`: characters of the answer before these tokens. Equal texts of different tokens are
    one key of `top_logprobs`: the likelier one's."""
    texts = [tokenizer.token_text(token) for token, _ in rows]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    top: list[dict[str, float]] = []
    for _, row in rows:
        found: dict[str, float] = {}
        for token, value in row.top:
            found.setdefault(tokenizer.token_text(token), _finite(value))
        top.append(found)
    return {
        "tokens": texts,
        "token_logprobs": [_finite(row.chosen) for _, row in rows],
        "top_logprobs": top,
        "text_offset": offsets,
    }


def chat_logprobs(tokenizer: Tokenizer, rows: Rows) -> dict[str, Any]:
    """Of /v1/chat/completions."""
    return {
        "content": [
            {
                **_token(tokenizer, token, row.chosen),
                "top_logprobs": [_token(tokenizer, other, value) for other, value in row.top],
            }
            for token, row in rows
        ],
        "refusal": None,
    }


def _token(tokenizer: Tokenizer, token: int, value: float) -> dict[str, Any]:
    text = tokenizer.token_text(token)
    data = None if "\ufffd" in text else list(text.encode())  # part of a character: its bytes are not known here
    return {"token": text, "logprob": _finite(value), "bytes": data}


def _finite(value: float) -> float:
    return value if math.isfinite(value) else _LOWEST
