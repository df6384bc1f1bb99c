"""Serving on the CPU: 32 requests together through the engine against one at a time, and against onnxruntime-genai.

    python benchmarks/serve_cpu.py            # two quiet cores, some four minutes with two rounds
    python benchmarks/serve_cpu.py --small    # two layers, 16 requests, one round: whether it works

A random decoder of about 115 M parameters in int4, groups of 128, the head too: an `inductor-cpu` artifact with a paged
cache, compiled once, served by `open_engine`. Contenders, interleaved: the engine with all requests at once; the same
engine with one after another; onnxruntime-genai on the `onnx-cpu` artifact of the same quantization, one after another
(its generators keep one sequence each); and there in batches of 8, which start and end together. Every request has PROMPT
tokens and gets STEPS; figures are generated tokens per second of the whole run, prompts included.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import DECODER_115M, OPEN_GATE, interleave, random_llama, ratio, record

import optc
from optc.runtime.measuring.benchmark import median_rate
from optc.runtime.serving.engine import open_engine
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.interface import Engine
from optc.runtime.serving.request import Generate

PROMPT, STEPS, REQUESTS = 64, 64, 32
QUANT: dict[str, Any] = {"quant": "rtn", "bits": 4, "group_size": 128, "pass_option": "quantize-rtn.head=true"}


class Work:
    """Prompts that differ from call to call, so that none is found in the pool."""

    def __init__(self, vocabulary: int, count: int) -> None:
        self._rng, self._vocabulary, self._count = np.random.default_rng(0), vocabulary, count

    def prompts(self) -> list[list[int]]:
        return self._rng.integers(3, self._vocabulary, (self._count, PROMPT)).tolist()


def served(engine: Engine, work: Work, together: int, figures: list[dict[str, float]]) -> Callable[[], float]:
    """Tokens per second with so many requests in the engine at a time."""

    def once() -> float:
        prompts = work.prompts()
        steps, begin, tokens = engine.metrics().steps, time.perf_counter(), 0
        for start in range(0, len(prompts), together):
            for index, prompt in enumerate(prompts[start : start + together]):
                engine.submit(Generate(id=str(index), prompt=prompt, max_new_tokens=STEPS))
            while not engine.idle:
                tokens += sum(len(answer.tokens) for answer in engine.step())
        seconds = time.perf_counter() - begin
        assert tokens == len(prompts) * STEPS
        metrics = engine.metrics()
        figures.append(
            {
                "steps": metrics.steps - steps,
                "ms_per_step": seconds * 1e3 / (metrics.steps - steps),
                "host_us_per_step": metrics.host_us_per_step,
            }
        )
        return tokens / seconds

    return once


def genai(artifact: Path, work: Work, together: int) -> Callable[[], float]:
    """onnxruntime-genai: batches of so many that start together."""
    import onnxruntime_genai as og

    model = og.Model(str(artifact))

    def once() -> float:
        prompts, begin = work.prompts(), time.perf_counter()
        for start in range(0, len(prompts), together):
            batch = np.array(prompts[start : start + together], np.int32)
            parameters = og.GeneratorParams(model)
            length = PROMPT + STEPS
            options = {"max_length": length, "min_length": length, "do_sample": False}
            parameters.set_search_options(**options, **({"batch_size": len(batch)} if together > 1 else {}))
            generator = og.Generator(model, parameters)
            generator.append_tokens(batch if together > 1 else batch[0])
            for _ in range(STEPS):
                generator.generate_next_token()
        return len(prompts) * STEPS / (time.perf_counter() - begin)

    return once


def main() -> None:
    """Compile, measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--keep", type=Path, default=None, help="folder where the artifacts stay, and are found again")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    if given.small:
        given.rounds, given.requests = 1, min(given.requests, 16)
    shape: dict[str, int] = {**DECODER_115M, "layers": 2} if given.small else DECODER_115M
    with tempfile.TemporaryDirectory() as name:
        place = given.keep or Path(name)
        place.mkdir(parents=True, exist_ok=True)
        folder, paged, onnx = place / "model", place / "paged", place / "onnx"
        if not paged.exists():
            random_llama(folder, **shape)
            optc.compile(folder, target="inductor-cpu", kv_cache="paged", output=paged, **QUANT, **OPEN_GATE)
        if not onnx.exists():
            optc.compile(folder, target="onnx-cpu", output=onnx, **QUANT, **OPEN_GATE)
        engine = open_engine(paged, None, EngineOptions(threads=given.threads, max_running=given.requests))
        work = Work(shape["vocab"], given.requests)
        details: dict[str, list[dict[str, float]]] = {"together": [], "one-at-a-time": []}
        contenders = {
            "together": served(engine, work, given.requests, details["together"]),
            "one-at-a-time": served(engine, work, 1, details["one-at-a-time"]),
            "onnxruntime-genai": genai(onnx, work, 1),
            "onnxruntime-genai-batches-of-8": genai(onnx, work, 8),
        }
        figures = interleave(contenders, given.rounds)
        engine.close()
    result = {
        "model": shape,
        "requests": given.requests,
        "prompt": PROMPT,
        "new_tokens": STEPS,
        "rounds": given.rounds,
        "tokens_per_s": {key: median_rate(rows).to_dict() for key, rows in figures.items()},
        "ratio_of_together_to": {
            key: ratio(figures["together"], rows) for key, rows in figures.items() if key != "together"
        },
        "steps": {key: rows[1:] for key, rows in details.items()},
    }
    if given.small:
        print(result)
    else:
        record("serve_cpu", result, given.threads)


if __name__ == "__main__":
    main()
