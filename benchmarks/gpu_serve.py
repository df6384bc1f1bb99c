"""The serving engine on the GPU, in process: random models of 8B and 0.5B shape, requests per second and their latencies.

    python benchmarks/gpu_serve.py                                  # 8b in bf16 and int4, 0.5b in bf16, all traffic
    python benchmarks/gpu_serve.py --shapes 8b --variants bf16 --traffic fixed --rounds 3
    python benchmarks/gpu_serve.py --shapes 0.5b --variants bf16 --profile
    python benchmarks/gpu_serve.py --budget-s 140                   # stops to begin rounds after so many seconds
    python benchmarks/gpu_serve.py --small                          # the same loop on the CPU, without graphs

Traffic: `fixed` is 256 requests of 128 tokens in and 128 out, all there at the start; `lognormal` is 1000 requests whose
lengths in and out are lognormal (median 128, sigma 0.8, 8 to 1024), all there at the start; `short` is 2000 requests of
128 in and 128 out. Prompts are random, so that none finds its beginning in the pool. The first round of a traffic compiles
and captures, and does not count. Times are the engine's caller's: a token is there when its answer is.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from typing import Any

import numpy as np
import torch
from common import LLAMA_8B, OPEN_GATE, RESULTS, llama_sizes, record

import optc
from optc.compiler.kernels.cuda.linear.configurations import tables
from optc.runtime.sampling import Sampling
from optc.runtime.serving.answers import Answers
from optc.runtime.serving.device_runner import DeviceRunner
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.paged_engine import PagedEngine
from optc.runtime.serving.request import Generate
from optc.runtime.sessions.cuda import CudaSession
from optc.runtime.sessions.cuda_memory import MemoryPlan

SHAPES = {
    "8b": {**LLAMA_8B, "max_position_embeddings": 8192},
    "0.5b": {
        **llama_sizes(layers=24, hidden=896, heads=14, kv_heads=2, mlp=4864, vocab=151936),
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "small": {
        **llama_sizes(layers=2, hidden=64, heads=4, kv_heads=2, mlp=128, vocab=512),
        "max_position_embeddings": 512,
    },
}
VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8": {"quant": "int8"},
    "int4": {"quant": "rtn", "bits": 4, "group_size": 128},
    "fp8-head16": {"quant": "fp8", "head_bits": 16},
    "int4-head16": {"quant": "rtn", "bits": 4, "group_size": 128, "head_bits": 16},
}
VLLM = {"8b bf16 fixed": 15450, "8b int4 fixed": 16120, "8b bf16 lognormal": 11280, "0.5b bf16 short requests/s": 400}
"""Output tokens per second of vLLM 0.24 on an H200, in process, measured with these shapes; its lognormal lengths were
others."""


def traffic(name: str, vocabulary: int, seed: int, small: bool) -> list[tuple[list[int], int]]:
    """Prompts, and how many tokens each is to get."""
    rng = np.random.default_rng(seed)
    if name == "lognormal":
        count, most = (24, 64) if small else (1000, 1024)
        median = 16 if small else 128
        inputs, outputs = (np.clip(rng.lognormal(np.log(median), 0.8, count), 4, most).astype(int) for _ in range(2))
    else:
        count = {"fixed": 256, "short": 2000}[name] if not small else 16
        inputs = outputs = np.full(count, 16 if small else 128)
    return [
        (rng.integers(0, vocabulary, length).tolist(), int(out)) for length, out in zip(inputs, outputs, strict=True)
    ]


def network(shape: str, device: str) -> Any:
    """A Llama with random weights on the device, in bf16 on the GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    settings = {"tie_word_embeddings": False, **SHAPES[shape]}
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            made = LlamaForCausalLM(LlamaConfig(**settings, dtype=str(dtype).removeprefix("torch.")))
    finally:
        torch.set_default_dtype(before)
    made.eval().requires_grad_(False)
    for layer in made.model.layers:  # as GPT-2 is initialized: rounding would grow with depth
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.mul_((2 * len(made.model.layers)) ** -0.5)
    return made


def open_session(program: Any, variant: str, blocks: int, small: bool) -> CudaSession:
    """The session that the engine takes over."""
    if not small:
        session: CudaSession = optc.optimize(
            program, dtype="bf16", kv_blocks=blocks, **OPEN_GATE, **VARIANTS[variant]
        ).session
        return session
    from optc.compiler.rewriting.passes import PassContext
    from optc.compiler.target.options import CompileOptions
    from optc.targets.inductor_cuda import TARGET

    for step in TARGET.recipe("decoder", CompileOptions(dtype="fp32", own=TARGET.options())):
        program = step.rewrite.run(program, PassContext()).program
    return CudaSession(program, MemoryPlan(weights=0, working=0, pool=0, num_blocks=64, prompt_tokens=512))


def settle() -> None:
    """As a server does once its engine is open: the collector looks at the model and its libraries, hundreds of thousands of
    objects, no more."""
    gc.collect()
    gc.freeze()


def serve(engine: PagedEngine, work: list[tuple[list[int], int]], sampling: Sampling) -> dict[str, Any]:
    """Submit all, step until all have ended."""
    runner = engine._runner
    assert isinstance(runner, DeviceRunner)
    launched, captured = runner.launched, runner.captured
    given: list[tuple[float, Answers]] = []
    waited = runner.model_s
    begin = time.perf_counter()
    for index, (prompt, count) in enumerate(work):
        engine.submit(Generate(id=str(index), prompt=prompt, max_new_tokens=count, sampling=sampling))
    while not engine.idle:
        answers = engine.step()
        given.append((time.perf_counter(), answers))
    seconds = time.perf_counter() - begin
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    counts: dict[str, int] = {}
    for now, answers in given:
        for answer in answers:
            if answer.tokens:
                first.setdefault(answer.id, now)
                last[answer.id] = now
                counts[answer.id] = counts.get(answer.id, 0) + len(answer.tokens)
    assert sum(counts.values()) == sum(count for _, count in work)
    ttft = [(at - begin) * 1e3 for at in first.values()]
    tpot = [(last[name] - first[name]) * 1e3 / (counts[name] - 1) for name in counts if counts[name] > 1]
    steps = runner.launched - launched
    return {
        "seconds": seconds,
        "output_tokens_per_s": sum(counts.values()) / seconds,
        "requests_per_s": len(work) / seconds,
        "ttft_ms": _percentiles(ttft),
        "tpot_ms": _percentiles(tpot),
        "steps": steps,
        "captured_share": (runner.captured - captured) / steps,
        "host_us_per_step": (seconds - (runner.model_s - waited)) * 1e6 / steps,
        "waited_share": (runner.model_s - waited) / seconds,
        "preemptions": engine.metrics().preemptions,
    }


def _percentiles(values: list[float]) -> dict[str, float]:
    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)}


def busy(engine: PagedEngine, work: list[tuple[list[int], int]], sampling: Sampling) -> dict[str, Any]:
    """The share of time in which the GPU runs any kernel, and the kernels that take the most of it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        result = serve(engine, work, sampling)
        torch.cuda.synchronize()
    events = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if "CUDA" in str(event.device_type)
    ]
    covered, until = 0.0, 0.0
    kernels: dict[str, float] = {}
    for start, end, name in sorted(events):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
        kernels[name[:70]] = kernels.get(name[:70], 0.0) + (end - start)
    whole = max(end for _, end, _ in events) - min(start for start, _, _ in events)
    most = sorted(kernels.items(), key=lambda item: -item[1])[:16]
    return {"busy_share": covered / whole, "profiled": result, "kernels_ms": {name: us / 1e3 for name, us in most}}


def run_shape(shape: str, given: argparse.Namespace, results: dict[str, Any]) -> None:
    """All variants and traffic of one shape."""
    program = optc.capture(network(shape, "cpu" if given.small else "cuda"))
    for variant in given.variants:
        if shape == "0.5b" and variant != "bf16":
            continue
        session = open_session(program, variant, given.blocks, given.small)
        options = EngineOptions(
            max_running=8 if given.small else given.running,
            token_budget=given.budget,
            max_waiting=4096,
            warm_up=given.warm_up,
        )
        begin = time.perf_counter()
        if given.copies:
            results[f"{shape} {variant} dequantized bytes"] = session.keep_dequantized()
        engine = PagedEngine(session.model, options, DeviceRunner)
        settle()
        results[f"{shape} {variant} warm-up"] = time.perf_counter() - begin
        print(shape, variant, "warm-up", time.perf_counter() - begin, flush=True)
        for name in given.traffic:
            if time.perf_counter() > given.until:
                break
            if shape == "8b" and name == "short":
                continue
            rounds: list[Any] = []
            for turn in range(given.rounds + 1):
                if time.perf_counter() > given.until and len(rounds) > 1:
                    break
                work = traffic(name, session.vocab_size, 100 * turn, given.small)
                found = serve(engine, work, Sampling(temperature=given.temperature))
                print(shape, variant, name, turn, json.dumps(found), flush=True)
                rounds.append(found)
            measured = rounds[1:]
            key = f"{shape} {variant} {name}"
            results[key] = {
                "first_round": rounds[0],
                "rounds": measured,
                "output_tokens_per_s": statistics.median(item["output_tokens_per_s"] for item in measured),
                "requests_per_s": statistics.median(item["requests_per_s"] for item in measured),
                "vllm_0.24": VLLM.get(key),
            }
            if given.profile and not given.small:
                work = traffic(name, session.vocab_size, 7, given.small)
                results[key]["profile"] = busy(engine, work, Sampling(temperature=given.temperature))
                print(json.dumps(results[key]["profile"]), flush=True)
            if not given.small:
                results[key]["peak_bytes"] = torch.cuda.max_memory_reserved()
            (RESULTS / "gpu_serve_partial.json").write_text(json.dumps(results, indent=2))
        engine.close()
        session.close()
        del engine, session
        gc.unfreeze()
        gc.collect()
        if not given.small:
            torch.cuda.empty_cache()


def main() -> None:
    """Run what was asked for, print and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["8b", "0.5b"], choices=list(SHAPES))
    parser.add_argument("--variants", nargs="*", default=["bf16", "int4"], choices=list(VARIANTS))
    parser.add_argument("--traffic", nargs="*", default=["fixed", "lognormal", "short"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--budget", type=int, default=None, help="tokens of a step")
    parser.add_argument("--blocks", type=int, default=4096, help="of 64 tokens, of the KV pool")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument(
        "--int4-limit", type=int, default=0, help="most tokens of products on codes; 0: as the tables say"
    )
    parser.add_argument("--warm-up", action="store_true", help="as `optc serve` does before it is ready")
    parser.add_argument(
        "--copies", action="store_true", help="keep dequantized copies of weights, as `optc serve` does"
    )
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--name", default="gpu_serve")
    parser.add_argument("--budget-s", type=float, default=float("inf"))
    given = parser.parse_args()
    given.until = time.perf_counter() + given.budget_s
    if given.small:
        given.shapes, given.variants, given.traffic, given.rounds = ["small"], ["bf16"], ["fixed", "lognormal"], 1
    if given.int4_limit:
        tables().limits["int4"]["product"] = given.int4_limit
    results: dict[str, Any] = {}
    for shape in given.shapes:
        run_shape(shape, given, results)
        gc.collect()
    (RESULTS / "gpu_serve_partial.json").unlink(missing_ok=True)
    if given.small:
        print(json.dumps(results, indent=2))
        return
    from gpu_timing import card

    record(given.name, {"card": card(), "settings": vars(given), "traffic": results}, 2)


if __name__ == "__main__":
    main()
