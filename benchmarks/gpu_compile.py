"""Seconds of `optc quantize DIR --quant gptq --device cuda`, by part, for a Llama of 8B shape with random weights.

    python benchmarks/gpu_compile.py                    # writes the model (16 GB of bf16), quantizes it, records JSON
    python benchmarks/gpu_compile.py --model DIR        # keep the model there, or use the one that is
    python benchmarks/gpu_compile.py --small            # a quick try on the CPU

The command runs in a process of its own. Random weights say nothing about quality, so the gate's limits are open;
what the gate costs is in the figures. Compare `parts` with `gpu_quantize.py`, which times the passes alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import LLAMA_8B, LLAMA_SMALL, open_gate_flags, record

SHAPES = {
    "8b": {**LLAMA_8B, "max_position_embeddings": 8192},
    "small": {**LLAMA_SMALL, "max_position_embeddings": 512},
}
SHARD = 4 << 30  # bytes of a weight file


def write_model(folder: Path, shape: str) -> None:
    """A model folder of random bf16 weights, and token ids to calibrate with; weights are made shard by shard."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=False, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        shapes = {name: tuple(item.shape) for name, item in LlamaForCausalLM(config).state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    where: dict[str, str] = {}
    held = 0

    def flush() -> None:
        name = f"model-{len(shards):05d}.safetensors"
        save_file(shards[-1], folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(shards[-1], name))
        shards[-1] = {}

    for name, size in shapes.items():
        made = torch.empty(size, dtype=torch.bfloat16, device=device)
        made = made.fill_(1.0) if made.dim() == 1 else made.normal_(0, 0.02, generator=generator)
        shards[-1][name] = made.cpu()
        held += made.nbytes
        if held >= SHARD:
            flush()
            shards.append({})
            held = 0
    flush()
    total = sum(2 * torch.Size(size).numel() for size in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)


def write_tokens(path: Path, vocabulary: int, samples: int, length: int) -> None:
    """Random token ids, one sequence a line."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, vocabulary, (samples, length), generator=generator).tolist()
    path.write_text("".join(json.dumps({"tokens": row}) + "\n" for row in rows))


def quantize(model: Path, output: Path, tokens: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Run the command; its seconds with the start of Python, and the manifest that it wrote."""
    profiled = [] if given.profile is None else ["-m", "cProfile", "-o", str(given.profile)]
    command = [sys.executable, *profiled, "-m", "optc", "quantize", str(model), "--quant", given.method]
    command += ["--device", given.device]
    command += ["--dtype", "bf16", "--group-size", "32" if given.small else "128", "--calibration", str(tokens)]
    command += ["--calibration-samples", str(given.samples), "--calibration-seq-len", str(given.seq_len)]
    command += [*open_gate_flags(), "--force", "--json", "-o", str(output)]
    places = {str(model): "DIR", str(output): "OUT", str(tokens): "TOKENS.jsonl"}
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - begin
    manifest = json.loads((output / "manifest.json").read_text())
    parts = manifest["seconds"]
    return {
        "command": " ".join(["optc", *(places.get(item, item) for item in command[len(profiled) + 3 :])]),
        "seconds": seconds,
        "loading": {"capture": parts["capture"], "move": parts["move"]},
        "passes": {row["name"]: row["seconds"] for row in manifest["passes"]},
        "parts": parts,
        "opened": manifest["opened"].get("seconds"),
        "without_loading": parts["total"] - parts["capture"] - parts["move"],
    }


def main() -> None:
    """Make the model, quantize it, print and record the breakdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--model", type=Path, help="folder of the random model; made where it is missing")
    parser.add_argument("--device", default=None, help="default: cuda, or cpu with --small")
    parser.add_argument("--samples", type=int, default=None)
    parser.add_argument("--seq-len", type=int, default=None)
    parser.add_argument("--small", action="store_true")
    parser.add_argument(
        "--profile", type=Path, default=None, help="file for what cProfile finds; nothing is recorded then"
    )
    given = parser.parse_args()
    shape = "small" if given.small else "8b"
    given.device = given.device or ("cpu" if given.small else "cuda")
    given.samples = given.samples or (4 if given.small else 128)
    given.seq_len = given.seq_len or (64 if given.small else 2048)
    with tempfile.TemporaryDirectory() as name:
        model = given.model or Path(name) / "model"
        if not (model / "config.json").is_file():
            write_model(model, shape)
        tokens = Path(name) / "tokens.jsonl"
        write_tokens(tokens, SHAPES[shape]["vocab_size"], given.samples, given.seq_len)
        result = quantize(model, Path(name) / "out", tokens, given)
    if given.profile is not None:
        print(json.dumps(result, indent=2))
        return
    card = torch.cuda.get_device_name() if given.device.startswith("cuda") else "cpu"
    record(
        f"gpu_compile_{given.method}_{shape}",
        {
            "shape": shape,
            "method": given.method,
            "card": card,
            "torch": torch.__version__,
            "tokens": given.samples * given.seq_len,
            **result,
        },
        2,
    )


if __name__ == "__main__":
    main()
