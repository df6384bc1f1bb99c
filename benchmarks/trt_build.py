"""Build the plan of a 1B-parameter shape with random weights: time and peak memory of the builder's process.

    python benchmarks/trt_build.py [--layers 16] [--hidden 2048] ... [--quant rtn|none] [--name trt_build]

The graph is made by optc's own passes and exporter, without the gate; the plan is built by the folder's build_plan.py
in a process of its own, whose time and peak resident memory are what is recorded.
"""

from __future__ import annotations

import argparse
import gc
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from common import record

from optc.compiler.capture import capture_model
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import PassContext
from optc.compiler.target.options import CompileOptions
from optc.compiler.target.target import ExportRequest
from optc.exporters.trt.builders import Choice
from optc.exporters.trt.export import build_plan
from optc.request import from_python
from optc.resolving import resolve
from optc.targets.trt import TARGET

GIB = 1 << 30
MODEL = {
    "layers": 16,
    "hidden": 2048,
    "heads": 32,
    "kv_heads": 8,
    "mlp": 8192,
    "vocab": 128256,
}  # Llama 3.2 1B


def program_of(shape: dict[str, int]) -> Program:
    """A Llama of a shape with random weights in float16, its embedding tied to the head."""
    config = transformers.LlamaConfig(
        hidden_size=shape["hidden"],
        intermediate_size=shape["mlp"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        vocab_size=shape["vocab"],
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        dtype=torch.float16,
    )
    torch.set_default_dtype(torch.float16)
    try:
        model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    return capture_model(model)


def write_folder(shape: dict[str, int], options: CompileOptions, folder: Path) -> dict[str, Any]:
    """Compile without the gate and without a plan; seconds and what was written."""
    begin = time.perf_counter()
    program = program_of(shape)
    parameters = sum({tensor.data_ptr(): tensor.numel() for _, tensor in program.weights()}.values())  # tied: once
    for step in TARGET.recipe("decoder", options):
        program = step.rewrite.run(program, PassContext()).program
    result = TARGET.export(program, ExportRequest(directory=folder, options=options.own))
    return {
        "parameters": parameters,
        "seconds": round(time.perf_counter() - begin, 1),
        "weight_bytes": result.weight_bytes,
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in MODEL.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--quant", default="rtn", help="rtn (4 bits) or none")
    parser.add_argument("--max-seq-len", type=int, default=2048)
    parser.add_argument("--name", default="trt_build", help="of the file in benchmarks/results")
    given = parser.parse_args()
    shape = {name: getattr(given, name) for name in MODEL}
    quant = None if given.quant == "none" else given.quant
    request = from_python(TARGET.name, dtype="fp16", quant=quant, max_seq_len=given.max_seq_len, trt_runtime="none")
    options = resolve(request).options
    folder = Path(tempfile.mkdtemp(prefix="trt-build-"))
    try:
        written = write_folder(shape, options, folder)
        gc.collect()
        built = build_plan(folder, Choice("fused", "rtx"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result = {
        "shape": shape,
        "quant": given.quant,
        "export": written,
        "plan": {
            "bytes": built["plan_bytes"],
            "seconds": built["build_seconds"],
            "peak_gib": round(built["build_peak_bytes"] / GIB, 2),
            "attention": built["attention_kernels"],
            "runtime": f"{built['runtime']} {built['runtime_version']}",
        },
    }
    record(given.name, result, torch.get_num_threads())


if __name__ == "__main__":
    main()
