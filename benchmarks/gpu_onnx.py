"""fiction-26m by --target onnx-cuda on a GPU: agreement with transformers, and decode speed beside other engines.

    python benchmarks/gpu_onnx.py --model ../shared/models/fiction-26m --text ../shared/text/validation.txt
    python benchmarks/gpu_onnx.py --model examples/fiction-3m --text examples/book.txt --rounds 3

Needs onnxruntime-gpu; where onnxruntime-genai-cuda is installed, it runs our folders and those of its own builder too.
Contenders, each greedy, batch 1, PROMPT tokens and STEPS steps, in turns in one process:

    fp16, bf16, int4     optc compile --target onnx-cuda, by optc's session; int4 in fp16 with the head in 8 bits
    ... in genai         the same folders by onnxruntime-genai
    builder-...          onnxruntime_genai.models.builder -e cuda, by onnxruntime-genai: its best artifact
    cuda-...             optc compile --target inductor-cuda, by optc's session

Greedy tokens are compared with transformers' own in the same type: of 20 prompts of the text, how many of 64 tokens are
equal, and at the first that is not how far apart the two candidates are there.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import interleave, ratio, record
from edge_peers import PROMPT, STEPS, Timed, in_genai, stored

import optc
from optc.compiler.artifact.folder import verify
from optc.runtime.measuring.benchmark import median_rate

PROMPTS, NEW = 20, 64
OURS: dict[str, list[str]] = {
    "fp16": ["--target", "onnx-cuda", "--dtype", "fp16"],
    "bf16": ["--target", "onnx-cuda", "--dtype", "bf16"],
    "int4": ["--target", "onnx-cuda", "--dtype", "fp16", "--quant", "rtn"],
    "cuda-bf16": ["--target", "inductor-cuda", "--dtype", "bf16"],
    "cuda-int4": ["--target", "inductor-cuda", "--dtype", "bf16", "--quant", "rtn"],
}
BUILDER = {"builder-fp16": "fp16", "builder-int4": "int4"}


def make(model: Path, name: str, folder: Path) -> dict[str, Any]:
    """Write an artifact with the command that a user would type; its seconds, or what stopped it."""
    if name in BUILDER:
        command = ["onnxruntime_genai.models.builder", "-m", model, "-o", folder, "-p", BUILDER[name], "-e", "cuda"]
        command += ["-c", folder.parent / "cache"]
    else:
        command = ["optc", "compile", model, *OURS[name], "--device", "auto", "-o", folder]
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", *map(str, command)], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begin
    if done.returncode:
        return {"failed": done.stderr[-600:], "seconds": seconds}
    size = stored(folder)["bytes"] if (folder / "model.onnx").exists() else verify(folder).weight_bytes
    return {"seconds": seconds, "bytes": size}


def agreement(model: Path, folder: Path, text: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Greedy tokens of an artifact beside those of transformers, both on the GPU in one type; perplexity of both."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to("cuda").eval()
    ours = optc.load(folder)
    tokens = ours.encode(text.read_text(encoding="utf-8")[:200_000])
    prompts = [tokens[index * 500 : index * 500 + 16 + 5 * index] for index in range(PROMPTS)]
    equal, margins = [], []
    for prompt in prompts:
        row = list(ours.generate(prompt, max_new_tokens=NEW, ignore_eos=True).tokens)
        with torch.no_grad():
            ids = reference.generate(
                torch.tensor([prompt], device="cuda"), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
            )
        theirs = ids[0, len(prompt) :].tolist()
        same = next((i for i, (a, b) in enumerate(zip(row, theirs, strict=True)) if a != b), NEW)
        equal.append(same)
        if same < NEW:
            with torch.no_grad():
                logits = reference(torch.tensor([prompt + theirs[:same]], device="cuda")).logits[0, -1].float()
            margins.append(float(logits[theirs[same]] - logits[row[same]]))
    ours.close()
    found = optc.evaluate(folder, text=str(text), windows=16)
    return {
        "equal_of_64": equal,
        "margins_where_they_part": margins,
        "perplexity": found["perplexity"],
        "source_perplexity": found.get("reference_perplexity"),
    }


def in_optc(folder: Path, prompt: list[int]) -> Timed:
    """What `optc run` does."""
    model = optc.load(folder)

    def run(length: int, steps: int) -> tuple[float, float]:
        found = model.generate(prompt[:length], max_new_tokens=steps + 1, ignore_eos=True)
        return found.ttft_ms / 1e3, (found.tpot_ms or 0.0) * steps / 1e3

    return run


def speeds(folders: dict[str, Path], text: Path, rounds: int) -> dict[str, Any]:
    """Tokens per second of each contender, and the ratios of ours to the builder's and to inductor-cuda, round by round."""
    first = next(folder for name, folder in folders.items() if name in OURS)
    model = optc.load(first)
    prompt = model.encode(text.read_text(encoding="utf-8")[:20_000])[:PROMPT]
    vocab = model.manifest.contract.model.vocab_size
    model.close()
    timed: dict[str, Timed] = {name: in_optc(folder, prompt) for name, folder in folders.items() if name in OURS}
    refused: dict[str, str] = {}
    if importlib.util.find_spec("onnxruntime_genai") is not None:
        for name, folder in folders.items():
            if name.startswith("cuda-"):
                continue
            try:
                timed[f"{name} in genai"] = in_genai(folder, vocab)
            except RuntimeError as error:  # its own exceptions are RuntimeErrors
                refused[f"{name} in genai"] = str(error)[:500]
    once: Callable[[Timed], float] = lambda run: STEPS / run(PROMPT, STEPS)[1]  # noqa: E731
    figures = interleave({name: functools.partial(once, run) for name, run in timed.items()}, rounds, warmup=2)
    result: dict[str, Any] = {"tokens_per_s": {name: median_rate(rows).to_dict() for name, rows in figures.items()}}
    pairs = [
        ("fp16 in genai", "builder-fp16 in genai"),
        ("int4 in genai", "builder-int4 in genai"),
        ("fp16", "builder-fp16 in genai"),
        ("int4", "builder-int4 in genai"),
        ("cuda-bf16", "bf16"),
        ("cuda-int4", "int4"),
    ]
    result["ratios"] = {f"{a} / {b}": ratio(figures[a], figures[b]) for a, b in pairs if a in figures and b in figures}
    return result | ({"refused": refused} if refused else {})


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    import onnxruntime as ort

    result: dict[str, Any] = {
        "model": given.model.name, "onnxruntime": ort.__version__, "card": torch.cuda.get_device_name(),
        "prompt": PROMPT, "steps": STEPS,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        names = [*OURS, *(BUILDER if importlib.util.find_spec("onnxruntime_genai") is not None else [])]
        folders = {name: Path(place) / name for name in names}
        with ThreadPoolExecutor(len(names)) as pool:  # a process each
            made = [pool.submit(make, given.model, name, folder) for name, folder in folders.items()]
            result["made"] = {name: item.result() for name, item in zip(names, made, strict=True)}
        print({name: row.get("failed") for name, row in result["made"].items()}, flush=True)
        folders = {name: folder for name, folder in folders.items() if "failed" not in result["made"][name]}
        types = {"fp16": torch.float16, "bf16": torch.bfloat16, "int4": torch.float16}
        result["agreement"] = {
            name: agreement(given.model, folders[name], given.text, dtype)
            for name, dtype in types.items()
            if name in folders
        }
        result |= speeds(folders, given.text, given.rounds)
        print(result["agreement"], flush=True)
        record(f"gpu_onnx_{given.model.name}".replace("-", "_"), result, 1)


if __name__ == "__main__":
    main()
