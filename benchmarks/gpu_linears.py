"""Linears of a Llama of 8B shape on a CUDA GPU: sweeps tile sizes, and compares with bf16 cuBLAS and the read ceiling.

    python benchmarks/gpu_linears.py gemv --formats int4 bf16      # one token: tile sizes, each checked and timed
    python benchmarks/gpu_linears.py products --formats int4       # 2 to 128 tokens, against cuBLAS in bf16
    python benchmarks/gpu_linears.py chain                         # 32 layers of four linears and the head, one graph
    python benchmarks/gpu_linears.py tables RESULTS...             # best tile sizes -> configurations.json

Weights are random. Every time is that of a CUDA graph whose launches walk over copies of the weight that exceed the
caches, so that each weight comes from memory; launches overlap as in a decode step. The read ceiling is that of a
kernel that only reads, the best of a few block sizes, in the same process.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import commit
from torch import Tensor

from optc.compiler.kernels.cuda.linear.configurations import (
    FILE_NAME,
    Gemv,
    Product,
    Shape,
    product_tiles,
    tables,
)

Tiles = Gemv | Product
FOOTPRINT = 400 << 20  # bytes of weights that launches of one graph read before the first comes again
GROUP = 128
REPEATS = 7
FORMATS = {"bf16": "", "fp8": "fp8", "int8": "int8", "int4": "int4"}
BYTES = {"": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5 + 2 / GROUP}
"""Of a weight, with scales per group for int4 only."""


@dataclass(frozen=True)
class Place:
    """A linear of a decoder layer: n results of k columns, with what is fused into it.

    Attributes:
        folded: the weight of its norm is part of its own, as fuse-norm leaves it.
    """

    n: int
    k: int
    gated: bool = False
    norm: str = ""
    residual: bool = False
    folded: bool = False


PLACES = {
    "qkv": Place(6144, 4096, norm="rms"),
    "o": Place(4096, 4096, residual=True),
    "gate_up": Place(14336, 4096, gated=True, norm="rms"),
    "down": Place(4096, 14336, residual=True),
    "head": Place(128256, 4096, norm="rms"),
}
LAYER = ("qkv", "o", "gate_up", "down")


def shape_of(place: Place, form: str, tokens: int) -> Shape:
    return Shape(format=form, n=place.n, k=place.k, gated=place.gated, m=tokens)


def weight_bytes(place: Place, form: str) -> float:
    return place.n * (2 if place.gated else 1) * place.k * BYTES[form]


# Candidates: block_n, steps, width as a share of the row (or columns, or words), depth, warps.
FLOAT_GEMV = [
    (2, 2, 4096, 1, 4), (1, 4, 4096, 1, 4), (2, 1, 4096, 1, 4), (1, 2, 4096, 1, 4), (4, 1, 4096, 1, 8), (1, 1, 4096, 1, 4),
    (2, 2, 4096, 1, 8), (1, 4, 4096, 2, 4), (4, 2, 4096, 1, 8), (2, 1, 2048, 2, 4), (4, 1, 1024, 2, 4), (1, 1, 2048, 2, 4),
    (2, 2, 2048, 2, 4), (8, 1, 1024, 1, 4), (1, 1, 2048, 3, 4), (2, 1, 2048, 3, 4), (4, 1, 1024, 3, 4), (1, 2, 2048, 3, 4),
]  # fmt: skip
INTEGER_GEMV = [
    (8, 1, 512, 1, 4), (8, 2, 512, 1, 4), (8, 3, 512, 1, 4), (8, 4, 512, 1, 4), (16, 1, 512, 1, 4), (4, 1, 512, 1, 4),
    (4, 2, 512, 1, 4), (4, 2, 512, 2, 4), (4, 4, 512, 1, 4), (4, 4, 512, 2, 4), (4, 7, 512, 1, 4), (2, 8, 512, 3, 4),
    (8, 1, 256, 1, 2), (8, 1, 256, 2, 2), (16, 1, 256, 1, 2), (4, 1, 256, 2, 2), (8, 1, 1024, 1, 8), (4, 2, 1024, 1, 8),
    (4, 1, 1024, 1, 4), (2, 4, 1024, 2, 4), (4, 4, 2048, 1, 8), (4, 1, 2048, 1, 8), (4, 2, 2048, 1, 8), (4, 1, 512, 3, 4),
]  # fmt: skip
PRODUCT = [
    (block_n, split, stages, warps, lines)
    for block_n, warps in ((64, 4), (128, 4), (128, 8))
    for split, stages in ((1, 4), (2, 4), (4, 4), (8, 4))
    for lines in (0, 2, 4, 8)
]


def gemv_candidates(shape: Shape) -> list[Gemv]:
    """Tile sizes to try: those whose registers are enough, and that leave enough programs."""
    integer = shape.format.startswith("int")
    words = shape.k * (1 if shape.format == "int4" else 2) // 8
    row = words if integer else shape.k
    found = []
    for values in INTEGER_GEMV if integer else FLOAT_GEMV:
        block_n, steps, width, depth, warps = values
        tiles = Gemv(block_n=block_n, steps=steps, width=width, depth=depth, warps=warps)
        rows = tiles.block_n * (2 if shape.gated else 1)
        element = 4 if integer else int(BYTES[shape.format])
        held = rows * min(tiles.width, 2 * row) * (tiles.depth + 1) * element / (tiles.warps * 128)
        tile_count = tiles.steps * -(-row // tiles.width)
        if (
            held <= 160
            and (integer or tile_count <= 32)
            and (tiles.steps == 1 or tiles.width >= row)
            and tiles.width < 2 * row
        ):
            found.append(tiles)
    return found


def product_candidates(shape: Shape) -> list[Product]:
    """Tile sizes to try: those that give each processor one to eight programs."""
    block_k = 128 if shape.format in ("", "fp8") else 0
    found = []
    for block_n, split, stages, warps, lines in PRODUCT:
        programs = -(-shape.n // block_n) * split * (2 if shape.gated else 1) * -(-shape.m // 64)
        if 96 <= programs <= 2400 and not (split > 1 and programs > 1600):
            found.append(
                Product(block_n=block_n, split=split, stages=stages, warps=warps, block_k=block_k, lines=lines)
            )
    return found


JOINED = [(64, 4, 4, 0), (128, 4, 8, 0), (128, 4, 8, 128), (128, 3, 8, 128), (256, 3, 8, 0)]
"""block_n, stages, warps, registers"""


def joined_candidates(shape: Shape) -> list[Product]:
    """Of products of both digits at once."""
    found = []
    for block_n, stages, warps, registers in JOINED if shape.format.startswith("int") else ():
        if shape.m <= 16 and (registers or block_n > 128):
            continue
        rows = block_n // 2 if shape.gated and block_n == 256 else block_n
        for split in (1, 2, 4, 8):
            if 96 <= -(-shape.n // rows) * split <= 600:
                sizes = {"block_n": rows, "split": split, "stages": stages, "warps": warps, "registers": registers}
                found.append(Product(**sizes, lines=2, joined=True))
    return found


KINDS: dict[str, Callable[[Shape], list[Any]]] = {
    "tiles": product_candidates,
    "joined": joined_candidates,
}


def make_linear(place: Place, form: str, tokens: int, *, seed: int = 0) -> Any:
    """A random linear on the GPU, in bf16, as `launch` takes it; codes are bits, and scales make unit results."""
    from optc.compiler.kernels.cuda.linear.launch import Linear

    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device="cuda", dtype=torch.bfloat16, generator=generator)

    rows, scale, group = place.n * (2 if place.gated else 1), None, 0
    if form == "int4":
        weight = torch.randint(0, 256, (rows, place.k // 2), device="cuda", dtype=torch.uint8, generator=generator)
        scale, group = (normal(rows, place.k // GROUP).abs() + 0.5) / (5 * place.k**0.5), GROUP
    elif form == "int8":
        weight = torch.randint(-127, 128, (rows, place.k), device="cuda", dtype=torch.int8, generator=generator)
        scale = (normal(rows, 1).abs() + 0.5) / (80 * place.k**0.5)
    else:
        weight = normal(rows, place.k) * place.k**-0.5
        if form == "fp8":
            weight, scale = (weight * 16).to(torch.float8_e4m3fn), (normal(rows, 1).abs() + 0.5) / 16
    gain = normal(place.k).abs() + 0.5 if place.norm and not place.folded else None
    residual = normal(tokens, place.n) if place.residual else None
    activation = "silu" if place.gated else ""
    return Linear(
        normal(tokens, place.k),
        weight,
        scale,
        None,
        gain,
        None,
        None,
        residual,
        place.norm,
        1e-5,
        activation,
        place.gated,
        form,
        group,
    )


def copies(linear: Any) -> list[Any]:
    """The linear with as many copies of its weight as exceed the caches."""
    count = max(2, -(-FOOTPRINT // linear.weight.nbytes))
    scale = linear.scale
    return [
        linear._replace(weight=linear.weight.clone(), scale=None if scale is None else scale.clone())
        for _ in range(count)
    ]


def graph_of(calls: Iterable[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """A graph of calls that have been made before."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def microseconds(calls: list[Callable[[], Any]]) -> float:
    """Of one call, the median over replays of a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    stream.synchronize()
    graph = graph_of(calls)
    return replay_microseconds(graph) / len(calls)


def replay_microseconds(graph: torch.cuda.CUDAGraph) -> float:
    """The median over replays."""
    graph.replay()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def read_ceiling() -> float:
    """Bytes per second of the fastest of a few kernels that only read."""
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def read(source, sink, BLOCK: tl.constexpr, STEPS: tl.constexpr):  # type: ignore[no-untyped-def]
        start = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS)
        total = tl.zeros([BLOCK], tl.int32)
        for step in tl.static_range(STEPS):
            total ^= tl.load(source + start + step * BLOCK + tl.arange(0, BLOCK), eviction_policy="evict_first")
        tl.store(sink + tl.arange(0, BLOCK), total, mask=total == 0x12345678)

    source = torch.randint(-(2**31), 2**31 - 1, (1 << 30,), dtype=torch.int32, device="cuda")
    sink = torch.zeros(8192, dtype=torch.int32, device="cuda")
    best = 0.0
    for block, steps, warps in ((1024, 8, 4), (2048, 4, 4), (2048, 8, 8), (4096, 4, 8), (1024, 16, 4), (4096, 2, 8)):
        grid = (source.numel() // (block * steps),)
        time_us = microseconds([functools.partial(read[grid], source, sink, block, steps, num_warps=warps)])
        best = max(best, source.nbytes / time_us * 1e6)
    print(torch.cuda.get_device_name(), f"reads {best / 1e12:.3f} TB/s", flush=True)
    return best


def compile_ahead(jobs: list[tuple[Place, str, int, Tiles | None]]) -> None:
    """Fill Triton's cache from several processes, before this one starts CUDA. A job that fails is reported later."""
    with multiprocessing.get_context("fork").Pool(14) as pool:
        for _ in pool.imap_unordered(_compile, jobs):
            pass


def _compile(job: tuple[Place, str, int, Tiles | None]) -> None:
    place, form, tokens, tiles = job
    from triton.runtime.errors import TritonError

    few = replace(place, n=1024)  # the kernel depends on K only
    with contextlib.suppress(RuntimeError, TritonError):
        run(make_linear(few, form, tokens), tiles)


def run(linear: Any, tiles: Tiles | None) -> Tensor:
    from optc.compiler.kernels.cuda.linear import launch

    if tiles is None:
        return launch.by_cublas(linear)
    return launch.gemv(linear, tiles) if isinstance(tiles, Gemv) else launch.product(linear, tiles)


def distance(linear: Any, y: Tensor) -> float:
    """Largest difference from the reference in float32, as a share of its largest output."""
    from optc.compiler.ops.library import reference

    wide = [item.float() if isinstance(item, Tensor) and item.dtype == torch.bfloat16 else item for item in linear[:8]]
    names = ("norm", "eps", "activation", "gated", "format", "group_size", "inputs")
    expected = reference("fused_linear")(*wide, **dict(zip(names, linear[8:], strict=True)))
    return float((y.float() - expected).abs().max() / expected.abs().max())


KEPT = 4
"""Candidates in the record."""
WRONG = 1.2e-2
"""As a share of the largest result: three roundings to bfloat16."""


def sweep(name: str, form: str, tokens: int, candidates: list[Tiles | None], ceiling: float) -> dict[str, Any]:
    """Every candidate checked, and timed where it is right; fastest first."""
    from triton.runtime.errors import TritonError

    place = PLACES[name]
    linear = make_linear(place, form, tokens)
    walk = copies(linear)
    rows: list[dict[str, Any]] = []
    for tiles in candidates:
        try:
            error = distance(linear, run(linear, tiles))
            if not error < WRONG:
                print("WRONG", name, form, tokens, tiles, error, flush=True)
                continue
            time_us = microseconds([functools.partial(run, item, tiles) for item in walk])
        except (RuntimeError, TritonError) as problem:  # out of registers or shared memory
            print("FAILED", name, form, tokens, tiles, repr(problem)[:150], flush=True)
            continue
        rows.append({"tiles": None if tiles is None else asdict(tiles), "microseconds": time_us, "error": error})
    rows.sort(key=lambda row: row["microseconds"])
    shape, size = asdict(shape_of(place, form, tokens)), weight_bytes(place, form)
    record = {
        "place": name,
        **shape,
        "share_of_ceiling": size / rows[0]["microseconds"] * 1e6 / ceiling,
        "rows": rows[:KEPT],
    }
    shown = [(round(row["microseconds"], 2), tuple((row["tiles"] or {}).values())) for row in rows[:6]]
    print(
        f"{name:8} {form or 'bf16':5} m={tokens:3} {record['share_of_ceiling']:.1%} err {rows[0]['error']:.0e}",
        shown,
        flush=True,
    )
    return record


def cublas(name: str, tokens: int) -> float:
    """Microseconds of the plain bf16 product."""
    place = PLACES[name]
    linear = make_linear(replace(place, norm="", residual=False), "", tokens)
    linear = linear._replace(activation="", gated=False)
    return microseconds([functools.partial(torch.nn.functional.linear, item.x, item.weight) for item in copies(linear)])


def sweep_gemv(forms: list[str], places: list[str]) -> Iterator[dict[str, Any]]:
    """One token."""
    jobs = [
        (name, form, tiles)
        for form in forms
        for name in places
        for tiles in gemv_candidates(shape_of(PLACES[name], form, 1))
    ]
    compile_ahead(list(dict.fromkeys((replace(PLACES[name], n=0), form, 1, tiles) for name, form, tiles in jobs)))
    ceiling = read_ceiling()
    for form in forms:
        for name in places:
            if not (name == "head" and form == "int4"):
                candidates: list[Tiles | None] = [tiles for *key, tiles in jobs if key == [name, form]]
                yield sweep(name, form, 1, candidates, ceiling)


def sweep_products(
    forms: list[str], places: list[str], counts: list[int], kinds: list[str]
) -> Iterator[dict[str, Any]]:
    """Some tokens: the tensor cores, the GEMV where there are few, dequantizing for cuBLAS; bf16 cuBLAS beside.

    kinds: names of `KINDS`, which are tried beside the tile sizes of the tables.
    """
    jobs: list[tuple[str, str, int, Tiles | None]] = []
    for form in forms:
        for name in places:
            for tokens in counts:
                shape = shape_of(PLACES[name], form, tokens)
                few = [tiles for other, tiles in tables().gemv if other == replace(shape, m=1)] if tokens <= 4 else []
                candidates = [tiles for kind in kinds for tiles in KINDS[kind](shape)]
                every = dict.fromkeys((*candidates, product_tiles(shape), *few, None))
                jobs += [(name, form, tokens, tiles) for tiles in every]
    compile_ahead(list(dict.fromkeys((replace(PLACES[name], n=0), form, m, tiles) for name, form, m, tiles in jobs)))
    ceiling = read_ceiling()
    for form in forms:
        for tokens in counts:
            layer = {"ours": 0.0, "cublas_bf16": 0.0}
            for name in places:
                tried = [tiles for *key, tiles in jobs if key == [name, form, tokens]]
                record = sweep(name, form, tokens, tried, ceiling) | {"cublas_bf16": cublas(name, tokens)}
                layer["ours"] += record["rows"][0]["microseconds"]
                layer["cublas_bf16"] += record["cublas_bf16"]
                yield record
            speed = layer["cublas_bf16"] / layer["ours"]
            times = ", ".join(f"{name} {value:.1f} us" for name, value in layer.items())
            print(f"ALL {form or 'bf16'} m={tokens}: {times}: {speed:.2f}x", flush=True)


def chain(forms: list[str], layers: int) -> Iterator[dict[str, Any]]:
    """A decoder's linears for one token, each reading what the one before wrote; the head in bf16."""
    ceiling = read_ceiling()
    for form in forms:
        weights = [{name: make_linear(PLACES[name], form, 1, seed=layer) for name in LAYER} for layer in range(layers)]
        head = make_linear(PLACES["head"], "", 1)
        graph = graph_of_chain(weights, head)
        size = sum(weight_bytes(PLACES[name], form) for name in LAYER) * layers + weight_bytes(PLACES["head"], "")
        time_us = replay_microseconds(graph)
        share = size / time_us * 1e6 / ceiling
        print(f"CHAIN {form or 'bf16'}: {time_us:.0f} us, {1e6 / time_us:.1f} steps/s, {share:.1%}", flush=True)
        yield {"format": form, "layers": layers, "microseconds": time_us, "share_of_ceiling": share}
        del weights, head, graph
        torch.cuda.empty_cache()


def graph_of_chain(weights: list[dict[str, Any]], head: Any) -> torch.cuda.CUDAGraph:
    from optc.compiler.kernels.cuda.linear import launch
    from optc.compiler.kernels.cuda.linear.configurations import gemv_tiles

    def apply(linear: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return launch.gemv(linear._replace(x=x, residual=residual), gemv_tiles(linear.shape))

    def step() -> None:
        x = head.x
        for layer in weights:
            attended = apply(layer["qkv"], x)[:, : PLACES["o"].k]
            x = apply(layer["o"], attended.contiguous(), x)
            x = apply(layer["down"], apply(layer["gate_up"], x), x)
        apply(head, x)

    step()
    return graph_of([step])


def write_tables(results: list[Path]) -> Path:
    """Best tile sizes of some results, over those that stand in the package's file for the same shapes."""
    import optc.compiler.kernels.cuda.linear as package

    path = Path(str(package.__file__)).with_name(FILE_NAME)
    content = json.loads(path.read_text())
    names = ("format", "n", "k", "gated", "m")
    kinds = ("gemv", "product")
    known = {
        kind: {tuple(record[name] for name in names): record["tiles"] for record in content[kind]} for kind in kinds
    }
    for result in results:
        for record in json.loads(result.read_text())["linears"]:
            for kind, mark in (("gemv", "width"), ("product", "block_k")):
                best = next((row["tiles"] for row in record["rows"] if row["tiles"] and mark in row["tiles"]), None)
                key = tuple(record[name] for name in names)
                if best is not None and (kind != "gemv" or record["m"] == 1):
                    known[kind][key] = best
    lines = {
        kind: [
            json.dumps(dict(zip(names, key, strict=True)) | {"tiles": tiles}) for key, tiles in sorted(table.items())
        ]
        for kind, table in known.items()
    }
    parts = [f' "limits": {json.dumps(content["limits"])}']
    parts += [f' "{kind}": [\n  ' + ",\n  ".join(rows) + "\n ]" for kind, rows in lines.items()]
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("gemv", "products", "chain", "tables"))
    parser.add_argument("results", nargs="*", type=Path, help="JSON of sweeps, for `tables`")
    parser.add_argument("--formats", nargs="*", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--places", nargs="*", choices=list(PLACES), default=list(PLACES))
    parser.add_argument("--tokens", nargs="*", type=int, default=[16, 64])
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS), help="of products")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu_linears.json"))
    arguments = parser.parse_args()
    forms = [FORMATS[name] for name in arguments.formats]
    begin = time.perf_counter()
    if arguments.what == "tables":
        print(write_tables(arguments.results))
        return
    if arguments.what == "gemv":
        records = sweep_gemv(forms, arguments.places)
    elif arguments.what == "products":
        records = sweep_products(
            forms, [name for name in arguments.places if name != "head"], arguments.tokens, arguments.kinds
        )
    else:
        records = chain(forms, arguments.layers)
    linears = []
    for record in records:  # each as soon as it is there: a run that is cut keeps what it has
        linears.append(record)
        full = {"commit": commit(), "card": torch.cuda.get_device_name(), "torch": torch.__version__}
        arguments.output.write_text(json.dumps(full | {"linears": linears}, indent=1) + "\n")
    print(f"{arguments.what}: {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
