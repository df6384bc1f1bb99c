"""From a trained model to a Hugging Face folder that `optc compile` captures with the trained quantization."""

from __future__ import annotations

from pathlib import Path

import msgspec
from torch import nn

from optc.training.lora import LoraConfig
from optc.training.qat import QatConfig


class SaveConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was applied to the model, and how the folder is written.

    Attributes:
        force: replace a folder that exists.
    """

    lora: LoraConfig = LoraConfig()
    qat: QatConfig = QatConfig()
    force: bool = False


def save_trained(model: nn.Module, tokenizer_source: Path, folder: Path, config: SaveConfig) -> None:
    """Write a trained model as a model folder, whole or not at all.

    Args:
        tokenizer_source: the folder that training started from: tokenizer, generation config and the like.
    """
    raise NotImplementedError
