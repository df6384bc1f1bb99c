"""Activation memory of training a 1B Llama per checkpointing policy and precision, and bytes per rank under FSDP.

    python benchmarks/train_memory.py                                       # one GPU: Llama 3.2 1B shape, 3 x 4096 tokens
    torchrun --standalone --nproc-per-node 2 benchmarks/train_memory.py --fsdp     # 2 (or 4) GPUs, or CPU processes
    python benchmarks/train_memory.py --tiny                                # a rehearsal on the CPU

Activations are what autograd keeps between forward and backward, each storage once; copies of weights in bf16, which
do not grow with the batch, are counted apart. Beside it stands what the allocator held more after the forward than
before, and the peak of a whole step. All variants make the loss in chunks, and compile blocks unless --eager.
"""

from __future__ import annotations

import argparse
import gc
import os
from typing import Any

import torch
import torch.distributed as dist
from common import record
from torch import nn
from train_common import (
    POLICIES,
    SHAPES,
    autocast,
    batch,
    chunked_loss,
    device,
    prepared,
    random_model,
    synchronize,
)

from optc.training.activation_checkpointing import CheckpointingConfig
from optc.training.metrics import tensor_bytes
from optc.training.parallel import ParallelConfig, apply_data_parallel, start_processes
from optc.training.saved_tensors import LiveTensors, SavedTensors


def measure(
    model: Any, data: dict[str, torch.Tensor], place: torch.device, *, amp: bool, eager: bool
) -> dict[str, Any]:
    """Bytes of one forward and backward pass."""

    def loss() -> torch.Tensor:
        with autocast(place, amp):
            return chunked_loss(model, data, compiled=not eager)

    loss().backward()  # compiles
    gc.collect()
    synchronize()
    found: dict[str, Any] = {}
    if eager:  # selective checkpointing caches outside autograd
        with LiveTensors() as live:
            value = loss()
            found["activations"] = live.bytes
    else:
        with SavedTensors(model.parameters()) as saved:
            value = loss()
        found["weight_copies"] = saved.weight_copies
        found["activations"] = saved.bytes - saved.weight_copies
    value.backward()
    del value
    if place.type == "cuda":
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        value = loss()
        found["allocated_by_forward"] = torch.cuda.memory_allocated() - before
        value.backward()
        synchronize()
        found["peak_above_weights_and_gradients"] = torch.cuda.max_memory_allocated() - before
        del value
    return found


def one_device(arguments: argparse.Namespace, shape: str, place: torch.device) -> dict[str, Any]:
    """Every policy in bf16 autocast, and none in fp32."""
    rows, length = (3, 64) if arguments.tiny else (arguments.rows, 4096)
    clash = {rows * length, length} & set(SHAPES[shape].values())
    assert not clash, f"{clash} tokens: weights of this size would be taken for activations"
    torch._dynamo.config.recompile_limit = 64
    torch.set_float32_matmul_precision("high")
    model = random_model(shape, place)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    data = batch(shape, rows, length, place)
    scope = "none" if arguments.eager else "blocks"
    table: dict[str, Any] = {}
    variants = [(name, policy, True, 1.0) for name, policy in POLICIES.items()]
    if not arguments.eager:
        variants.append(("none, compiler's budget 0.5", CheckpointingConfig(), True, 0.5))
    for name, policy, amp, budget in variants:
        torch.compiler.reset()  # a compiled block is used again under another policy otherwise
        contender = prepared(model, policy, scope, budget)
        table[name] = measure(contender, data, place, amp=amp, eager=arguments.eager)
        del contender
        gc.collect()
        print(name, table[name], flush=True)
    base = table["none"]["activations"]
    del model
    shallow = {
        name: _shallow(shape, data, place, amp, arguments.eager) for name, amp in (("bf16", True), ("fp32", False))
    }
    for row in table.values():
        row["fewer_than_none"] = 1 - row["activations"] / base
    return {
        "rows": rows,
        "seq_len": length,
        "compiled": not arguments.eager,
        "policies": table,
        "four_layers": shallow,
        "bf16_over_fp32": shallow["bf16"]["activations"] / shallow["fp32"]["activations"],
    }


def _shallow(shape: str, data: dict[str, torch.Tensor], place: torch.device, amp: bool, eager: bool) -> dict[str, Any]:
    """Four layers without checkpointing: in fp32 torch has no fused kernel for grouped heads, and scores are kept."""
    gc.collect()
    torch.compiler.reset()
    model = random_model(shape, place, layers=4)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    contender = prepared(model, CheckpointingConfig(), "none" if eager else "blocks", 1.0)
    found = measure(contender, data, place, amp=amp, eager=eager)
    print("four layers,", "bf16" if amp else "fp32", found, flush=True)
    return found


def sharded(shape: str) -> dict[str, Any]:
    """Bytes of weights and AdamW state on this rank after a step, against 1/N of the whole."""
    place = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    start_processes(place, ParallelConfig())
    model = random_model(shape, place)
    whole = sum(item.nbytes for item in model.parameters())
    module = apply_data_parallel(model, ParallelConfig(kind="fsdp"))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6)
    data = batch(shape, 1, 64, place)
    nn.functional.cross_entropy(module(input_ids=data["input_ids"]).logits[0].float(), data["labels"][0]).backward()
    optimizer.step()
    state = tensor_bytes(
        item for row in optimizer.state.values() for item in row.values() if isinstance(item, torch.Tensor)
    )
    module.reshard()
    mine = tensor_bytes(module.parameters()) + state
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return {
        "ranks": len(found),
        "bytes_per_rank": found,
        "whole": 3 * whole,
        "over_one_nth": [item * len(found) / (3 * whole) for item in found],
    }


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny shape, 3 x 64 tokens")
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--fsdp", action="store_true", help="bytes per rank, under torchrun")
    arguments = parser.parse_args()
    shape = "tiny" if arguments.tiny else "1b"
    place = device()
    about = {
        "shape": {**SHAPES[shape], "name": shape},
        "device": torch.cuda.get_device_name() if place.type == "cuda" else "cpu",
    }
    if arguments.fsdp:
        result = sharded(shape)
        if dist.get_rank() == 0:
            record(f"train_memory_fsdp_x{result['ranks']}_{shape}", {**about, **result}, 1)
        dist.destroy_process_group()
        return
    kind = "eager" if arguments.eager else "compiled"
    record(f"train_memory_{kind}_{shape}", {**about, **one_device(arguments, shape, place)}, 1)


if __name__ == "__main__":
    main()
