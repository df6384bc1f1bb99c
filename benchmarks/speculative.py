"""Speculative decoding on the CPU: equal to plain decoding, acceptance, cost of a step, speed-up.

    python benchmarks/speculative.py            # two cores, some twenty minutes
    python benchmarks/speculative.py --small    # the example model, few prompts: whether it works
    python benchmarks/speculative.py --eagle3 out/eagle3-26m    # with a draft model that was trained for it
    python benchmarks/speculative.py --medusa out/medusa-26m    # with heads that were trained for it

fiction-26m in float32, an `inductor-cpu` artifact with a paged cache; fiction-3m drafts for it where a model does; heads
draft in an artifact of their own, whose plain steps compute them too.

1. Greedy answers to 100 ragged prompts of 128 new tokens, 16 requests at a time in blocks of 16, in a pool that is too
   small for them, so that some give way in the middle: equal to those of plain decoding in a large pool, token for token.
2. One request at a time, plain and with drafts in turns: prompts of unseen books, and prompts that repeat a passage of
   them (the passage twice, and its beginning). Seconds of decoding alone; medians of the ratios with 95 % intervals.
"""

from __future__ import annotations

import argparse
import tempfile
import typing
from pathlib import Path
from typing import Any

import numpy as np
from common import OPEN_GATE, ROOT, record

import optc
from optc.compiler.model_folder.eagle3 import read_eagle3_config
from optc.runtime.generation.tokenizer import load_tokenizer
from optc.runtime.measuring.speculation import cut_prompts, measure_speculation
from optc.runtime.serving.engine import drafter_for, engine_for
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.request import Engine, Generate
from optc.runtime.sessions.load import load
from optc.runtime.sessions.paged import PagedSession
from optc.runtime.speculative.settings import Method, Speculation, speculation_of

SHARED = ROOT.parent / "shared"
TOGETHER = 16
LENGTHS = (8, 120)
"""Tokens of the shortest and the longest prompt of the first part."""


def answers(engine: Engine, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy answers, without stop tokens."""
    found: list[list[int]] = [[] for _ in prompts]
    for row, prompt in enumerate(prompts):
        engine.submit(Generate(id=str(row), prompt=prompt, max_new_tokens=count))
    while not engine.idle:
        for answer in engine.step():
            found[int(answer.id)] += answer.tokens
    return found


def session(folder: Path, threads: int, blocks: int | None = None) -> PagedSession:
    found = load(folder, threads=threads, num_blocks=blocks).session
    assert isinstance(found, PagedSession)
    return found


def equality(
    folder: Path, methods: dict[Method, Speculation], prompts: list[list[int]], count: int, threads: int
) -> dict[str, Any]:
    """How many answers of each method are those of plain decoding."""
    wanted = answers(engine_for(session(folder, threads), EngineOptions(max_running=TOGETHER)), prompts, count)
    longest = -(-(max(map(len, prompts)) + count) // 16)
    result: dict[str, Any] = {}
    for method, speculation in methods.items():
        own = session(folder, threads, blocks=longest * TOGETHER // 2)
        engine = engine_for(own, EngineOptions(max_running=TOGETHER, speculation=speculation), folder=folder)
        got = answers(engine, prompts, count)
        metrics = engine.metrics()
        assert metrics.speculation is not None
        result[method] = {
            "prompts": len(prompts),
            "equal": sum(a == b for a, b in zip(wanted, got, strict=True)),
            "preemptions": metrics.preemptions,
            "steps": metrics.steps,
            "acceptance_length": metrics.speculation.acceptance_length,
        }
        engine.close()
        print(method, result[method], flush=True)
    return result


def repeating(tokens: list[int], count: int, length: int) -> list[list[int]]:
    """Prompts of a passage twice, and its first third."""
    passages = cut_prompts(tokens, count, length * 3 // 7)
    return [[*passage, *passage, *passage[: len(passage) // 3]] for passage in passages]


def compiled(model: Path, output: Path, more: dict[str, Any]) -> None:
    """Write the artifact of a model with a paged cache."""
    optc.compile(model, target="inductor-cpu", kv_cache="paged", output=output, **more, **OPEN_GATE)


def exposed(heads: Path | None) -> dict[str, Any]:
    """The option by which a base gives what its draft model reads."""
    return {} if heads is None else {"expose_hidden": list(read_eagle3_config(heads).boundaries)}


def main() -> None:
    """Compile, compare, measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--keep", type=Path, default=None, help="folder where the artifacts stay, and are found again")
    parser.add_argument("--medusa", type=Path, default=None, help="folder of heads for the model")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--eagle3", type=Path, default=None, help="folder of a draft model for the method eagle3")
    given = parser.parse_args()
    name, prompts, count, samples = (
        ("fiction-26m", 100, 128, given.samples) if not given.small else ("fiction-3m", 6, 24, 2)
    )
    with tempfile.TemporaryDirectory() as temporary:
        place = given.keep or Path(temporary)
        models = SHARED / "models" if not given.small else ROOT / "examples"
        for model in {name, "fiction-3m"}:
            if not (place / model).exists():
                compiled(models / model, place / model, exposed(given.eagle3) if model == name else {})
        if given.eagle3 is not None and not (place / "eagle3").exists():
            compiled(given.eagle3, place / "eagle3", {"base": models / name})
        text = SHARED / "text" / "validation.txt" if not given.small else ROOT / "examples" / "book.txt"
        tokenizer = load_tokenizer(place / name)
        assert tokenizer is not None
        tokens = tokenizer.encode(text.read_text(encoding="utf-8")[:2_000_000])
        methods: dict[Method, Speculation] = {}
        drafts = {"draft": place / "fiction-3m", "eagle3": place / "eagle3"}
        for method in typing.get_args(Method):
            if method == "medusa" or (method == "eagle3" and given.eagle3 is None):
                continue
            found = speculation_of(method, drafts.get(method), None, adaptive=False)
            assert found is not None
            methods[method] = found
        rng = np.random.default_rng(0)
        ragged = [row[: int(rng.integers(*LENGTHS))] for row in cut_prompts(tokens, prompts, LENGTHS[1])]
        result: dict[str, Any] = {
            "model": name,
            "equality": equality(place / name, methods, ragged, count, given.threads),
        }
        folders = dict.fromkeys(methods, place / name)
        if given.medusa is not None:
            folders["medusa"] = place / f"{name}-medusa"
            heads = speculation_of("medusa", None, None, adaptive=False)
            assert heads is not None
            if not folders["medusa"].exists():
                compiled(models / name, folders["medusa"], {"medusa": given.medusa})
            result["equality"] |= equality(folders["medusa"], {"medusa": heads}, ragged, count, given.threads)
            methods["medusa"] = heads
        sessions = {folder: session(folder, given.threads) for folder in set(folders.values())}
        for label, batches in (
            ("unseen books", cut_prompts(tokens, samples + 1, 128)),
            ("repeating", repeating(tokens, samples + 1, 128)),
        ):
            result[label] = {}
            for method, speculation in methods.items():
                own = sessions[folders[method]]
                drafter = drafter_for(own, speculation, folders[method], running=1, threads=given.threads)
                figures = measure_speculation(
                    own, drafter, speculation, [[prompt] for prompt in batches], new_tokens=min(count, 96)
                )
                drafter.close()
                result[label][method] = figures.to_dict()
                print(label, method, figures.speedup, figures.figures.acceptance_length, flush=True)
    if given.small:
        print(result)
    else:
        record("speculative", result, given.threads)


if __name__ == "__main__":
    main()
