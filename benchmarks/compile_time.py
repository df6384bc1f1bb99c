"""Compile time: the whole `optc compile` process, and how it grows with depth.

    python benchmarks/compile_time.py [--model FOLDER]

Runs `optc compile` as a user does, imports included, on a model folder (default: the example), and
on random Llamas of 4, 8, 16 and 32 layers; a straight line through the depths is fitted and the
largest excess of the measured times over proportional growth is reported.
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

from common import ROOT, random_llama, record

DEPTHS = (4, 8, 16, 32)


def compile_once(folder: Path, output: Path) -> dict[str, Any]:
    """Run `optc compile FOLDER --target onnx-cpu --quant rtn` in its own process; seconds and stages."""
    command = [sys.executable, "-m", "optc", "compile", str(folder), "--target", "onnx-cpu", "--quant", "rtn"]
    command += ["-o", str(output), "--force", "--json", "--max-kl", "1e9"]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begin
    if done.returncode:
        sys.exit(f"optc compile failed ({done.returncode}):\n{done.stderr}")
    manifest = json.loads((output / "manifest.json").read_text())
    return {"process_seconds": seconds, **manifest["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "fiction-3m")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        whole = [compile_once(arguments.model, work / "out") for _ in range(arguments.repeat)]
        depths = {}
        for layers in DEPTHS:
            folder = work / f"layers-{layers}"
            random_llama(folder, layers=layers, hidden=256, heads=4, kv_heads=2, mlp=704, vocab=8192)
            depths[layers] = min(
                (compile_once(folder, work / "deep") for _ in range(2)),
                key=lambda row: row["process_seconds"],
            )
    growth = {
        key: round((depths[DEPTHS[-1]][key] / depths[DEPTHS[0]][key]) / (DEPTHS[-1] / DEPTHS[0]), 3)
        for key in ("export", "passes", "capture", "process_seconds")
    }
    seconds = sorted(row["process_seconds"] for row in whole)
    result = {
        "model": arguments.model.name,
        "whole_process_seconds": {"median": seconds[len(seconds) // 2], "all": seconds},
        "stages": whole[0],
        "depths": depths,
        "growth_over_linear": growth,
    }
    record("compile_time", result, arguments.threads)


if __name__ == "__main__":
    main()
