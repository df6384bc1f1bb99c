"""Small EAGLE-3 draft models for the tests."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from families import make_model
from torch import Tensor

from optc.compiler.capture.eagle3 import capture_eagle3
from optc.compiler.capture.eagle3_model import Eagle3
from optc.compiler.ir.program import Program
from optc.compiler.model_folder.eagle3 import EMBEDDING, Eagle3Config, write_eagle3

SHAPE = Eagle3Config(
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    vocab_size=50,
    draft_vocab_size=20,
    boundaries=(0, 1, 2),
    norm_before_residual=True,
)

BOUNDARIES = (0, 1, 1)
FOR_LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "head_dim": 16,
    "vocab_size": 128,
    "draft_vocab_size": 90,
    "boundaries": BOUNDARIES,
    "context_length": 256,
}
"""A draft model for the tiny Llama of the families."""


def small_draft(seed: int = 0, **changes: Any) -> Eagle3:
    """With random weights, norms among them."""
    torch.manual_seed(seed)
    model = Eagle3(msgspec.structs.replace(SHAPE, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3 + (1.0 if parameter.dim() == 1 else 0.0))
    return model.eval()


def some_targets(config: Eagle3Config = SHAPE) -> torch.Tensor:
    """Ascending tokens that can be drafted, none in the place that it has in the base."""
    return (
        torch.randperm(config.vocab_size, generator=torch.Generator().manual_seed(1))[: config.draft_vocab_size]
        .sort()
        .values
    )


@functools.cache
def draft_for_llama() -> tuple[Any, Tensor]:
    """A draft model and the tokens that it can draft."""
    model = small_draft(**FOR_LLAMA)
    return model, some_targets(model.config)


@functools.cache
def captured_draft() -> Program:
    """The same from its folder, captured."""
    model, targets = draft_for_llama()
    with tempfile.TemporaryDirectory() as folder:
        tensors = {**model.tensors(), EMBEDDING: model.embed_tokens.weight}
        write_eagle3(Path(folder), model.config, tensors, targets, None)
        program, _ = capture_eagle3(Path(folder), None)
    return program


@functools.cache
def states_of(tokens: tuple[int, ...]) -> Tensor:
    """What the layers of the tiny Llama read [n, 3 C], by transformers' own forward."""
    model = make_model("llama")
    out = model(input_ids=torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
    return torch.cat([out.hidden_states[number][0] for number in BOUNDARIES], -1)


@torch.no_grad()
def expected(tokens: Sequence[int], most: int, begin: int = 0) -> list[int]:
    """A draft of a text whose states are known from `begin` on, each token by a forward of all positions."""
    model, targets = draft_for_llama()
    known = states_of(tuple(tokens[:-1]))[begin:]
    text, base, own = list(tokens[begin + 1 :]), known, torch.zeros(len(known), 64)
    for _ in range(most):
        positions = torch.arange(begin, begin + len(text))[None]
        logits, state = model(torch.tensor([text]), positions, base[None], own[None])
        text.append(int(targets[logits[0, -1].argmax()]))
        base, own = torch.cat((base, torch.zeros(1, base.shape[1]))), torch.cat((own, state[:, -1]))
    return text[len(text) - most :]
