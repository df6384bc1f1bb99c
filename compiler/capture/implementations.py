"""The attention implementation of a transformers model, set for a while in every config that its modules read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_SETTINGS = ("_attn_implementation", "_experts_implementation")


@contextmanager
def implementations(model: torch.nn.Module, attention: str, experts: str) -> Iterator[None]:
    """Let a model compute attention and experts by these names.

    Encoder-decoder models give their stacks copies of the config: setting that of the model alone would reach no layer.
    """
    configs: dict[int, Any] = {
        id(module.config): module.config for module in model.modules() if hasattr(module, "config")
    }
    before = [(config, name, getattr(config, name, None)) for config in configs.values() for name in _SETTINGS]
    try:
        for config in configs.values():
            config._attn_implementation, config._experts_implementation = attention, experts
        yield
    finally:
        for config, name, value in before:
            setattr(config, name, value)
