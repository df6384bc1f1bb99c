"""Step time of training a 1B Llama per checkpointing policy, MFU, and the ratio to a plain torch loop.

    python benchmarks/train_throughput.py                  # Llama 3.2 1B shape, random weights, rows x 4096 tokens, bf16
    python benchmarks/train_throughput.py --tiny           # a rehearsal on the CPU

Every contender does whole steps (forward in bf16 autocast over fp32 weights, backward, clip, fused AdamW) on the same
weights and batch, in rotating turns, each policy in turns with "none". "plain torch" is transformers' model under
torch.compile with whole logits and torch's cross-entropy; "optc" compiles blocks and makes the loss in chunks; "optc,
fp8" multiplies in 8-bit floats; "optc train" is the step of the command with all that it does (reading its batch,
numbers for the log), on weights of its own. Ratios are medians over rounds with 95 % intervals. MFU counts the model's
arithmetic (attention in full) over the peak in bf16, not what is computed again.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import interleave, ratio, record
from train_common import (
    POLICIES,
    SHAPES,
    batch,
    chunked_loss,
    device,
    make_step,
    plain_loss,
    prepared,
    product_step,
    random_model,
    twin,
)

from optc.runtime.measuring.benchmark import median_rate
from optc.training.metrics import flops_per_token, peak_flops


def main() -> None:
    """Time, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny shape, 2 x 64 tokens")
    parser.add_argument("--rows", type=int, default=0, help="0: as many as surely fit: 4 with 120 GB, else 2")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--policies", nargs="*", default=list(POLICIES), help="default: all")
    parser.add_argument("--plain-scope", default="model", choices=["model", "blocks", "none"])
    arguments = parser.parse_args()
    shape, place = "tiny" if arguments.tiny else "1b", device()
    rows, length = (2, 64) if arguments.tiny else (arguments.rows or fitting_rows(place), 4096)
    torch._dynamo.config.recompile_limit = 64
    torch.set_float32_matmul_precision("high")
    model = random_model(shape, place)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    data = batch(shape, rows, length, place)
    seconds: dict[str, dict[str, list[float]]] = {}
    for name in arguments.policies:
        # One policy at a time: a compiled block would be used again under another policy.
        torch.compiler.reset()
        contenders = {"optc, none": _optc(model, "none", data, optimizer, place)}
        if name == "none":
            contenders["optc, fp8"] = _optc(model, "none", data, optimizer, place, fp8=True)
            contenders["plain torch"] = _plain(model, arguments.plain_scope, data, optimizer, place)
            with tempfile.TemporaryDirectory() as folder:
                contenders["optc train"] = product_step(shape, rows, length, Path(folder))
        else:
            contenders[f"optc, {name}"] = _optc(model, name, data, optimizer, place)
        seconds[name] = interleave(contenders, arguments.rounds, warmup=3)
        del contenders
        gc.collect()
    record(f"train_throughput_{shape}", summary(model, seconds, rows, length, shape, place), 1)


def _optc(
    model: Any, policy: str, data: Any, optimizer: Any, place: torch.device, fp8: bool = False
) -> Callable[[], float]:
    contender = prepared(model, POLICIES[policy], "blocks", fp8=fp8)
    return make_step(lambda: chunked_loss(contender, data, compiled=True), optimizer, place)


def _plain(model: Any, scope: str, data: Any, optimizer: Any, place: torch.device) -> Callable[[], float]:
    plain = twin(model)
    if scope == "model":
        plain = torch.compile(plain, dynamic=False)
    elif scope == "blocks":
        for block in plain.model.layers:
            block.compile(dynamic=False)
    return make_step(lambda: plain_loss(plain, data), optimizer, place)


def fitting_rows(place: torch.device) -> int:
    """Rows of 4096 tokens for which whole fp32 logits and the activations of policy none fit."""
    large = place.type == "cuda" and torch.cuda.get_device_properties(place).total_memory > 120e9
    return 4 if large else 2


def summary(
    model: Any,
    seconds: dict[str, dict[str, list[float]]],
    rows: int,
    length: int,
    shape: str,
    place: torch.device,
) -> dict[str, Any]:
    """The figures per contender; ratios are to the contender that ran in turns with it."""
    work = flops_per_token(model, length) * rows * length
    peak = peak_flops(place, "bf16", None)
    table = {}
    for run in seconds.values():
        base = run["optc, none"]
        for name, values in run.items():
            if name in table:
                continue
            table[name] = {
                "seconds_per_step": median_rate(values).to_dict(),
                "tokens_per_s": median_rate([rows * length / value for value in values]).to_dict(),
                "mfu": None if peak is None else median_rate([work / value / peak for value in values]).to_dict(),
                "step_time_against_policy_none": ratio(values, base),
            }
            if "plain torch" in run:
                table[name]["speed_against_plain_torch"] = ratio(run["plain torch"], values)
    return {
        "shape": {**SHAPES[shape], "name": shape},
        "rows": rows,
        "seq_len": length,
        "precision": "bf16 autocast, fp32 weights",
        "device": torch.cuda.get_device_name() if place.type == "cuda" else "cpu",
        "parameters": sum(item.numel() for item in model.parameters()),
        "flops_per_step": work,
        "peak_flops": peak,
        "contenders": table,
    }


if __name__ == "__main__":
    main()
