"""This engine and vLLM on one GPU in one run: serving and batch-1 decoding of a Llama of 8B shape with random weights.

    python benchmarks/gpu_vllm.py --vllm SITE                                  # bf16 and int4 (groups of 128, bf16 head)
    python benchmarks/gpu_vllm.py --vllm SITE --variants int4 --rounds 3 --budget-s 250

Both are open at the same time and measured in turns, each through its own engine in its own process: `serve` is 256
requests of 128 tokens in and 128 out, `lognormal` 500 whose lengths are lognormal (median 128, sigma 0.8, 8 to 1024), all
there at the start, greedy, without an end; requests differ from round to round, and are the same for both. `decode` is
one request: the time of 256 tokens more than 16, behind a prompt. vLLM captures its graphs and compiles, as it does by
default; its 4-bit folder has random codes in the layout that `optc quantize` writes. SITE is a folder that holds vLLM.
Figures of earlier runs that are not measured again stay in the record, each with its date and commit.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import LLAMA_8B, OPEN_GATE, RESULTS, commit, interleave, random_llama, ratio, record
from gpu_serve import network, open_session, serve, settle, traffic
from safetensors import safe_open
from safetensors.torch import save_file
from vllm_peer import VllmPeer

import optc
from optc.runtime.generation.generate import generate
from optc.runtime.sampling import Sampling
from optc.runtime.serving.device_runner import DeviceRunner
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.paged_engine import PagedEngine

Work = list[tuple[list[int], int]]
Rounds = dict[str, Iterator[int]]
GROUP = 128
CONTEXT = 8192
SHORT, LONG = 16, 272


def work_of(name: str, vocabulary: int, seed: int) -> Work:
    """Prompts, and how many tokens each is to get: those of `gpu_serve.py`, half as many of lognormal lengths."""
    found = traffic("fixed" if name == "serve" else name, vocabulary, seed, small=False)
    return found if name == "serve" else found[: len(found) // 2]


def dense_folder(folder: Path) -> Path:
    """A config alone: vLLM makes the weights."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        **LLAMA_8B, max_position_embeddings=CONTEXT, tie_word_embeddings=False, architectures=["LlamaForCausalLM"]
    )
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    return folder


def packed_folder(folder: Path, device: str) -> Path:
    """4-bit weights as `optc quantize` lays them out: names and forms of a small model, with the sizes of the large one."""
    with tempfile.TemporaryDirectory() as temporary:
        small, quantized = Path(temporary, "small"), Path(temporary, "quantized")
        sizes = {"layers": 1, "hidden": 256, "heads": 4, "kv_heads": 2, "mlp": 512, "vocab": 8192}
        random_llama(small, **sizes)
        optc.compile(
            small, target="vllm", quant="rtn", bits=4, group_size=GROUP, dtype="bf16", output=quantized, **OPEN_GATE
        )
        settings = json.loads((quantized / "config.json").read_text())
        with safe_open(quantized / "model.safetensors", "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    settings |= {**LLAMA_8B, "max_position_embeddings": CONTEXT, "head_dim": 128, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(settings))
    widths = {256: 4096, 512: 14336, 128: 1024, 64: 128, 8192: 128256}
    shard: dict[str, torch.Tensor] = {}
    files: dict[str, str] = {}
    for layer in range(LLAMA_8B["num_hidden_layers"]):
        for name, tensor in found.items():
            if ".layers.0." in name:
                shard[name.replace(".layers.0.", f".layers.{layer}.")] = _grown(name, tensor, widths, device)
        if layer % 8 == 7:
            files |= _write(folder, shard, f"model-{layer // 8}.safetensors")
    shard = {name: _grown(name, tensor, widths, device) for name, tensor in found.items() if ".layers." not in name}
    files |= _write(folder, shard, "model-rest.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def _grown(name: str, tensor: torch.Tensor, widths: dict[int, int], device: str) -> torch.Tensor:
    """Random numbers of a tensor's kind, at the large model's sizes."""
    if name.endswith("weight_shape"):
        return torch.tensor([widths[int(size)] for size in tensor], dtype=tensor.dtype)
    rows, *others = tensor.shape
    per = {"weight_packed": 8, "weight_scale": GROUP}.get(name.rsplit(".", 1)[-1], 1)
    shape = [widths[rows], *(widths[size * per] // per for size in others)]
    if tensor.dtype is torch.int32:
        return torch.randint(-(1 << 31), (1 << 31) - 1, shape, dtype=torch.int32, device=device).cpu()
    made = torch.empty(shape, dtype=tensor.dtype, device=device)
    return (made.fill_(1.0) if not others else made.normal_(0.0, 0.02) if per == 1 else made.fill_(0.003)).cpu()


def _write(folder: Path, shard: dict[str, torch.Tensor], file: str) -> dict[str, str]:
    save_file(shard, folder / file, metadata={"format": "pt"})
    names = dict.fromkeys(shard, file)
    shard.clear()
    return names


def decode_rate(seconds_for: Callable[[int], float]) -> float:
    """Tokens per second behind the prompt and the first tokens."""
    return (LONG - SHORT) / (seconds_for(LONG) - seconds_for(SHORT))


def measure(variant: str, peer: VllmPeer, given: argparse.Namespace) -> dict[str, Any]:
    """Both engines in turns."""
    program = optc.capture(network(given.shape, given.device))
    session = open_session(program, "int4-head16" if variant == "int4" else variant, given.blocks, given.small)
    del program
    copied = session.keep_dequantized()
    vocabulary, seeds = session.vocab_size, iter(range(1000))
    result: dict[str, Any] = {"dequantized_bytes": copied}

    def one(context: int) -> list[int]:
        found: list[int] = np.random.default_rng(next(seeds)).integers(0, vocabulary, context).tolist()
        return found

    for context in given.contexts:

        def ours(context: int = context) -> float:
            def seconds(count: int) -> float:
                begin = time.perf_counter()
                generate(session, [one(context)], max_new_tokens=count)
                return time.perf_counter() - begin

            return decode_rate(seconds)

        def theirs(context: int = context) -> float:
            return decode_rate(lambda count: peer.ask("serve", prompts=[one(context)], counts=[count])["seconds"])

        result[f"decode {context}"] = compared(interleave({"optc": ours, "vllm": theirs}, given.samples, 2))
        print(variant, context, json.dumps(result[f"decode {context}"]), flush=True)
    options = EngineOptions(max_running=given.running, max_waiting=4096, token_budget=given.budget, warm_up=True)
    engine = PagedEngine(session.model, options, DeviceRunner)
    settle()
    for name in given.traffic:
        rounds: Rounds = {"optc": itertools.count(), "vllm": itertools.count()}  # the same requests for both

        def ours_serves(name: str = name, rounds: Rounds = rounds) -> float:
            rate: float = serve(engine, work_of(name, vocabulary, next(rounds["optc"])), Sampling())[
                "output_tokens_per_s"
            ]
            return rate

        def theirs_serves(name: str = name, rounds: Rounds = rounds) -> float:
            work = work_of(name, vocabulary, next(rounds["vllm"]))
            found = peer.ask("serve", prompts=[row for row, _ in work], counts=[count for _, count in work])
            return sum(map(len, found["tokens"])) / float(found["seconds"])

        if time.perf_counter() < given.until:
            result[name] = compared(interleave({"optc": ours_serves, "vllm": theirs_serves}, given.rounds))
            print(variant, name, json.dumps(result[name]), flush=True)
    engine.close()
    session.close()
    gc.unfreeze()
    return result


def compared(rates: dict[str, list[float]]) -> dict[str, Any]:
    """Medians and the ratio with its interval, when and of which commit."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "tokens_per_s": {name: statistics.median(values) for name, values in rates.items()},
        "optc_over_vllm": ratio(rates["optc"], rates["vllm"]),
        "rounds": rates,
    }


def main() -> None:
    """Open both, measure, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, required=True, metavar="SITE")
    parser.add_argument("--variants", nargs="*", default=["bf16", "int4"], choices=["bf16", "int4"])
    parser.add_argument("--traffic", nargs="*", default=["serve", "lognormal"], choices=["serve", "lognormal"])
    parser.add_argument("--contexts", nargs="*", type=int, default=[128, 4096])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--budget", type=int, default=None, help="this engine's --token-budget")
    parser.add_argument("--blocks", type=int, default=4096, help="of 64 tokens, of this engine's KV pool")
    parser.add_argument("--kv-gb", type=float, default=34.0, help="vLLM's KV pool; 4096 blocks are 34 GB")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="begin no traffic after so many seconds")
    parser.add_argument("--work", type=Path, default=Path("/dev/shm/gpu_vllm"))
    given = parser.parse_args()
    given.until, given.small, given.shape, given.device = time.perf_counter() + given.budget_s, False, "8b", "cuda"
    earlier = RESULTS / "gpu_vllm.json"
    results: dict[str, Any] = json.loads(earlier.read_text())["variants"] if earlier.exists() else {}
    given.work.mkdir(parents=True, exist_ok=True)
    for variant in given.variants:
        dense = variant == "bf16"
        folder = (dense_folder if dense else lambda path: packed_folder(path, given.device))(given.work / variant)
        options = {
            "dtype": "bfloat16",
            "max_model_len": CONTEXT,
            "max_num_seqs": given.running,
            "kv_cache_memory_bytes": int(given.kv_gb * 1e9),
            "gpu_memory_utilization": 0.4,
            "enable_prefix_caching": False,
            **({"load_format": "dummy"} if dense else {}),
        }
        with VllmPeer(given.vllm, folder, options, given.work / f"{variant}.log").wait() as peer:
            print(variant, "vLLM", peer.version, "open after", peer.seconds, flush=True)
            opened = {"vllm": peer.version, "vllm_open_s": peer.seconds}
            results[variant] = results.get(variant, {}) | opened | measure(variant, peer, given)
        gc.collect()
        torch.cuda.empty_cache()
    from gpu_timing import card

    settings = {name: value for name, value in vars(given).items() if name not in ("until", "vllm", "work")}
    record("gpu_vllm", {"card": card(), "settings": settings, "shape": LLAMA_8B, "variants": results}, 2)


if __name__ == "__main__":
    main()
