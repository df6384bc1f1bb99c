"""Batch-1 decode of a Llama of 8B shape with random weights on the GPU, compiled in process, beside transformers.

    python benchmarks/gpu_decode.py                              # bf16, int8, int4 at 128, 1024 and 4096 tokens of context
    python benchmarks/gpu_decode.py --variants bf16 --contexts 128
    python benchmarks/gpu_decode.py --peers eager compiled       # transformers too; compiled: with a static cache
    python benchmarks/gpu_decode.py --layers 4                   # a quick try
    python benchmarks/gpu_decode.py --temperature 0.8 --top-p 0.95   # drawn tokens as well as greedy ones
    python benchmarks/gpu_decode.py --variants bf16 --contexts 128 --prompts 128 512 1024 2048   # see gpu_prompts.py

The model is made on the GPU, captured once, and compiled by `optc.optimize`, which runs the target's recipe with its gate.
Random weights say nothing about quality, so the gate's limits are open. Each figure is the median of samples of one
session's `generate`, greedy choice included. The ledger of a step comes from the profiler: kernels end one after the
other, and each is charged with the time since the one before ended. The share of the ceiling is of the bytes that a
step has to read (weights, keys and values), at the rate of the fastest of some streaming kernels in the same run.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from common import OPEN_GATE, RESULTS, record
from gpu_compile import SHAPES
from gpu_prompts import PROMPTS, first_tokens, matmul_rate
from gpu_timing import card, read_ceiling
from torch.fx import Node

import optc
from optc.compiler.ir.program import Program
from optc.optimizing import Optimized
from optc.runtime.generation.generate import generate
from optc.runtime.sampling import Sampling
from optc.runtime.sessions.cuda import CudaSession

VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8": {"quant": "int8", "head_bits": 16},
    "fp8": {"quant": "fp8", "head_bits": 16},
    "int4": {"quant": "rtn", "bits": 4, "group_size": 128, "head_bits": 16},
    "int8-head8": {"quant": "int8", "head_bits": 8},
    "int4-head8": {"quant": "rtn", "bits": 4, "group_size": 128, "head_bits": 8},
}
CONTEXTS = (128, 4096, 1024)
PROFILED = 8


def decode_rates(session: CudaSession, given: argparse.Namespace, sampling: Sampling) -> dict[str, Any]:
    """Tokens per second at each context."""
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {}
    new_tokens = given.new_tokens
    for context in given.contexts:
        prompt = rng.integers(0, session.vocab_size, (1, context)).tolist()
        runs = [
            generate(session, prompt, max_new_tokens=new_tokens, sampling=sampling) for _ in range(given.samples + 1)
        ][1:]
        step_ms = statistics.median(run.tpot_ms or 0.0 for run in runs)
        found[str(context)] = {
            "tokens_per_s": 1e3 / step_ms,
            "ms_per_step": step_ms,
            "bytes": step_bytes(session.program, context + new_tokens // 2),
        }
    return found


def step_bytes(program: Program, context: int) -> int:
    """Bytes that a decode step of one token has to read: every weight of a product, keys and values, a row of the
    embedding."""
    return sum(call["bytes"] for call in calls(program, context))


def calls(program: Program, context: int) -> list[dict[str, Any]]:
    """The calls of a program that launch kernels of optc's, in order, with what they read at one token."""
    found = []
    for node in program.graph.nodes:
        name = getattr(node.target, "__name__", "").partition(".")[0]
        if name == "fused_linear":
            size = sum(program.weight(weight).nbytes for item in node.args[1:] if (weight := _weight(program, item)))
        elif name.endswith("paged_attention_"):
            pools = [item.meta["val"] for item in node.args[3:5]]
            size = sum(context * pool.shape[2] * pool.shape[3] * pool.dtype.itemsize for pool in pools)
        elif name == "fused_experts":  # two kernels
            chosen = node.args[3].meta["val"].shape[1]
            stacks = [item.meta["val"] for item in node.args[1:3]]
            sizes = [chosen * stack[0].numel() * stack.dtype.itemsize for stack in stacks]
            found += [{"label": label, "bytes": size} for label, size in zip(("up", "down"), sizes, strict=True)]
            continue
        else:
            continue
        found.append({"label": _label(program, node), "bytes": size})
    return found


def _label(program: Program, node: Node) -> str:
    """What a call is of, the same in every layer: the end of its weight's name, or attention."""
    weight = _weight(program, node.args[1])
    if weight is None or node.target is not torch.ops.optc.fused_linear.default:
        return "attention"
    stem = weight.rpartition(".")[0].split(".")
    return ".".join(part for part in stem if not part.isdigit())


def _weight(program: Program, item: Any) -> str | None:
    return program.weight_of(item) if isinstance(item, Node) else None


def ledger(session: CudaSession, context: int) -> dict[str, Any]:
    """Microseconds by kernel of one step, averaged over some, and over layers where these are alike."""
    prompt = np.random.default_rng(1).integers(0, session.vocab_size, (1, context)).tolist()
    first = [int(session.prefill(prompt)[0].argmax())]
    list(session.stream(first, 3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        list(session.stream([1], PROFILED))
        torch.cuda.synchronize()
    events = sorted(
        (event.time_range.end, event.name)
        for event in profiler.events()
        if "CUDA" in str(event.device_type) and not event.name.startswith(("Memcpy", "Memset"))
    )
    per_step, rest = divmod(len(events), PROFILED)
    if rest or not per_step:
        return {"kernels": len(events), "note": f"{len(events)} kernels in {PROFILED} steps"}
    ends = [end for end, _ in events]
    microseconds = [
        statistics.median(ends[turn * per_step + i] - ends[turn * per_step + i - 1] for turn in range(1, PROFILED))
        for i in range(per_step)
    ]
    return _by_call(session.program, context, [name for _, name in events[:per_step]], microseconds)


def _by_call(program: Program, context: int, names: list[str], microseconds: list[float]) -> dict[str, Any]:
    """Kernels of a step with their times, summed over layers for the calls of the same module of each."""
    known = calls(program, context)
    ours = [i for i, name in enumerate(names) if name.startswith(("gemv", "product", "decode", "expert"))]
    kernels: dict[str, dict[str, Any]] = {}
    layers = len(program.contract.layers)
    for place, (name, time_us) in enumerate(zip(names, microseconds, strict=True)):
        label, size = name[:60], 0
        if len(ours) == len(known) and place in ours:
            call = known[ours.index(place)]
            label, size = f"{call['label']} ({name[:30]})", call["bytes"]
        entry = kernels.setdefault(label, {"count": 0, "us": 0.0, "bytes": 0})
        entry["count"] += 1
        entry["us"] += time_us
        entry["bytes"] += size
    for entry in kernels.values():
        entry["us_each"] = entry["us"] / entry["count"]
        entry["gb_per_s"] = entry["bytes"] / entry["us"] / 1e3 if entry["us"] else 0.0
    within = sum(entry["count"] for entry in kernels.values() if entry["count"] % layers == 0)
    return {
        "context": context,
        "kernels": len(names),
        "kernels_per_layer": within / layers,
        "microseconds": sum(microseconds),
        "by_call": kernels,
    }


def random_model(layers: int) -> Any:
    """A Llama of 8B shape but for its layers, in bf16 on the GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**SHAPES["8b"], "num_hidden_layers": layers}, tie_word_embeddings=False, dtype="bfloat16")
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            network = LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    for layer in network.model.layers:  # as GPT-2 is initialized: rounding would grow with depth
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.mul_((2 * layers) ** -0.5)
    return network


def run_variant(model: Program, name: str, given: argparse.Namespace, ceiling: float) -> dict[str, Any]:
    """Compile one variant, decode with it, give its memory back."""
    begin = time.perf_counter()
    compiled: Optimized = optc.optimize(model, dtype="bf16", **OPEN_GATE, **VARIANTS[name])
    seconds = time.perf_counter() - begin
    gc.collect()  # what passes left
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    plan = compiled.session.memory
    others = torch.cuda.memory_allocated() - plan.weights - plan.pool  # the model's own weights, where they were merged
    rates = decode_rates(compiled.session, given, Sampling())
    for row in rates.values():
        row["share_of_ceiling"] = row["bytes"] / row["ms_per_step"] * 1e3 / ceiling
    print(name, {context: round(row["tokens_per_s"], 1) for context, row in rates.items()}, flush=True)
    result = {
        "compile_s": seconds,
        "parts_s": compiled.seconds,
        "passes": {record.name: [record.matched, record.seconds] for record in compiled.passes},
        "decode": rates,
        "first_token": first_tokens(
            compiled.session,
            given.prompts,
            given.prompt_samples,
            step_bytes(compiled.session.program, 0),
            ceiling,
            given.matmul_rate,
        ),
        "memory": {"planned": plan.total, "others": others, "peak": torch.cuda.max_memory_reserved()},
        "ledger": [ledger(compiled.session, context) for context in given.contexts[:2]],
    }
    if given.temperature:
        sampling = Sampling(temperature=given.temperature, top_k=given.top_k, top_p=given.top_p)
        drawn = decode_rates(compiled.session, given, sampling)
        result["drawn"] = {"sampling": asdict(sampling), "decode": drawn}
        print(name, "drawn", {context: round(row["tokens_per_s"], 1) for context, row in drawn.items()}, flush=True)
    compiled.close()
    del compiled
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    print(json.dumps(result), flush=True)
    return result


def peers(network: Any, ways: list[str], contexts: tuple[int, ...], new_tokens: int) -> dict[str, Any]:
    """transformers in bf16 with its own attention: eager, and compiled with a static cache."""
    network.generation_config.eos_token_id = None
    found: dict[str, Any] = {}
    for way in ways:
        options = {} if way == "eager" else {"cache_implementation": "static"}
        if way == "compiled":
            network.forward = torch.compile(network.forward, mode="reduce-overhead", fullgraph=True)
        for context in contexts:
            ids = torch.randint(0, network.config.vocab_size, (1, context), device="cuda")
            times = []
            for count in (2, new_tokens, 2, new_tokens):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                network.generate(ids, min_new_tokens=count, max_new_tokens=count, do_sample=False, **options)
                torch.cuda.synchronize()
                times.append(time.perf_counter() - begin)
            found[f"{way} {context}"] = {"tokens_per_s": (new_tokens - 2) / (times[3] - times[2])}
            print("transformers", way, context, found[f"{way} {context}"], flush=True)
    return found


def main() -> None:
    """Make the model, run what was asked for, print and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--contexts", nargs="*", type=int, default=list(CONTEXTS))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--prompts", nargs="*", type=int, default=list(PROMPTS))
    parser.add_argument("--prompt-samples", type=int, default=15)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--peers", nargs="*", default=[], choices=["eager", "compiled"])
    given = parser.parse_args()
    given.contexts = tuple(given.contexts)
    ceiling, given.matmul_rate = read_ceiling(), matmul_rate()
    begin = time.perf_counter()
    network = random_model(given.layers)
    made = time.perf_counter()
    program = optc.capture(network)
    captured = time.perf_counter()
    print(f"model {made - begin:.1f} s, capture {captured - made:.1f} s", flush=True)
    name = "gpu_decode_8b" if given.layers == 32 else f"gpu_decode_{given.layers}_layers"
    result: dict[str, Any] = {
        "card": card(),
        "layers": given.layers,
        "read_ceiling_gb_per_s": ceiling / 1e9,
        "matmul_tflop_per_s": given.matmul_rate / 1e12,
        "model_s": made - begin,
        "capture_s": captured - made,
        "variants": {},
    }
    for variant in given.variants:
        result["variants"][variant] = run_variant(program, variant, given, ceiling)
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2))  # kept where a later one fails
    if given.peers:
        result["transformers"] = peers(network, given.peers, given.contexts[:1], given.new_tokens)
    record(name, result, 2)


if __name__ == "__main__":
    main()
