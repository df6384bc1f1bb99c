"""What an artifact writes greedily behind the beginning of a text, beside what its source writes there."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from optc.runtime.measuring.reference import SourceModel
from optc.runtime.sessions.text_model import TextModel

PROMPT_TOKENS = 32
NEW_TOKENS = 64


@dataclass(frozen=True)
class GreedySample:
    """Two continuations of one prompt, as text without special tokens.

    Attributes:
        tokens: that the artifact chose.
        source: what the source model writes in fp32; None without one.
        same_tokens: that both begin with.
    """

    prompt: str
    artifact: str
    tokens: int
    source: str | None = None
    same_tokens: int | None = None


def greedy_sample(model: TextModel, text: Sequence[int], source: SourceModel | None) -> GreedySample:
    """Continue the first `PROMPT_TOKENS` tokens of a text by up to `NEW_TOKENS`, the likeliest each time.

    Args:
        text: at least one token, encoded by the model's tokenizer.
    """
    assert model.tokenizer is not None, "the text was encoded"
    length = min(PROMPT_TOKENS, model.session.context_length - 1, len(text))
    prompt = list(text[:length])
    count = min(NEW_TOKENS, model.session.context_length - length)
    found = model.generate(prompt, max_new_tokens=count).tokens
    decode = model.tokenizer.decode
    shown = GreedySample(decode(prompt), decode(found), len(found))
    if source is None:
        return shown
    expected = source.continued(prompt, count, model.stop_ids)
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(found, expected, strict=False))
    return GreedySample(shown.prompt, shown.artifact, shown.tokens, decode(expected), sum(1 for _ in pairs))
