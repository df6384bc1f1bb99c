"""Mixed precision: autocast over fp32 weights, and the loss scale of fp16."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch

from optc.compiler.model_folder.dtypes import DTYPES
from optc.training.config import TrainConfig


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[object]:
    """The context of forward passes."""
    if config.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[config.precision])


def make_scaler(config: TrainConfig, device: torch.device) -> torch.amp.GradScaler:
    """A loss scale for fp16; for the other types one that does nothing."""
    return torch.amp.GradScaler(
        device.type,
        init_scale=config.scaler.initial,
        growth_interval=config.scaler.growth_interval,
        enabled=config.precision == "fp16",
    )
