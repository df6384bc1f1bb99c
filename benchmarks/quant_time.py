"""Wall time and peak memory of whole `optc compile` processes, imports included, per quantization method.

    python benchmarks/quant_time.py --model ../shared/models/fiction-26m --calibration ../shared/text/calibration.txt
    python benchmarks/quant_time.py ... --methods gptq --depths 4,8,16   # cost per layer, random weights

Calibration is 128 x 512 tokens, groups of 128, target onnx-cpu. With depths, random Llamas of that many layers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import random_llama, record


def compiled(model: Path, method: str, calibration: Path, output: Path, samples: int) -> dict[str, Any]:
    """Run one compile; its seconds, peak resident bytes and what its passes took."""
    command = [sys.executable, "-m", "optc", "compile", str(model), "--target", "onnx-cpu", "--quant", method]
    command += ["--group-size", "128", "--calibration", str(calibration), "--calibration-samples", str(samples)]
    command += ["--max-kl", "100", "-o", str(output), "--json"]
    begin = time.perf_counter()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        out.seek(0)
        result = json.loads(out.read())
    if status:
        raise SystemExit(f"{' '.join(command)}: status {status}")
    passes = {row["name"]: row["seconds"] for row in result["passes"]}
    summary = result["quantization"]
    return {
        "method": method,
        "seconds": seconds,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "passes": passes,
        "bits_per_parameter": summary["bits_per_parameter"],
        "ratio_to_ideal": summary["ratio_to_ideal"],
    }


def main() -> None:
    """Measure, print, write benchmarks/results/quant_time.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--methods", default="rtn,gptq,awq")
    parser.add_argument("--depths", default="", help="Layers of random models, for the cost per layer of GPTQ.")
    arguments = parser.parse_args()
    rows, depths = [], []
    with tempfile.TemporaryDirectory() as folder:
        for method in arguments.methods.split(","):
            rows.append(compiled(arguments.model, method, arguments.calibration, Path(folder) / method, 128))
            print(json.dumps(rows[-1]), flush=True)
        for layers in [int(item) for item in arguments.depths.split(",") if item]:
            model = Path(folder) / f"depth-{layers}"
            random_llama(model, layers=layers, hidden=512, heads=8, kv_heads=4, mlp=1408, vocab=8192)
            row = compiled(model, "gptq", arguments.calibration, Path(folder) / f"out-{layers}", 16)
            depths.append({"layers": layers, "gptq_seconds_per_layer": row["passes"]["quantize-gptq"] / layers, **row})
            print(json.dumps(depths[-1]), flush=True)
    record("quant_time", {"model": arguments.model.name, "methods": rows, "depths": depths}, 2)


if __name__ == "__main__":
    main()
