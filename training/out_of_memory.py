"""What to do about exhausted memory: the plan of the run as it is, and of changes that need less."""

from __future__ import annotations

import msgspec

from optc.compiler.diagnostics import ResourceError
from optc.training.config import TrainConfig
from optc.training.memory_plan import predict


def out_of_memory(config: TrainConfig, world_size: int, error: BaseException) -> ResourceError:
    """The error for people: what the plan predicts, and which settings it predicts less for."""
    peak = predict(config, world_size).peak
    rows = [
        f"--set {' --set '.join(words)} ({_size(less)})"
        for words, changed in _changes(config, world_size)
        if (less := predict(changed, world_size).peak) < 0.95 * peak
    ]
    cause = f"; {str(error).splitlines()[0]}" if str(error) else ""
    return ResourceError(
        "out of memory while training",
        where=config.model,
        why=f"the plan predicts a peak of {_size(peak)} on each rank{cause}",
        remedy="; or ".join(rows) or "use a smaller seq_len, or more ranks with parallel.kind=fsdp",
    )


def _changes(config: TrainConfig, world_size: int) -> list[tuple[list[str], TrainConfig]]:
    """Settings that keep what is computed: smaller micro-batches, recomputed activations, both."""
    rows = config.batch_size // world_size
    accumulate = msgspec.structs.replace(config, gradient_accumulation=rows)
    full = msgspec.structs.replace(config.checkpointing, policy="full")
    words = [f"gradient_accumulation={rows}"], ["checkpointing.policy=full"]
    return [
        (words[0], accumulate),
        (words[1], msgspec.structs.replace(config, checkpointing=full)),
        (words[0] + words[1], msgspec.structs.replace(accumulate, checkpointing=full)),
    ]


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
