"""Every layout and scheme of `optc quantize` loaded by vLLM: perplexity there and here, on the same text.

    python benchmarks/vllm_folders.py --vllm SITE                       # needs a GPU
    python benchmarks/vllm_folders.py --vllm SITE --only fp8 gptq-4     # some of them
    python benchmarks/vllm_folders.py --work W --parts make here        # what needs no GPU; later, with W brought to one:
    python benchmarks/vllm_folders.py --work W --parts vllm --vllm SITE
    python benchmarks/vllm_folders.py --parts make here transformers library modelopt --add     # other loaders, on a CPU

fiction-26m, quantized by the command (`--calibration`), and a mixture of experts made of it; windows of a text that was
not calibrated on. "Here" is what `optc eval` computes of the folder: its own tensors, read by optc, in the type that it
was written in; `here` beside vLLM's figure, `cpu_here` beside those on a CPU, whose folders may be others. transformers,
compressed-tensors' library and ModelOpt compute in float32 (`folder_peers.py`, `folder_modelopt.py`). vLLM runs in bf16
without captured graphs, and several of them at a time. SITE is a folder that holds vLLM. A row says which commit each
side was run at, and when.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from common import RESULTS, ROOT, commit, record
from folder_modelopt import by_modelopt
from folder_peers import by_library, by_transformers, table
from quant_engines import perplexity
from safetensors.torch import load_file, save_file
from vllm_peer import VllmPeer

import optc
from optc.compiler.version import version_of
from optc.runtime.generation.tokenizer import load_tokenizer
from optc.runtime.measuring.benchmark import environment
from optc.runtime.measuring.speculation import cut_prompts
from optc.runtime.sessions.program import open_program

SHARED = ROOT.parent / "shared"
SOURCE = SHARED / "models" / "fiction-26m"
SCHEMES: dict[str, list[str]] = {
    "source": [],
    "rtn-4": ["--quant", "rtn", "--bits", "4", "--group-size", "128", "--pass-option", "quantize-rtn.ranges=full"],
    "gptq-4": ["--quant", "gptq", "--bits", "4", "--group-size", "128"],
    "gptq-4-asym": ["--quant", "gptq", "--bits", "4", "--group-size", "128", "--asymmetric"],
    "gptq-4 layout gptq": ["--quant", "gptq", "--bits", "4", "--group-size", "128", "--layout", "gptq"],
    "awq-4 layout awq": ["--quant", "awq", "--bits", "4", "--group-size", "128", "--layout", "awq"],
    "rotate+gptq-4": ["--quant", "rotate+gptq", "--bits", "4", "--group-size", "128"],
    "rtn-8": ["--quant", "rtn", "--bits", "8", "--group-size", "128"],
    "int8": ["--quant", "int8"],
    "smoothquant": ["--quant", "smoothquant"],
    "smoothquant-mixed": ["--quant", "smoothquant-mixed"],
    "smoothquant-rotated": ["--quant", "smoothquant-rotated"],
    "rotate+smoothquant": ["--quant", "rotate+smoothquant"],
    "w4a8": ["--quant", "w4a8"],
    "fp8": ["--quant", "fp8"],
    "fp8 kv-fp8": ["--quant", "fp8", "--kv-cache-dtype", "fp8"],
    "fp8-block": ["--quant", "fp8-block"],
    "fp8-block layout fp8": ["--quant", "fp8-block", "--layout", "fp8"],
    "moe source": ["--dtype", "bf16"],
    "moe rtn-4": ["--quant", "rtn", "--bits", "4", "--group-size", "128", "--pass-option", "quantize-rtn.ranges=full"],
    "moe fp8": ["--quant", "fp8"],
    "nvfp4": ["--quant", "nvfp4"],
    "mxfp4": ["--quant", "mxfp4"],
}
CALIBRATED = {
    "gptq", "awq", "smoothquant", "smoothquant-mixed", "smoothquant-rotated", "rotate+gptq", "rotate+smoothquant", "w4a8",
    "nvfp4", "--kv-cache-dtype",
}  # fmt: skip
"""What a command has whose folder depends on the calibration text."""
LAYERS, EXPERTS = 2, 4
"""Of the mixture of experts."""
MAKING = Lock()
OPTIONS: dict[str, dict[str, Any]] = {"fp8 kv-fp8": {"kv_cache_dtype": "fp8"}}
"""Of vLLM, beside those of `ENGINE`: it stores keys and values in FP8 only when told to."""
PARTS = ["make", "vllm", "here", "transformers", "library", "modelopt"]
SIDES = {"": {"vllm"}, "cpu_": set(PARTS) - {"make", "vllm"}}
"""Prefixes of commit, date and environment of the parts that ran: those on a GPU, and those on a CPU."""
LIBRARIES = ("transformers", "compressed-tensors", "nvidia-modelopt")
"""What the CPU's columns depend on beside torch."""
WINDOW = 512
ENGINE = {"enforce_eager": True, "dtype": "bfloat16", "kv_cache_memory_bytes": 1 << 30, "max_model_len": 2 * WINDOW}
"""Of vLLM. It is told what its cache may take: measured beside engines that come and go, there would be none left."""


def upcycled(place: Path) -> Path:
    """A mixture of experts as Mixtral's folders have it, of two layers of the source; made where it is not there yet.

    Each expert is the layer's MLP with noise of a tenth of its weights (sparse upcycling, Komatsuzaki et al. 2023,
    https://arxiv.org/abs/2212.05055, untrained): not a good model, but one whose perplexity says something.
    """
    folder = place / "moe"
    with MAKING:
        if folder.exists():
            return folder
        config = json.loads((SOURCE / "config.json").read_text())
        for name in ("architectures", "model_type", "mlp_bias", "attention_bias", "pretraining_tp"):
            config.pop(name, None)
        config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_hidden_layers": LAYERS}
        config |= {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
        work = place / "moe.part"
        work.mkdir(parents=True)
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"):
            if (SOURCE / file).exists():
                shutil.copy(SOURCE / file, work)
        save_file(mixture(), work / "model.safetensors", metadata={"format": "pt"})
        (work / "config.json").write_text(json.dumps(config, indent=2))
        work.rename(folder)
    return folder


def mixture() -> dict[str, torch.Tensor]:
    """The tensors of `upcycled`, under the names of a checkpoint of Mixtral."""
    held: dict[str, torch.Tensor] = {}
    for path in sorted(SOURCE.glob("*.safetensors")):
        held |= load_file(path)
    generator = torch.Generator().manual_seed(0)
    out = {}
    for name, tensor in held.items():
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else 0
        if layer >= LAYERS:
            continue
        if ".mlp." not in name:
            out[name] = tensor
            continue
        prefix, kind = name.split(".mlp.")
        part = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}[kind.split(".")[0]]
        for expert in range(EXPERTS):
            noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std() / 10
            out[f"{prefix}.block_sparse_moe.experts.{expert}.{part}.weight"] = (tensor.float() + noise).to(tensor.dtype)
    for layer in range(LAYERS):
        router = torch.randn(EXPERTS, held["model.norm.weight"].numel(), generator=generator) / 10
        out[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = router.bfloat16()
    return out


def quantized(name: str, folder: Path, samples: int) -> str:
    """Write a folder, calibrated on so many sequences; the error's first line where there is none."""
    text = SHARED / "text" / "train.txt"
    source = upcycled(folder.parent) if name.startswith("moe") else SOURCE
    verb = ["quantize"] if "--quant" in SCHEMES[name] else ["compile", "--target", "vllm"]
    command = [sys.executable, "-m", "optc", *verb, str(source), "-o", str(folder), *SCHEMES[name]]
    if not CALIBRATED.isdisjoint(SCHEMES[name]):
        command += ["--calibration", str(text), "--calibration-samples", str(samples)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1500)
    return "" if not done.returncode else f"exit {done.returncode}: {done.stderr.strip()[-400:]}"


def perplexity_here(folder: Path, rows: list[list[int]]) -> float:
    """Of the folder as optc reads it."""
    session = open_program(optc.capture(folder))
    logits = [np.concatenate(list(session.score(row[:-1]))) for row in rows]
    session.close()
    return perplexity(logits, rows)


def perplexity_there(
    folder: Path, rows: list[list[int]], options: dict[str, Any], site: Path, log: Path
) -> dict[str, Any]:
    """Of the folder as vLLM reads it."""
    with VllmPeer(site, folder, ENGINE | options, log).wait() as peer:
        found = [value for row in peer.ask("score", rows=rows)["log_probabilities"] for value in row]
        return {"perplexity": math.exp(-sum(found) / len(found)), "version": peer.version}


def folder_of(name: str, place: Path) -> Path:
    """Where a scheme is."""
    return SOURCE if name == "source" else place / name.replace(" ", "-")


def made_and_loaded(name: str, place: Path, rows: list[list[int]], given: argparse.Namespace) -> dict[str, Any]:
    """Quantize and let vLLM read it: processes of their own, so that several may run."""
    folder = folder_of(name, place)
    if "make" in given.parts and not folder.exists() and (refused := quantized(name, folder, given.samples)):
        return {"refused": refused}
    if "vllm" not in given.parts:
        return {}
    try:
        return {"vllm": perplexity_there(folder, rows, OPTIONS.get(name, {}), given.vllm, place / f"{folder.name}.log")}
    except RuntimeError as error:
        return {"vllm": {"error": str(error)[-1500:]}}


def sides_of(parts: list[str]) -> list[str]:
    """The prefixes of the sides that ran."""
    return [side for side, own in SIDES.items() if not own.isdisjoint(parts)]


def environments(parts: list[str]) -> dict[str, Any]:
    """`environment`, vLLM's, and `cpu_environment`: this machine's for the sides that ran, the kept one for the other."""
    path = RESULTS / "vllm_folders.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    here = environment(1)
    found = {name: version for name in LIBRARIES if (version := version_of(name))}
    sides = {"": here, "cpu_": here | {"versions": here["versions"] | found}}
    ran = sides_of(parts)
    every = {
        f"{side}environment": what if side in ran else kept.get(f"{side}environment") for side, what in sides.items()
    }
    return {name: what for name, what in every.items() if what is not None}


def main() -> None:
    """Quantize, load on both sides, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, default=None, metavar="SITE", help="folder that holds vLLM")
    parser.add_argument("--parts", nargs="*", default=["make", "vllm", "here"], choices=PARTS)
    parser.add_argument("--only", nargs="*", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences of 512 tokens")
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--work", type=Path, default=None, help="folder for what is quantized, which stays")
    parser.add_argument("--add", action="store_true", help="keep the figures of the JSON file that are not made anew")
    given = parser.parse_args()
    if "vllm" in given.parts and given.vllm is None:
        parser.error("--vllm SITE is needed, or --parts without vllm")
    tokenizer = load_tokenizer(SOURCE)
    assert tokenizer is not None
    text = (SHARED / "text" / "validation.txt").read_text(encoding="utf-8")
    rows = cut_prompts(tokenizer.encode(text[:2_000_000]), given.windows, WINDOW)
    with tempfile.TemporaryDirectory() as temporary:
        place = given.work or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        kept = place / "figures.json"
        found: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
        if given.add and not found:
            found = json.loads((RESULTS / "vllm_folders.json").read_text())["schemes"]
        with ThreadPoolExecutor(given.jobs) as pool:
            tasks = {name: pool.submit(made_and_loaded, name, place, rows, given) for name in given.only}
            for name, task in tasks.items():
                figures = found.setdefault(name, {})
                figures |= task.result()
                if "here" in given.parts and "refused" not in figures:
                    figures["here" if "vllm" in given.parts else "cpu_here"] = perplexity_here(
                        folder_of(name, place), rows
                    )
                if "transformers" in given.parts and "refused" not in figures:
                    figures["transformers"] = by_transformers(folder_of(name, place), rows)
                if "library" in given.parts and "refused" not in figures and name != "source":
                    figures["library"] = by_library(folder_of(name, place), rows)
                if "modelopt" in given.parts and "refused" not in figures:
                    figures["modelopt"] = by_modelopt(folder_of(name, place), rows)
                if not CALIBRATED.isdisjoint(SCHEMES[name]):
                    figures["samples" if "vllm" in given.parts else "cpu_samples"] = given.samples
                for side in sides_of(given.parts):
                    figures |= {f"{side}commit": commit(), f"{side}date": datetime.now(UTC).date().isoformat()}
                print(name, json.dumps(figures), flush=True)
                kept.write_text(json.dumps(found))
    print(table(found))
    result = {"model": "fiction-26m", "windows": given.windows, "window": WINDOW, "schemes": found}
    record("vllm_folders", environments(given.parts) | result, 1)


if __name__ == "__main__":
    main()
