"""Shards of a tiny model: bytes per rank, saving at two ranks, loading at four and one. Run by test_shards.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from optc.training.parallel import (
    ParallelConfig,
    apply_data_parallel,
    shard_optimizer,
    start_processes,
    synchronizing,
)
from optc.training.sharded_checkpoint import load_sharded, save_sharded

WIDTH, BLOCKS = 48, 3


class Tiny(nn.Module):
    """Blocks of two linears; the output's weight is the embedding's."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(BLOCKS)
        )
        self.head = nn.Linear(width, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return self.head(hidden)


def make(kind: str, seed: int) -> tuple[Tiny, nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Tiny()
    config = ParallelConfig(kind=kind)  # type: ignore[arg-type]
    module = apply_data_parallel(model, config)
    return model, module, shard_optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), config)


def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """The same batch on every rank, so that any number of ranks does the same step."""
    tokens = torch.arange(32).view(2, 16)
    loss = nn.functional.cross_entropy(module(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Names to whole weights, without the tied one."""
    found = {name: item.detach() for name, item in model.named_parameters()}
    return {name: item.full_tensor() if hasattr(item, "full_tensor") else item for name, item in found.items()}


def local_bytes(tensors: list[Tensor]) -> int:
    return sum((item.to_local() if hasattr(item, "to_local") else item).nbytes for item in tensors)


def exchanges(module: nn.Module) -> list[list[str]]:
    """Reductions over ranks in a micro-batch that is not the last of its step, and in the last."""
    found = []
    for last in (False, True):
        with profile(activities=[ProfilerActivity.CPU]) as trace, synchronizing(module, last=last):
            module(torch.arange(8).view(1, 8)).sum().backward()
        names = {event.key for event in trace.key_averages()}
        found.append(sorted(name for name in names if name.startswith("gloo:") and "reduce" in name))
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    start_processes(torch.device("cpu"), ParallelConfig())
    rank, size = dist.get_rank(), dist.get_world_size()
    report: dict[str, Any] = {"exchanges": {}}
    for kind in ("fsdp", "zero1"):
        if size == 2:
            model, module, optimizer = make(kind, seed=0)
            for _ in range(3):
                step(module, optimizer)
            save_sharded(folder / kind, model, optimizer, {"step": 3})
            tensors = whole(model)
            if rank == 0:
                save_file(
                    {name: item.contiguous() for name, item in tensors.items()},
                    folder / f"{kind}.safetensors",
                )
            report[kind] = [step(module, optimizer) for _ in range(3)]
            report["exchanges"][kind] = exchanges(module)
        else:
            # FSDP's shards go to FSDP over four; ZeRO-1's are read by FSDP as well.
            model, module, optimizer = make("fsdp", seed=9)
            extra = load_sharded(folder / kind, model, optimizer)
            expected = load_file(folder / f"{kind}.safetensors")
            found = whole(model)
            equal = all(torch.equal(found[name], expected[name]) for name in expected)
            states = [item for row in optimizer.state.values() for item in row.values() if item.dim()]
            mine = [None] * size
            dist.all_gather_object(mine, (local_bytes(list(model.parameters())), local_bytes(states)))
            total = sum(item.nbytes for item in found.values())
            report[kind] = {
                "equal": equal,
                "extra": extra,
                "bytes": mine,
                "total": total,
                "losses": [step(module, optimizer) for _ in range(3)],
            }
    if rank == 0:
        (folder / f"{size}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
