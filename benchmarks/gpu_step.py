"""Tile sizes of the kernels of a decode step, chosen by the time of the whole step: batch 1, a Llama of 8B shape.

    python benchmarks/gpu_step.py int4 int8 bf16        # tune the linears, then attention at two lengths of context
    python benchmarks/gpu_step.py int4 --layers 2 --few # a quick try

A kernel that is fastest alone need not be so in a step, where its loads overlap with the end of the kernel before.
The step is compiled once, with fewer layers; then one call after the other takes each of its candidates, the step is
captured again, checked against the logits of the first and timed, and the fastest is kept. Candidates are compiled
ahead in other processes. `gpu_linears.py tables benchmarks/results/gpu_step_int4.json` writes the linears' sizes into
the package's tables; those of attention stand in `choose_decode_tiles`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from common import OPEN_GATE, record
from gpu_decode import VARIANTS, random_model
from gpu_linears import LAYER, PLACES, WRONG, Place, Tiles, compile_ahead, shape_of
from gpu_timing import card, read_ceiling

import optc
from optc.compiler.kernels.cuda.attention import launch as attention
from optc.compiler.kernels.cuda.attention.call import Call
from optc.compiler.kernels.cuda.attention.launch import SplitTiles
from optc.compiler.kernels.cuda.linear import launch as linears
from optc.compiler.kernels.cuda.linear.configurations import Gemv, Shape, gemv_tiles
from optc.compiler.kernels.cuda.linear.launch import WORDS_PER_WARP
from optc.runtime.sessions.cuda import CudaSession

FORMATS = {"bf16": "", "int8": "int8", "int4": "int4"}
CONTEXTS = (128, 3900)
REPLAYS, ROUNDS = 10, 5
BETTER = 0.9985
"""Of the time so far: less is within what times vary by."""
MOST_UNROLLED = 8  # turns
ATTENTION = [
    SplitTiles(programs=1, registers=255, early=False),
    SplitTiles(programs=1, registers=255),
    *(
        SplitTiles(
            tile=tile, stages=stages, warps=8, programs=programs, registers=registers, fewest=fewest, early=False,
        )
        for tile, stages, programs, registers, fewest in (
            (64, 5, 1, 255, 2), (128, 3, 1, 255, 1), (64, 3, 2, 128, 1), (64, 5, 2, 128, 1), (128, 3, 2, 128, 1),
            # all tiles of a program on their way before the wait, as far as shared memory holds them
            (64, 5, 1, 255, 1), (64, 7, 1, 255, 1), (64, 9, 1, 255, 1), (128, 5, 1, 255, 1),
        )
    ),
]  # fmt: skip
"""What stands in `choose_decode_tiles` first."""


def is_step(call: Call) -> bool:
    """One token of one request, not a prompt."""
    return call.q.shape[0] == call.block_tables.shape[0] == 1


class Choice:
    """The tile sizes that the next capture takes: the package's, but for those that are set here."""

    def __init__(self) -> None:
        self.gemv: dict[Shape, Gemv] = {}
        self.decode: SplitTiles | None = None
        chosen = attention.choose_decode_tiles
        linears.gemv_tiles = lambda shape: self.gemv.get(shape) or gemv_tiles(shape)  # type: ignore[assignment]
        attention.choose_decode_tiles = lambda call: (is_step(call) and self.decode) or chosen(call)


def candidates(shape: Shape, few: bool) -> list[Gemv]:
    """Tile sizes whose registers are enough; what stands in the tables is the first."""
    found = [gemv_tiles(shape)]
    found += _integers(shape) if shape.format.startswith("int") else _floats(shape)
    found = list(dict.fromkeys(replace(tiles, early=found[0].early) for tiles in found))
    return found[:3] if few else found


def _floats(shape: Shape) -> list[Gemv]:
    """Whole rows where they are short, half a row and a quarter else."""
    widths = (shape.k,) if shape.k <= 4096 else (1024, 2048)
    found = []
    for block_n, steps, width, depth, warps in product((1, 2, 4, 8, 16), (1, 2, 4), widths, (1, 2), (1, 2, 4, 8)):
        rows = block_n * (2 if shape.gated else 1)
        tile = rows * width * 2 / (warps * 128)  # registers of a thread for a tile
        fits = tile >= 8 and tile * (depth + 1) <= 128 and 16 <= width * 2 / (warps * 32) <= 64
        few_steps = (steps == 1 or width >= shape.k) and (steps * block_n <= 16 or shape.gated)
        if fits and few_steps and 250 <= shape.n / (block_n * steps) <= 1100 and width * 2 >= 512 * warps:
            found.append(Gemv(block_n=block_n, steps=steps, width=width, depth=depth, warps=warps))
    return found


def _integers(shape: Shape) -> list[Gemv]:
    """A thread has one run of each row of a tile, and one or two tiles are in its registers. Numbers of programs that
    share the multiprocessors (132 of an H100 and an H200) evenly, or many."""
    row = shape.k * (1 if shape.format == "int4" else 2) // 8
    width = 1 << (row - 1).bit_length()
    found = []
    for block_n, depth, wide in product((4, 8, 16), (1, 2), (width, width // 2, width // 4, width // 8)):
        warps = wide // WORDS_PER_WARP
        registers = 4 * block_n * (2 if shape.gated else 1) * depth
        if not 1 <= warps <= 8 or not 32 <= registers <= 128 or (wide < row and width == row):
            continue
        for steps in range(1, 29) if wide >= row else (1,):
            programs = shape.n / (block_n * steps)
            even = programs / 132 if programs > 132 else 0
            fits = (even <= 4.2 and even % 1 > 0.85) or even % 1 < 0.02 or 5 < even < 8
            if programs % 1 or not even or not fits:
                continue
            tiles = Gemv(block_n=block_n, steps=steps, width=wide, depth=depth, warps=warps)
            found.append(tiles)
            if 1 < steps * -(-row // wide) <= MOST_UNROLLED:
                found.append(replace(tiles, unrolled=True))
    return found


class Step:
    """One session's decode step at one length of context."""

    def __init__(self, session: CudaSession, context: int) -> None:
        prompt = np.random.default_rng(1).integers(0, session.vocab_size, (1, context)).tolist()
        session.prefill(prompt)
        session._manager.reserve([(0, 64)])
        self.session, self.context = session, context

    def time(self) -> tuple[float, torch.Tensor]:
        """Microseconds of a step as it is captured now, and its logits."""
        self.session._steps.clear()
        step = self.session._step(1, self.context + 2)
        times = []
        for _ in range(ROUNDS + 1):
            step.load(self.session._states([1]))
            step.run()
            logits = step.logits.float().clone()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(REPLAYS):
                step.run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / REPLAYS)
        return statistics.median(times[1:]), logits


def best_of(step: Step, options: list[Any], put: Callable[[Any], None], first: torch.Tensor) -> list[dict[str, Any]]:
    """The options by time of the step, fastest first, and the fastest put in place."""
    from triton.runtime.errors import TritonError

    rows: list[dict[str, Any]] = []
    for option in options:
        put(option)
        try:
            microseconds, logits = step.time()
        except (RuntimeError, TritonError, optc.OptcError) as problem:
            print("FAILED", option, repr(problem)[:150], flush=True)
            continue
        error = float((logits - first).abs().max() / first.abs().max())
        if not error < 4 * WRONG:
            print("WRONG", option, error, flush=True)
            continue
        rows.append({"tiles": asdict(option), "microseconds": microseconds, "error": error})
    known = rows[0]
    rows.sort(key=lambda row: row["microseconds"])
    if rows[0]["microseconds"] > known["microseconds"] * BETTER:
        rows.remove(known)
        rows.insert(0, known)
    put(next(option for option in options if asdict(option) == rows[0]["tiles"]))
    return rows[:6]


def tune(variant: str, given: argparse.Namespace, ceiling: float, choice: Choice) -> dict[str, Any]:
    """Compile the step, then tune it."""
    network = random_model(given.layers)
    compiled = optc.optimize(network, dtype="bf16", **OPEN_GATE, **VARIANTS[variant])
    session, form = compiled.session, FORMATS[variant]
    step = Step(session, CONTEXTS[0])
    before, first = step.time()
    print(variant, f"before: {before:.1f} us", flush=True)
    found: dict[str, dict[str, Any]] = {}
    for name in given.order:
        shape = shape_of(PLACES[name], form, 1)

        def put(tiles: Gemv, shape: Shape = shape) -> None:
            choice.gemv[shape] = tiles

        options = candidates(shape, given.few)
        if name in found:  # the second time: what was near
            near = [Gemv(**row["tiles"]) for row in found[name]["rows"][:3]]
            options = [replace(tiles, early=early) for tiles in near for early in (tiles.early, not tiles.early)]
        rows = best_of(step, options, put, first)
        found[name] = {"place": name, **asdict(shape), "rows": rows}
        print(name, [(round(row["microseconds"], 1), tuple(row["tiles"].values())) for row in rows], flush=True)
    lengths = {}
    for context in CONTEXTS if "attention" in given.parts else ():
        step = Step(session, context) if context != CONTEXTS[0] else step
        choice.decode = None
        _, first = step.time()

        def put_decode(tiles: SplitTiles) -> None:
            choice.decode = tiles

        rows = best_of(step, ATTENTION[:3] if given.few else ATTENTION, put_decode, first)
        lengths[context] = rows
        print(context, [(round(row["microseconds"], 1), tuple(row["tiles"].values())) for row in rows], flush=True)
    result = {"before": before, "linears": list(found.values()), "attention": lengths, "layers": given.layers}
    compiled.close()
    return result | {"read_ceiling_gb_per_s": ceiling / 1e9}


def main() -> None:
    """Tune what was asked for, print and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", choices=list(FORMATS))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--few", action="store_true", help="three candidates of each")
    parser.add_argument("--parts", nargs="*", default=["linears", "attention"], choices=["linears", "attention"])
    given = parser.parse_args()
    given.order = ("gate_up", "down", "qkv", "o") * 2 if "linears" in given.parts else ()
    jobs: list[tuple[Place, str, int, Tiles | None]] = [
        (replace(PLACES[name], folded=True), FORMATS[variant], 1, tiles)
        for variant in given.variants
        for name in (LAYER if given.order else ())
        for tiles in candidates(shape_of(PLACES[name], FORMATS[variant], 1), given.few)
    ]
    if jobs:
        compile_ahead(jobs)
    ceiling = read_ceiling()
    for variant in given.variants:
        choice = Choice()
        result = {"card": card(), **tune(variant, given, ceiling, choice)}
        name = f"gpu_step_{variant}"
        record(name, result, 2)


if __name__ == "__main__":
    main()
