"""Where the seconds of `optc quantize` go on a CPU: what `gpu_quantize.py` leaves out, capture, export and hashes.

    python benchmarks/quantize_parts.py                                # two wide layers, 4 bits by rtn
    python benchmarks/quantize_parts.py --layers 32 --hidden 256 --mlp 512    # many narrow ones: capture
    PYTHONPATH=OTHER/src python benchmarks/quantize_parts.py --name other      # another checkout, the same bytes

A random Llama in bf16, whose quantized folder is written with the gate open, layout by layout, by interleaved rounds. The
hash of what was written is recorded, so that two versions of optc can be held to the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import OPEN_GATE, random_llama, record

LAYOUTS = ("compressed-tensors", "gptq", "awq")


def source(folder: Path, arguments: argparse.Namespace) -> int:
    """Write the model in bf16; returns its parameter count."""
    from safetensors.torch import load_file, save_file

    count = random_llama(
        folder,
        layers=arguments.layers,
        hidden=arguments.hidden,
        heads=arguments.hidden // 128,
        kv_heads=max(1, arguments.hidden // 512),
        mlp=arguments.mlp,
        vocab=arguments.vocab,
    )
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return count


def quantize(folder: Path, output: Path, layout: str, bits: int) -> tuple[dict[str, float], str]:
    """(seconds by part, sha256 of the weights) of one run."""
    import optc

    with contextlib.redirect_stderr(io.StringIO()):
        result = optc.compile(
            folder, target="vllm", output=output, quant="rtn", bits=bits, layout=layout, force=True, **OPEN_GATE
        )
    written = next(file.sha256 for file in result.manifest.files if file.path == "model.safetensors")
    return dict(result.manifest.seconds), written


def main() -> None:
    """Measure, print, and write benchmarks/results/NAME.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--mlp", type=int, default=5632)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="quantize_parts", help="Of the JSON file.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    layouts = arguments.layouts.split(",")
    runs: dict[str, list[dict[str, float]]] = {layout: [] for layout in layouts}
    hashes: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        parameters = source(folder, arguments)
        for number in range(arguments.rounds + 1):  # the first warms up
            for layout in layouts:
                seconds, hashes[layout] = quantize(folder, Path(place) / "out", layout, arguments.bits)
                if number:
                    runs[layout].append(seconds)
                print(number, layout, seconds, hashes[layout][:12], flush=True)
    rows: list[dict[str, Any]] = [
        {
            "layout": layout,
            "sha256": hashes[layout],
            "seconds": {part: statistics.median(run[part] for run in found) for part in found[0]},
            "runs": found,
        }
        for layout, found in runs.items()
    ]
    shape = {name: getattr(arguments, name) for name in ("layers", "hidden", "mlp", "vocab", "bits")}
    record(arguments.name, {"shape": shape, "parameters": parameters, "rows": rows}, arguments.threads)


if __name__ == "__main__":
    main()
