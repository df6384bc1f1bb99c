"""Speculative decoding on the CPU: equal to plain decoding, acceptance, cost of a step, speed-up.

    python benchmarks/speculative.py            # two cores, some forty minutes
    python benchmarks/speculative.py --small    # the example model, few prompts: whether it works
    python benchmarks/speculative.py --medusa out/medusa-26m    # with heads that were trained for it
    python benchmarks/speculative.py --methods draft --parts equality    # some rows, which take the place of those of before
    python benchmarks/speculative.py --quant int4 --methods eagle3 --draft-tokens 2 --parts "unseen books"
    python benchmarks/speculative.py --methods eagle3 --parts equality --from 40 --to 60    # some of the prompts

fiction-26m in float32, or with --quant int4 both models in groups of 128 codes, 64 beside fiction-3m, whose width is 192
(rows "eagle3 int4" and so on, with --draft-tokens "eagle3 int4 2"): an `inductor-cpu` artifact with a paged cache; fiction-3m and the draft model of
examples/fiction-26m-eagle3 draft for it, each in one artifact with it; heads draft in an artifact of their own, whose plain
steps compute them too, in chains (`medusa`) and in trees of 16 guesses (`medusa-tree`).

1. Greedy answers to 100 ragged prompts of 128 new tokens, 16 requests at a time in blocks of 16, in a pool that is too
   small for them, so that some give way in the middle: equal to those of plain decoding in a large pool, token for token.
2. One request at a time, plain and with drafts in turns: prompts of unseen books, and prompts that repeat a passage of
   them (the passage twice, and its beginning). Seconds of decoding alone; medians of the ratios with 95 % intervals.
3. `switch`, the same with the engine's own choice of a depth, 0 included, for 1024 new tokens of four prompts: what it gains
   where drafts pay, and what it costs where they do not.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import typing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from common import OPEN_GATE, RESULTS, ROOT, commit, record

import optc
from optc.runtime.generation.tokenizer import load_tokenizer
from optc.runtime.measuring.benchmark import environment
from optc.runtime.measuring.speculation import cut_prompts, measure_speculation
from optc.runtime.serving.engine import drafter_for, engine_for
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.interface import Engine
from optc.runtime.serving.request import Generate
from optc.runtime.sessions.load import load
from optc.runtime.sessions.paged import PagedSession
from optc.runtime.speculative.settings import Method, Speculation, speculation_of

INT4 = {"quant": "rtn", "bits": 4, "group_size": 128}
SHARED = ROOT.parent / "shared"
TOGETHER = 16
TREE = 16
PARTS = ("equality", "unseen books", "repeating", "switch")
METHODS = (*typing.get_args(Method), "medusa-tree")
LONG, LONG_SAMPLES = 1024, 4
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
    folder: Path, methods: dict[str, Speculation], prompts: list[list[int]], count: int, threads: int
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


def together(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """A row of the first part over the prompts of both."""
    counts = {name: one[name] + other[name] for name in ("prompts", "equal", "preemptions", "steps")}
    lengths = [(row["acceptance_length"], row["prompts"]) for row in (one, other)]
    mean = sum(length * prompts for length, prompts in lengths) / counts["prompts"]
    return {**counts, "acceptance_length": mean}


def repeating(tokens: list[int], count: int, length: int) -> list[list[int]]:
    """Prompts of a passage twice, and its first third."""
    passages = cut_prompts(tokens, count, length * 3 // 7)
    return [[*passage, *passage, *passage[: len(passage) // 3]] for passage in passages]


def compiled(model: Path, output: Path, more: dict[str, Any]) -> None:
    """Write the artifact of a model with a paged cache."""
    optc.compile(model, target="inductor-cpu", kv_cache="paged", output=output, **more, **OPEN_GATE)


def artifacts(given: argparse.Namespace, place: Path, models: Path, name: str) -> dict[str, Path]:
    """Compile what the methods need, where it is not there already: the artifact of the model, by method."""
    options: dict[str, dict[str, Any]] = {
        name: {},
        f"{name}-draft": {"speculative": "draft", "draft": models / "fiction-3m"},
        f"{name}-eagle3": {"speculative": "eagle3", "draft": given.eagle3},
        f"{name}-medusa": {"medusa": given.medusa},
        f"{name}-medusa-tree": {"medusa": given.medusa, "speculative_tree": TREE},
    }
    found = {}
    for method in given.methods:
        own = f"{name}-{method}" if f"{name}-{method}" in options else name
        found[method] = place / (own if given.quant == "none" else f"{own}-{given.quant}")
        if not found[method].exists():
            int4 = INT4 | ({"group_size": 64} if method == "draft" else {})
            compiled(models / name, found[method], options[own] | (int4 if given.quant == "int4" else {}))
    return found


def speculations(methods: list[str], draft_tokens: int | None, *, adaptive: bool = False) -> dict[str, Speculation]:
    """How each method drafts: so many tokens, or as many as it does by default, always; or where it pays."""
    found: dict[str, Speculation] = {}
    for name in methods:
        tree = name == "medusa-tree"
        method = typing.cast(Method, "medusa" if tree else name)
        speculation = speculation_of(method, None, draft_tokens, "tree" if tree else None, adaptive=adaptive)
        assert speculation is not None
        found[name] = speculation
    return found


def speedups(
    folders: dict[str, Path], methods: dict[str, Speculation], batches: list[list[int]], count: int, threads: int
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
    parser.add_argument("--quant", choices=("none", "int4"), default="none", help="of both models")
    parser.add_argument("--draft-tokens", type=int, default=None, help="default: each method's own")
    parser.add_argument("--from", dest="begin", type=int, default=0, help="first prompt of the first part")
    parser.add_argument("--to", dest="end", type=int, default=None, help="its last prompt, and one more")
    parser.add_argument("--eagle3", type=Path, default=None, help="folder of a draft model; default: that of examples/")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=None, help="default: all that there is a model for"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--prompts", type=int, default=None, help="of the first part; default 100, with --small 6")
    parser.add_argument("--new-tokens", type=int, default=None, help="of each of them; default 128, with --small 24")
    parser.add_argument(
        "--text", type=Path, default=None, help="of the prompts; default: unseen books, with --small book.txt"
    )
    given = parser.parse_args()
    given.eagle3 = given.eagle3 or ROOT / "examples" / f"fiction-{'3m' if given.small else '26m'}-eagle3"
    heads = {"medusa", "medusa-tree"}
    given.methods = given.methods or [name for name in METHODS if given.medusa or name not in heads]
    if given.medusa is None and heads & set(given.methods):
        parser.error("--methods medusa needs --medusa FOLDER")
    given.prompts, given.new_tokens = (
        given.prompts or (6 if given.small else 100),
        given.new_tokens or (24 if given.small else 128),
    )
    return given


def row_name(method: str, given: argparse.Namespace) -> str:
    """The method, and what is not as by default."""
    quant = [] if given.quant == "none" else [given.quant]
    tokens = [] if given.draft_tokens is None else [str(given.draft_tokens)]
    return " ".join([method, *quant, *tokens])


def kept(name: str) -> dict[str, dict[str, Any]]:
    """The rows of before by part and method, each with the commit, date and processor that it was measured with."""
    path = RESULTS / f"{name}.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    made = {"commit": old.get("commit"), "date": old.get("date"), "cpu": old.get("environment", {}).get("cpu")}
    return {part: {method: {**made, **row} for method, row in old.get(part, {}).items()} for part in PARTS}


def measured(given: argparse.Namespace, place: Path) -> dict[str, dict[str, Any]]:
    """The rows of the parts and methods that were asked for."""
    name = "fiction-26m" if not given.small else "fiction-3m"
    models = SHARED / "models" if not given.small else ROOT / "examples"
    folders = artifacts(given, place, models, name)
    methods = speculations(given.methods, given.draft_tokens)
    text = given.text or (SHARED / "text" / "validation.txt" if not given.small else ROOT / "examples" / "book.txt")
    tokenizer = load_tokenizer(models / name)
    assert tokenizer is not None
    tokens = tokenizer.encode(text.read_text(encoding="utf-8")[:2_000_000])
    samples, count = given.samples if not given.small else 2, given.new_tokens
    result: dict[str, dict[str, Any]] = {}
    for part in given.parts:
        print(part, flush=True)
        result[part] = {}
        if part == "equality":
            rng = np.random.default_rng(0)
            ragged = [row[: int(rng.integers(*LENGTHS))] for row in cut_prompts(tokens, given.prompts, LENGTHS[1])]
            ragged = ragged[given.begin : given.end]
            for folder in dict.fromkeys(folders.values()):
                own = {method: item for method, item in methods.items() if folders[method] == folder}
                result[part] |= equality(folder, own, ragged, count, given.threads)
        elif part == "switch":
            own = speculations(given.methods, given.draft_tokens, adaptive=True)
            prompts = cut_prompts(tokens, LONG_SAMPLES + 1, 128)
            result[part] |= speedups(folders, own, prompts, LONG, given.threads)
        else:
            cut = cut_prompts if part == "unseen books" else repeating
            result[part] |= speedups(folders, methods, cut(tokens, samples + 1, 128), min(count, 96), given.threads)
    return result


def main() -> None:
    """Compile, compare, measure and record."""
    given = arguments()
    with tempfile.TemporaryDirectory() as temporary:
        result = measured(given, given.keep or Path(temporary))
    if given.small:
        print(result)
        return
    rows, now = kept("speculative"), datetime.now(UTC).isoformat(timespec="seconds")
    made = {"commit": commit(), "date": now, "cpu": environment(given.threads)["cpu"]}
    for part, found in result.items():
        for method, row in found.items():
            heads = {"heads": given.medusa.name} if method.startswith("medusa") else {}
            own = row_name(method, given)
            before = rows[part].get(own)
            if part == "equality" and given.begin and before is not None:
                row = together(before, row)
            rows[part][own] = {**made, **heads, **row}
    record("speculative", {"model": "fiction-26m", **rows}, given.threads)


if __name__ == "__main__":
    main()
