"""Small EAGLE-3 draft models for the tests."""

from __future__ import annotations

from typing import Any

import msgspec
import torch

from optc.compiler.capture.eagle3_model import Eagle3
from optc.compiler.model_folder.eagle3 import Eagle3Config

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
