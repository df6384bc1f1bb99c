"""Compile some kernels for compute capability 9.0, which needs no GPU, and print what became of them as JSON.

A process of its own: in the tests' own, triton interprets.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton.backends.nvidia as nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from optc.compiler.kernels.cuda.fused_norm import MOST_COLUMNS
from optc.compiler.kernels.cuda.linear.configurations import Gemv, Product, gemv_tiles, product_tiles, tables
from optc.compiler.kernels.cuda.linear.gemv_integer import gemv_integer
from optc.compiler.kernels.cuda.linear.launch import WORDS_PER_WARP
from optc.compiler.kernels.cuda.linear.product_integer import product_integer
from optc.compiler.kernels.cuda.lookup.rows import packed_embedding
from optc.compiler.kernels.cuda.norm.launch import warps_for
from optc.compiler.kernels.cuda.norm.rows import fused_norm
from optc.compiler.kernels.cuda.packed_embedding import MOST_COLUMNS as LOOKUP_COLUMNS

TOOLS = Path(nvidia.__file__).parent / "bin"


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int) -> dict[str, Any]:
    """Registers, bytes of stack (spilled registers among them) and names of instructions."""
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*") or signature[name] == "i32"
    }
    values = {(names.index(name),): constants.get(name) for name in names if name not in types}
    source = ASTSource(kernel, signature, values, aligned)
    made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(made.asm["cubin"])
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True)
        listing = subprocess.run([TOOLS / "nvdisasm", "-c", path], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    assert found is not None
    instructions = sorted(set(re.findall(r"\b(IDP|IGMMA|IMMA|ACQBULK|PREEXIT)\b", listing.stdout)))
    return {"registers": int(found[1]), "stack": int(found[2]), "instructions": instructions}


def main() -> None:
    shape = next(item for item, _ in tables().gemv if item.format == "int4" and item.gated)
    common = {"K": shape.k, "BITS": 4, "GROUP": 128, "ACTIVATION": "silu", "GATED": True, "NATIVE": True, "PDL": True}
    pointers = {"w": "*i32", "scale": "*bf16", "y": "*bf16", "N": "i32"}
    gemv: Gemv = gemv_tiles(shape).fitted(shape.k // 8, WORDS_PER_WARP)
    one = compiled(
        gemv_integer,
        pointers | {"x": "*bf16", "norm_weight": "*bf16", "eps": "fp32"},
        common
        | {"M": 1, "NORM": "rms", "STATISTICS": 1024, "BLOCK_N": gemv.block_n, "STEPS": gemv.steps}
        | {"WORDS": gemv.width, "DEPTH": gemv.depth, "UNROLLED": gemv.unrolled, "WHOLE": True, "WARPS": gemv.warps},
        gemv.warps,
    )
    long: Gemv = Gemv(block_n=8, steps=1, width=512, depth=1, warps=4)
    unrolled = compiled(
        gemv_integer,
        pointers | {"x": "*bf16", "residual": "*bf16", "eps": "fp32"},
        {"M": 1, "K": 14336, "BITS": 4, "GROUP": 128, "NORM": "", "ACTIVATION": "", "GATED": False, "NATIVE": True}
        | {"PDL": True, "STATISTICS": 1024, "BLOCK_N": long.block_n, "STEPS": long.steps, "WORDS": long.width}
        | {"DEPTH": long.depth, "UNROLLED": True, "WHOLE": True, "WARPS": long.warps},
        long.warps,
    )
    product: Product = product_tiles(shape)
    few = compiled(
        product_integer,
        pointers | {"w": "*i8", "digits": "*i8", "unit": "*fp32", "partial": "*fp32", "arrivals": "*i32", "M": "i32"},
        common
        | {"BLOCK_M": 16, "BLOCK_N": product.block_n, "SPLIT": product.split, "STAGES": product.stages}
        | {"LINES": product.lines, "JOINED": product.joined},
        product.warps,
    )
    rows = dict.fromkeys(("x", "residual", "y"), "*bf16") | {"weight": "*fp32", "row_stride": "i32"}
    norm = compiled(
        fused_norm,
        rows | {"eps": "fp32", "factor": "fp32"},
        {"K": MOST_COLUMNS, "BLOCK": MOST_COLUMNS, "NORM": "layer", "PDL": True},
        warps_for(MOST_COLUMNS),
    )
    table = {"tokens": "*i64", "y": "*bf16", "scale": "*bf16", "rows": "i32", "token_stride": "i32"}
    sizes = {"K": LOOKUP_COLUMNS, "BLOCK": LOOKUP_COLUMNS, "PDL": True}
    warps = warps_for(LOOKUP_COLUMNS)
    bytes_ = compiled(packed_embedding, table | {"weight": "*i8"}, sizes | {"GROUP": LOOKUP_COLUMNS, "BITS": 8}, warps)
    types = table | {"weight": "*u8", "zero": "*i8"}
    nibbles = compiled(packed_embedding, types, sizes | {"GROUP": 128, "BITS": 4}, warps)
    linears = {"gemv": one, "unrolled": unrolled, "product": few}
    print(json.dumps({**linears, "norm": norm, "bytes": bytes_, "nibbles": nibbles}))


if __name__ == "__main__":
    main()
