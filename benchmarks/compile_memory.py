"""Memory of compiling a large model: the whole `optc compile` process under a limit.

    python benchmarks/compile_memory.py [--shape 1b|8b] [--quant rtn|gptq] [--limit-gib N]

Writes a random Llama in bfloat16 (tensor by tensor, never held), compiles it for onnx-cpu to 4 bits in a process whose
anonymous memory is limited (RLIMIT_DATA), and watches that process: resident memory at its peak (VmHWM), and the peaks of
its anonymous part (RssAnon) and of mapped files (RssFile), sampled. Needs free disk of about three times the source.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from common import LLAMA_1B, LLAMA_8B, TOKENIZER, llama_sizes, open_gate_flags, record

GIB = 1 << 30
SHAPES: dict[str, dict[str, Any]] = {
    "1b": llama_sizes(layers=22, hidden=2048, heads=32, kv_heads=4, mlp=5632, vocab=32000),
    "1b-tied": {**LLAMA_1B, "tie_word_embeddings": True},
    "8b": LLAMA_8B,
}
LIMITS = {"1b": None, "1b-tied": None, "8b": 14.0}
"""GiB of anonymous memory; None is 1.3 times the source."""
_SHARD = 4 << 30


def random_folder(folder: Path, shape: dict[str, Any]) -> int:
    """Write a random Llama in bfloat16, a tensor at a time; bytes of the weight files."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from optc.compiler.ir.lazy_weights import computed
    from optc.compiler.ir.saved.safetensors_file import write_safetensors

    config = LlamaConfig(
        **{"tie_word_embeddings": False, **shape},
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict(keep_vars=True)
    torch.manual_seed(0)
    shards: list[dict[str, Any]] = [{}]
    seen: set[int] = set()
    for name, tensor in state.items():
        if id(tensor) in seen:
            continue  # tied
        seen.add(id(tensor))
        if sum(item.nbytes for item in shards[-1].values()) > _SHARD:
            shards.append({})
        ones, size = name.endswith("norm.weight"), tuple(tensor.shape)

        def make(size: tuple[int, ...] = size, ones: bool = ones) -> torch.Tensor:
            made = torch.empty(size, dtype=torch.bfloat16)
            return made.fill_(1) if ones else made.normal_(0, 0.02)

        shards[-1][name] = computed(make, size, torch.bfloat16)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TOKENIZER / name).read_bytes())
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = ["model.safetensors"] if len(names) == 1 else names
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, {"format": "pt"})
    if len(names) > 1:
        placed = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return sum((folder / name).stat().st_size for name in names)


class Watch(threading.Thread):
    """Peaks of what /proc says about the memory of a process."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self.path = Path(f"/proc/{process}/status")
        self.peaks: dict[str, int] = {}
        self.timeline: list[tuple[float, float]] = []

    def run(self) -> None:
        begin, told = time.monotonic(), -60.0
        while True:
            try:
                lines = self.path.read_text().splitlines()
            except (FileNotFoundError, ProcessLookupError):
                return
            for line in lines:
                key, _, value = line.partition(":")
                if key in ("VmHWM", "RssAnon", "RssFile", "RssShmem", "VmData"):
                    self.peaks[key] = max(self.peaks.get(key, 0), int(value.split()[0]) * 1024)
                    passed = time.monotonic() - begin
                    if key == "RssAnon" and passed - told > 60:
                        told = passed
                        self.timeline.append((round(passed, 1), round(int(value.split()[0]) / (1 << 20), 2)))
            time.sleep(0.02)


def compile_limited(folder: Path, output: Path, quant: str, limit: int) -> dict[str, Any]:
    """Run `optc compile` in a process of limited anonymous memory; what it took."""
    command = [sys.executable, "-m", "optc", "compile", str(folder), "--target", "onnx-cpu", "--quant", quant]
    command += ["-o", str(output), "--force", "--json", *open_gate_flags()]
    if quant != "rtn":
        command += ["--calibration-samples", "16", "--calibration-seq-len", "512"]
    begin = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=None,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )
    watch = Watch(process.pid)
    watch.start()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - begin
    if status:
        sys.exit(f"optc compile failed (status {status}), after {watch.peaks}")
    print(json.dumps({"seconds": seconds, **watch.peaks}), file=sys.stderr)
    manifest = json.loads((output / "manifest.json").read_text())
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_bytes": watch.peaks["VmHWM"],
        "ru_maxrss_bytes": usage.ru_maxrss * 1024,
        "peak_rss_anon_bytes": watch.peaks["RssAnon"],
        "peak_rss_file_bytes": watch.peaks["RssFile"],
        "peak_data_bytes": watch.peaks["VmData"],
        "anonymous_gib_over_time": watch.timeline,
        "stages": manifest["seconds"],
        "passes": [{key: row[key] for key in ("name", "seconds", "drift", "notes")} for row in manifest["passes"]],
        "artifact_bytes": sum(path.stat().st_size for path in output.rglob("*") if path.is_file()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--quant", default="rtn")
    parser.add_argument("--layers", type=int, help="another depth, to estimate by; nothing is recorded")
    parser.add_argument("--limit-gib", type=float)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the model and the artifact are made, and left")
    arguments = parser.parse_args()
    shape = dict(SHAPES[arguments.shape])
    if arguments.layers:
        shape["num_hidden_layers"] = arguments.layers
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    with tempfile.TemporaryDirectory(dir=arguments.folder and arguments.folder.parent) as name:
        work = arguments.folder or Path(name)
        model = work / "model"
        if not model.is_dir():
            random_folder(model, shape)
        source = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        chosen = arguments.limit_gib or LIMITS[arguments.shape]
        limit = int(chosen * GIB if chosen else 1.3 * source)
        result = compile_limited(model, work / "out", arguments.quant, limit)
    result = {
        "shape": shape,
        "quant": arguments.quant,
        "source_bytes": source,
        "limit_of_anonymous_bytes": limit,
        "peak_rss_over_source": round(result["peak_rss_bytes"] / source, 3),
        **result,
    }
    if arguments.layers:
        print(json.dumps(result, indent=2))
    else:
        record(f"compile_memory_{arguments.shape}_{arguments.quant}", result, arguments.threads)


if __name__ == "__main__":
    main()
