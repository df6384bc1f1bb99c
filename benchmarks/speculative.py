"""Speculative decoding on the CPU: equal to plain decoding, acceptance, cost of a step, speed-up.

    python benchmarks/speculative.py            # two cores, some twenty minutes
    python benchmarks/speculative.py --small    # the example model, few prompts: whether it works
    python benchmarks/speculative.py --eagle3 out/eagle3-26m    # with a draft model that was trained for it
    python benchmarks/speculative.py --medusa out/medusa-26m    # with heads that were trained for it
    python benchmarks/speculative.py --eagle3 examples/fiction-26m-eagle3 --methods eagle3 --equality    # the first part alone

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


def artifacts(given: argparse.Namespace, place: Path, models: Path, name: str) -> dict[Method, Path]:
    """Compile what the methods need, where it is not there already: the artifact of the model, by method."""
    found: dict[Method, Path] = {method: place / name for method in given.methods if method != "medusa"}
    more = exposed(given.eagle3)
    for model, options in ((name, more), ("fiction-3m", more if name == "fiction-3m" else {})):
        if found and (model == name or "draft" in found) and not (place / model).exists():
            compiled(models / model, place / model, options)
    if "eagle3" in found and not (place / "eagle3").exists():
        compiled(given.eagle3, place / "eagle3", {"base": models / name})
    if "medusa" in given.methods:
        found["medusa"] = place / f"{name}-medusa"
        if not found["medusa"].exists():
            compiled(models / name, found["medusa"], {"medusa": given.medusa})
    return found


def speculations(folders: dict[Method, Path], place: Path) -> dict[Method, Speculation]:
    """How each method drafts: as many tokens as it does by default, always."""
    drafts = {"draft": place / "fiction-3m", "eagle3": place / "eagle3"}
    found: dict[Method, Speculation] = {}
    for method in folders:
        speculation = speculation_of(method, drafts.get(method), None, adaptive=False)
        assert speculation is not None
        found[method] = speculation
    return found


def speedups(
    folders: dict[Method, Path], methods: dict[Method, Speculation], batches: list[list[int]], count: int, threads: int
) -> dict[str, Any]:
    """Plain decoding and decoding with drafts in turns, one request at a time."""
    sessions = {folder: session(folder, threads) for folder in set(folders.values())}
    result: dict[str, Any] = {}
    for method, speculation in methods.items():
        own = sessions[folders[method]]
        drafter = drafter_for(own, speculation, folders[method], running=1, threads=threads)
        figures = measure_speculation(own, drafter, speculation, [[prompt] for prompt in batches], new_tokens=count)
        drafter.close()
        result[method] = figures.to_dict()
        print(method, figures.speedup, figures.figures.acceptance_length, flush=True)
    return result


def arguments() -> argparse.Namespace:
    """The command line, with what it leaves open."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--keep", type=Path, default=None, help="folder where the artifacts stay, and are found again")
    parser.add_argument("--medusa", type=Path, default=None, help="folder of heads for the model")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--eagle3", type=Path, default=None, help="folder of a draft model for the method eagle3")
    parser.add_argument("--methods", nargs="+", choices=typing.get_args(Method), default=None, help="default: all")
    parser.add_argument("--prompts", type=int, default=None, help="of the first part; default 100, with --small 6")
    parser.add_argument("--new-tokens", type=int, default=None, help="of each of them; default 128, with --small 24")
    parser.add_argument(
        "--text", type=Path, default=None, help="of the prompts; default: unseen books, with --small book.txt"
    )
    parser.add_argument("--equality", action="store_true", help="the first part alone; nothing is recorded")
    given = parser.parse_args()
    folders = {"medusa": given.medusa, "eagle3": given.eagle3}
    lacking = {method for method, folder in folders.items() if folder is None}
    given.methods = given.methods or [method for method in typing.get_args(Method) if method not in lacking]
    for method in lacking & set(given.methods):
        parser.error(f"--methods {method} needs --{method} FOLDER")
    given.prompts, given.new_tokens = (
        given.prompts or (6 if given.small else 100),
        given.new_tokens or (24 if given.small else 128),
    )
    return given


def main() -> None:
    """Compile, compare, measure and record."""
    given = arguments()
    name, samples = ("fiction-26m", given.samples) if not given.small else ("fiction-3m", 2)
    with tempfile.TemporaryDirectory() as temporary:
        place = given.keep or Path(temporary)
        models = SHARED / "models" if not given.small else ROOT / "examples"
        folders = artifacts(given, place, models, name)
        methods = speculations(folders, place)
        unseen = SHARED / "text" / "validation.txt" if not given.small else ROOT / "examples" / "book.txt"
        tokenizer = load_tokenizer(models / name)
        assert tokenizer is not None
        tokens = tokenizer.encode((given.text or unseen).read_text(encoding="utf-8")[:2_000_000])
        rng, count = np.random.default_rng(0), given.new_tokens
        ragged = [row[: int(rng.integers(*LENGTHS))] for row in cut_prompts(tokens, given.prompts, LENGTHS[1])]
        result: dict[str, Any] = {"model": name, "equality": {}}
        for folder in dict.fromkeys(folders.values()):
            own = {method: item for method, item in methods.items() if folders[method] == folder}
            result["equality"] |= equality(folder, own, ragged, count, given.threads)
        if not given.equality:
            for label, batches in (
                ("unseen books", cut_prompts(tokens, samples + 1, 128)),
                ("repeating", repeating(tokens, samples + 1, 128)),
            ):
                print(label, flush=True)
                result[label] = speedups(folders, methods, batches, min(count, 96), given.threads)
    if given.small or given.equality:
        print(result)
    else:
        record("speculative", result, given.threads)


if __name__ == "__main__":
    main()
