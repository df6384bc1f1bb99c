"""Rotary embeddings whose frequencies depend on the length of the sequence, held to those of short sequences.

transformers' modules look at the largest position of each call, and beyond the length that a model was made for take
other frequencies (dynamic: NTK-aware scaling; longrope: Ding et al. 2024, https://arxiv.org/abs/2402.13753). Up to there
they are constants, which is what is captured, with a context that ends there: see `rotary_limit`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_ORIGINAL = "original_inv_freq"


@contextmanager
def short_frequencies(model: torch.nn.Module) -> Iterator[None]:
    """Let rotary modules compute with the frequencies that they were made with, whatever they are called with."""
    before: list[tuple[Any, str, Any]] = []

    def put(module: Any, name: str, value: Any) -> None:
        before.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str):
            put(module, "rope_type", "default")
        elif isinstance(kinds, dict):
            put(module, "rope_type", dict.fromkeys(kinds, "default"))
        else:
            continue
        for name in [name for name in dir(module) if name.endswith(_ORIGINAL)]:
            put(module, name.removesuffix(_ORIGINAL) + "inv_freq", getattr(module, name).clone())
    try:
        yield
    finally:
        for module, name, value in reversed(before):
            setattr(module, name, value)
