"""The learning rate of each step, as a share of its peak."""

from __future__ import annotations

import math

from optc.training.config import ScheduleConfig


def learning_rate_share(config: ScheduleConfig, step: int, max_steps: int) -> float:
    """Share of the peak rate at `step` (from 0): (step + 1) / warmup at first, `min_ratio` at the last step.

    Source of the cosine: Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983, without restarts.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.kind == "constant":
        return 1.0
    done = (step - config.warmup_steps) / max(1, max_steps - 1 - config.warmup_steps)
    done = min(1.0, done)
    share = 1 - done if config.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.min_ratio + (1 - config.min_ratio) * share
