"""Time of one quantized linear on the CPU: optc.linear_nbits against the unquantized linear and torch's packed int4.

    python benchmarks/cpu_linear.py            # a few minutes on two cores
    python benchmarks/cpu_linear.py --rounds 5 --rows 1 --dtypes bf16   # a quick look

Shapes are those of the decoder of cpu_decode.py. Every contender walks over copies of its weight that together
exceed the caches, as decoding does.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from common import interleave, ratio, record
from torch import Tensor

from optc.compiler.kernels.cpu.library import build_library
from optc.compiler.kernels.cpu.linear_nbits import LINEAR_NBITS
from optc.compiler.ops.packed.inductor_cpu import KEPT, pack_rows, pack_tiles

SHAPES = {
    "qo": (768, 768),
    "kv": (256, 768),
    "gate_up": (2048, 768),
    "down": (768, 2048),
    "head": (24576, 768),
}
"""Name -> N, K."""
GROUP = 128
FOOTPRINT = 96 << 20  # bytes of copies; several times the last cache of common machines
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def timed(calls: list[Callable[[], Tensor]], repeats: int) -> Callable[[], float]:
    """Microseconds per call, going round the copies."""

    def once() -> float:
        begin = time.perf_counter()
        for index in range(repeats):
            calls[index % len(calls)]()
        return (time.perf_counter() - begin) / repeats * 1e6

    return once


def copies_of(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """Enough copies of a weight to exceed the caches."""
    size = sum(tensor.nbytes for tensor in tensors)
    return [tuple(tensor.clone() for tensor in tensors) for _ in range(max(2, FOOTPRINT // size))]


def plain(x: Tensor, weight: Tensor) -> list[Callable[[], Tensor]]:
    """The unquantized linear."""
    return [functools.partial(torch.nn.functional.linear, x, w) for (w,) in copies_of((weight,))]


def packed(x: Tensor, codes: Tensor, scale: Tensor, bits: int, level: int) -> list[Callable[[], Tensor]]:
    """optc.linear_nbits, with activations rounded in groups of `level` columns."""
    rows, columns = codes.shape
    knobs = {"bits": bits, "group_size": GROUP, "activation_group": level, "K": columns, "N": rows}
    op = torch.ops.optc.linear_nbits.default
    made = copies_of((pack_tiles(codes, bits, GROUP), pack_rows(scale)))
    return [functools.partial(op, x, p, s, None, None, None, **knobs) for p, s in made]


def torch_int4(x: Tensor, codes: Tensor, scale: Tensor) -> list[Callable[[], Tensor]]:
    """aten._weight_int4pack_mm_for_cpu."""
    scales = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).contiguous().to(x.dtype)
    made = copies_of((torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1), scales))
    return [functools.partial(torch.ops.aten._weight_int4pack_mm_for_cpu, x, p, GROUP, s) for p, s in made]


def contenders(rows: int, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, list[Callable[[], Tensor]]]:
    """Calls by name, for activations [rows, K] and a weight [N, K]."""
    generator = torch.Generator().manual_seed(0)
    n, k = shape
    x = torch.randn((rows, k), generator=generator).to(dtype)
    scale = torch.rand((n, k // GROUP), generator=generator).mul(1e-2).to(torch.float16).to(dtype)
    found = {"unquantized": plain(x, torch.randn(shape, generator=generator).to(dtype))}
    for bits in (4, 8):
        codes = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
        found[f"optc-{bits}bit-rounded"] = packed(x, codes, scale, bits, GROUP)
        found[f"optc-{bits}bit-exact"] = packed(x, codes, scale, bits, KEPT)
        if bits == 4 and dtype is torch.bfloat16:
            found["torch-int4"] = torch_int4(x, codes, scale)
    return found


def measure(rows: int, shape: tuple[int, int], dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Microseconds of every contender, and the speed of each as a multiple of the unquantized linear."""
    from optc.runtime.measuring.benchmark import median_rate

    work = rows * shape[0] * shape[1]
    repeats = max(3, min(200, (1 << 30) // work))
    calls = {name: timed(made, repeats) for name, made in contenders(rows, shape, dtype).items()}
    figures = interleave(calls, rounds)
    base = figures["unquantized"]
    return {
        name: {"microseconds": median_rate(found).to_dict(), "speed_over_unquantized": ratio(base, found)}
        for name, found in figures.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 512])
    parser.add_argument("--dtypes", nargs="*", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.ops.load_library(str(build_library([LINEAR_NBITS])))
    table = {
        f"{dtype} {rows}x{name}": {"N": SHAPES[name][0], "K": SHAPES[name][1]}
        | measure(rows, SHAPES[name], DTYPES[dtype], arguments.rounds)
        for dtype in arguments.dtypes
        for rows in arguments.rows
        for name in arguments.shapes
    }
    record("cpu_linear", {"group_size": GROUP, "rounds": arguments.rounds, "linears": table}, arguments.threads)


if __name__ == "__main__":
    main()
