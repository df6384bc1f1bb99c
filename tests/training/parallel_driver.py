"""Loss curves of a model folder, in one process and in two: run by test_parallel.py, each rank in a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from optc.training import deepspeed_zero
from optc.training.parallel import (
    ParallelConfig,
    apply_data_parallel,
    clip_grad_norm,
    scale_loss,
    shard_optimizer,
    start_processes,
    sum_over_ranks,
    synchronizing,
)

STEPS, ROWS, LENGTH, CLIP = 4, 4, 20, 0.5
BOOK = Path(__file__).parents[2] / "examples" / "book.txt"
MODES: dict[str, tuple[ParallelConfig, int]] = {
    "ddp": (ParallelConfig(kind="ddp"), 1),
    "ddp, accumulation": (ParallelConfig(kind="ddp"), 2),
    "zero1": (ParallelConfig(kind="zero1"), 1),
    "fsdp": (ParallelConfig(kind="fsdp"), 1),
    "fsdp, accumulation": (ParallelConfig(kind="fsdp"), 2),
    "fsdp as zero2": (ParallelConfig(kind="fsdp", reshard_after_forward=False), 1),
}
DEEPSPEED: dict[str, tuple[ParallelConfig, int]] = {
    "deepspeed 1": (ParallelConfig(kind="deepspeed", zero_stage=1), 1),
    "deepspeed 2, accumulation": (ParallelConfig(kind="deepspeed", zero_stage=2), 2),
    "deepspeed 3": (ParallelConfig(kind="deepspeed", zero_stage=3), 1),
}


def load(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.train()


def batches(folder: Path) -> list[dict[str, Tensor]]:
    """The book's first tokens, in rows of different label counts, so that a mean of means would show."""
    from transformers import AutoTokenizer

    text = BOOK.read_text()
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])
    found = []
    for tokens in ids[: STEPS * ROWS * LENGTH].view(STEPS, ROWS, LENGTH):
        labels = tokens.clone()
        for row in range(ROWS):
            labels[row, LENGTH - 4 * row :] = -100
        found.append({"input_ids": tokens, "labels": labels})
    return found


def loss_sum(module: nn.Module, part: dict[str, Tensor]) -> Tensor:
    logits = module(input_ids=part["input_ids"], use_cache=False).logits
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        part["labels"][:, 1:].flatten(),
        ignore_index=-100,
        reduction="sum",
    )


def curve(folder: Path, config: ParallelConfig, accumulation: int, steps: int = STEPS) -> list[float]:
    """The loss of each step, over all label tokens of all ranks."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if config.kind != "none" else (0, 1)
    model = load(folder)
    module = apply_data_parallel(model, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)
    if config.kind == "deepspeed":
        module, optimizer = deepspeed_zero.connect(model, optimizer, config, clip_norm=CLIP)
    else:
        optimizer = shard_optimizer(optimizer, config)
    losses = []
    for batch in batches(folder)[:steps]:
        rows = torch.arange(ROWS).view(accumulation * size, -1)[rank * accumulation : (rank + 1) * accumulation]
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        total = 0.0
        for number, mine in enumerate(rows):
            part = {name: value[mine] for name, value in batch.items()}
            with synchronizing(module, last=number == len(rows) - 1):
                found = loss_sum(module, part)
                if config.kind == "deepspeed":
                    deepspeed_zero.backward(module, scale_loss(found, tokens), last=number == len(rows) - 1)
                else:
                    scale_loss(found, tokens).backward()
            total += found.item()
        if config.kind != "deepspeed":
            clip_grad_norm(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum_over_ranks(total, torch.device("cpu")) / tokens)
    return losses


def main() -> None:
    folder, output = Path(sys.argv[1]), Path(sys.argv[2])
    start_processes(torch.device("cpu"), ParallelConfig())
    found: dict[str, Any] = {}
    for name, (config, accumulation) in (MODES | (DEEPSPEED if sys.argv[3:] else {})).items():
        found[name] = curve(folder, config, accumulation)
    if dist.get_rank() == 0:
        output.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
