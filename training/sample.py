"""What the model writes greedily behind the beginning of a text, before the first step and with the weights that are kept."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from optc.runtime.generation.tokenizer import eos_token_ids, load_tokenizer
from optc.training.frozen_base import FrozenBase
from optc.training.precision import autocast
from optc.training.setup import Run

PROMPT_TOKENS = 24
NEW_TOKENS = 48
_WHOLE = ("none", "ddp", "zero1")
"""Values of `parallel.kind` that leave the first rank all weights."""


class TrainSample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Continuations of one prompt, as text without special tokens.

    Attributes:
        prompt: the beginning of the validation set, or without one of the text.
        before: what the model wrote before the first step. after: with the weights of the output.
    """

    prompt: str
    before: str
    after: str


def can_sample(run: Run) -> bool:
    """Whether this process has a whole model that writes text: no shards, no heads on a frozen base, and a tokenizer."""
    whole = run.config.parallel.kind in _WHOLE and not isinstance(run.model, FrozenBase)
    return whole and run.world.rank == 0 and load_tokenizer(Path(run.config.model)) is not None


def continuation(run: Run) -> list[int]:
    """Up to `NEW_TOKENS` tokens, the likeliest each time, behind `prompt_of`; an end of text is not among them."""
    run.model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), autocast(run.config, run.device):
            return _greedy(run.model, prompt_of(run), eos_token_ids(Path(run.config.model)), run.device)
    finally:
        run.model.train()


def sample_of(run: Run, before: Sequence[int], after: Sequence[int]) -> TrainSample:
    """Both continuations as text."""
    tokenizer = load_tokenizer(Path(run.config.model))
    assert tokenizer is not None, "see can_sample"
    prompt, one, two = (tokenizer.decode(tokens) for tokens in (prompt_of(run), before, after))
    return TrainSample(prompt=prompt, before=one, after=two)


def prompt_of(run: Run) -> list[int]:
    """The first tokens of the validation set, or of the text."""
    found: list[int] = run.beginning[:PROMPT_TOKENS].tolist()
    return found


def _greedy(model: Any, prompt: list[int], ends: Collection[int], device: torch.device) -> list[int]:
    """Whole sequences each time, as in training: what a cache would change is not sampled."""
    chosen: list[int] = []
    longest = getattr(model.config, "max_position_embeddings", None) or PROMPT_TOKENS + NEW_TOKENS
    for _ in range(min(NEW_TOKENS, longest - len(prompt))):
        ids = torch.tensor([[*prompt, *chosen]], device=device)
        token = int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax())
        if token in ends:
            break
        chosen.append(token)
    return chosen
