"""A `basic` TensorRT artifact on a GPU with TensorRT 8.6: agreement with ONNX Runtime in fp32, perplexity, latency.

Here, without a GPU (needs optc with its extra onnx):

    python benchmarks/gpu_tensorrt86.py reference --fp32 out/trt-fp32 --text book.txt -o carry/reference.json
    python benchmarks/gpu_tensorrt86.py graphs --reference carry/reference.json --artifacts fp16=carry/fp16 int8=carry/int8

On the GPU's machine (TensorRT in a Python of its own; torch and transformers in this one, for the baseline):

    python benchmarks/gpu_tensorrt86.py all --trt-python ./trt-python --reference carry/reference.json \
        --artifacts fp16=carry/fp16 int8=carry/int8 -o results

`build` builds every plan at once (`build_plan.py` of each folder) and stops. `all` builds what is missing, runs
`measure` in TensorRT's Python and `eager` in this one, and writes gpu_tensorrt86.json. A step that fails is recorded
with its output, and the others go on.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

NEW_TOKENS, PROMPTS, WINDOWS, WINDOW, CANDIDATES = 64, 10, 16, 512, 5
SHAPES = ((1, 128), (1, 512), (8, 128))
"""Batch and prompt tokens that are timed, where the profiles take them."""
Row = Sequence[int]


# -- here: what fp32 gives ----------------------------------------------------------------------


def reference(options: argparse.Namespace) -> dict[str, Any]:
    """Greedy tokens with the best candidates of each step, and perplexity, by ONNX Runtime in fp32."""
    from common import commit
    from tokenizers import Tokenizer

    from optc.runtime.carried.run_trt import Decoder, perplexity
    from optc.runtime.sessions.onnx_engine import OnnxEngine

    info = json.loads((options.fp32 / "engine.json").read_text())
    tokens = Tokenizer.from_file(str(options.fp32 / "tokenizer.json")).encode(options.text.read_text()).ids
    decoder = Decoder(OnnxEngine(options.fp32 / "model.onnx", info["profiles"]))
    window = min(WINDOW, info["cache"]["capacity"])
    starts = np.linspace(0, len(tokens) - window, WINDOWS).astype(int)
    rows = []
    for index in range(PROMPTS):
        start = int(starts[index] + window // 2)
        prompt = tokens[start : start + 8 + 5 * index]
        rows.append({"prompt": prompt, **greedy_with_candidates(decoder, prompt, NEW_TOKENS)})
        print(f"prompt {index + 1} of {PROMPTS}", flush=True)
    windows = [tokens[start : start + window] for start in starts]
    return {
        "commit": commit(),
        "text": options.text.name,
        "rows": rows,
        **perplexity(decoder, windows),
        "windows": windows,
    }


def graphs(options: argparse.Namespace) -> dict[str, Any]:
    """What ONNX Runtime makes of other graphs along fp32's text: it tells rounding from errors of an engine."""
    from optc.runtime.carried.run_trt import Decoder
    from optc.runtime.sessions.onnx_engine import OnnxEngine

    known: dict[str, Any] = json.loads(options.reference.read_text())
    for name, folder in (item.split("=", 1) for item in options.artifacts):
        info = json.loads((Path(folder) / "engine.json").read_text())
        decoder = Decoder(OnnxEngine(Path(folder) / "model.onnx", info["profiles"]))
        rows = []
        for index, row in enumerate(known["rows"]):
            logits = forced_logits(decoder, row)
            best = np.argsort(-logits, axis=1, kind="stable")[:, :CANDIDATES]
            rows.append(
                {
                    "tokens": best[:, 0].tolist(),
                    "candidates": best.tolist(),
                    "logits": np.take_along_axis(logits, best, 1).round(5).tolist(),
                }
            )
            print(f"{name}: text {index + 1} of {len(known['rows'])}", flush=True)
        known.setdefault("graphs", {})[name] = rows
    return known


def greedy_with_candidates(decoder: Any, prompt: Row, count: int) -> dict[str, Any]:
    """`count` greedy tokens; of each step the likeliest ids and their logits."""
    tokens: list[int] = []
    ids, scores = [], []
    logits = decoder.prefill([prompt])[0]
    while True:
        best = np.argsort(-logits, kind="stable")[:CANDIDATES]
        ids.append(best.tolist())
        scores.append([round(float(logits[i]), 5) for i in best])
        tokens.append(int(best[0]))
        if len(tokens) == count:
            return {"tokens": tokens, "candidates": ids, "logits": scores}
        logits = decoder.advance([tokens[-1:]])[0]


# -- on the GPU, in TensorRT's Python -------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is asked of one artifact, through the run_trt.py that lies in it."""
    spec = importlib.util.spec_from_file_location("run_trt", options.artifact / "run_trt.py")
    assert spec is not None
    assert spec.loader is not None
    runner = importlib.util.module_from_spec(spec)
    sys.modules["run_trt"] = runner
    spec.loader.exec_module(runner)
    info = runner.read_description(str(options.artifact))
    engine = runner.TrtEngine(str(options.artifact), info)
    return figures(runner, runner.Decoder(engine), json.loads(options.reference.read_text()), options.name)


def figures(runner: Any, decoder: Any, known: dict[str, Any], name: str) -> dict[str, Any]:
    """Agreement, perplexity and latency; `runner` is the module run_trt."""
    prompts = [row["prompt"] for row in known["rows"]]

    def greedy(batch: Sequence[Row]) -> list[list[int]]:
        return runner.generate(decoder, batch, NEW_TOKENS, (), runner.Sampler(batch, 0.0, 0, 1.0, 0)).tokens

    alone = [greedy([prompt])[0] for prompt in prompts]
    free = [compare_free(row, got) for row, got in zip(known["rows"], alone)]
    logits = [forced_logits(decoder, row) for row in known["rows"]]
    forced = [compare_forced(found, row) for found, row in zip(logits, known["rows"])]
    same_graph = [compare_forced(*pair) for pair in zip(logits, known.get("graphs", {}).get(name, []))]
    result: dict[str, Any] = {
        "free_running": free,
        "free_running_equal": [row["equal"] for row in free],
        "teacher_forced": forced,
        "teacher_forced_equal": [row["equal"] for row in forced],
        "same_graph_in_onnxruntime": same_graph,
        "same_graph_equal": [row["equal"] for row in same_graph],
    }
    most = max(profile.batch[1] for profile in decoder.engine.profiles)
    together = [row for start in range(0, len(prompts), most) for row in greedy(prompts[start : start + most])]
    result["ragged_batch"] = {"rows": min(most, len(prompts)), "equal_to_alone": count_equal(together, alone)}
    found = runner.perplexity(decoder, known["windows"])
    found["fp32"] = known["perplexity"]
    found["relative_difference"] = found["perplexity"] / known["perplexity"] - 1
    result["perplexity"] = found
    result["latency"] = []
    for batch, prompt in SHAPES:
        if batch <= most and prompt + NEW_TOKENS <= decoder.engine.capacity:
            result["latency"].append(runner.bench(decoder, batch, prompt, NEW_TOKENS, 10))
    return result


def count_equal(left: Sequence[Row], right: Sequence[Row]) -> list[int]:
    """Equal tokens of each pair of rows before the first difference."""
    return [first_difference(a, b) for a, b in zip(left, right)]


def first_difference(left: Row, right: Row) -> int:
    """Index of the first difference, or the length."""
    return next((i for i, (a, b) in enumerate(zip(left, right)) if a != b), min(len(left), len(right)))


def compare_free(row: dict[str, Any], got: Row) -> dict[str, Any]:
    """Tokens equal before the first difference, and how far apart fp32 has the two candidates there."""
    at = first_difference(row["tokens"], got)
    if at == len(row["tokens"]):
        return {"equal": at}
    gap = margin(row, at, int(got[at]))
    return {"equal": at, "expected": row["tokens"][at], "found": int(got[at]), "fp32_margin": gap}


def margin(row: dict[str, Any], step: int, token: int) -> float | None:
    """How much larger than the token's the best logit of fp32 is; None when it is no candidate."""
    ids, scores = row["candidates"][step], row["logits"][step]
    return round(scores[0] - scores[ids.index(token)], 5) if token in ids else None


def forced_logits(decoder: Any, row: dict[str, Any]) -> Any:
    """Logits [64, V] along fp32's own text."""
    decoder.start(1)
    return decoder.score(row["prompt"] + row["tokens"][:-1])[len(row["prompt"]) - 1 :]


def compare_forced(logits: Any, row: dict[str, Any]) -> dict[str, Any]:
    """Best tokens against those of a row, with its margins where they differ, and the largest error of a logit."""
    best = logits.argmax(1)
    wrong = [i for i, token in enumerate(row["tokens"]) if best[i] != token]
    ids = np.asarray(row["candidates"])
    errors = np.abs(np.take_along_axis(logits, ids, 1) - np.asarray(row["logits"]))
    return {
        "equal": len(best) - len(wrong),
        "differences": [{"step": i, "margin": margin(row, i, int(best[i]))} for i in wrong],
        "largest_logit_error": float(errors.max()),
        "mean_logit_error": float(errors.mean()),
    }


# -- on the GPU, in torch's Python ----------------------------------------------------------------


def eager(options: argparse.Namespace) -> dict[str, Any]:
    """transformers, uncompiled, fp16, the same shape with random weights: latency does not depend on them."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(options.config)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    model = model.to(options.device).eval().requires_grad_(False)
    rows = []
    for batch, prompt in SHAPES:
        prefill, decode = [], []
        for turn in range(options.rounds + 1):
            ids = torch.randint(0, config.vocab_size, (batch, prompt), device=options.device)
            cache = transformers.DynamicCache(config=config)
            one = ids[:, :1]

            def step(tokens: Any, cache: Any = cache) -> None:
                out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
                out.logits[:, -1].float().cpu()  # what a sampler on the host reads

            first = clocked(functools.partial(step, ids))
            each = [clocked(functools.partial(step, one)) for _ in range(NEW_TOKENS)]
            if turn:
                prefill.append(first)
                decode += each
        rows.append(
            {
                "batch": batch,
                "prompt": prompt,
                "prefill_host_ms": statistics.median(prefill),
                "decode_host_ms": statistics.median(decode),
                "attention": model.config._attn_implementation,
            }
        )
    return {"torch": torch.__version__, "transformers": transformers.__version__, "latency": rows}


def clocked(action: Callable[[], None]) -> float:
    """Milliseconds of an action that waits for its own result."""
    begin = time.perf_counter()
    action()
    return (time.perf_counter() - begin) * 1e3


# -- the whole ------------------------------------------------------------------------------------


def build(options: argparse.Namespace) -> dict[str, Any]:
    """Build the plans that are not there yet, all at once; what was said of each lies in build.json beside it."""
    artifacts = dict(item.split("=", 1) for item in options.artifacts)

    def one(folder: str) -> dict[str, Any]:
        note = Path(folder) / "build.json"
        if not note.is_file():
            level = [] if options.opt_level is None else ["--opt-level", str(options.opt_level)]
            command = [options.trt_python, f"{folder}/build_plan.py", "--json", *level]
            said = run_json(command, options.build_timeout)
            if "error" in said:
                return said
            note.write_text(json.dumps(said))
        found: dict[str, Any] = json.loads(note.read_text())
        return found

    with ThreadPoolExecutor(len(artifacts)) as pool:
        return dict(zip(artifacts, pool.map(one, artifacts.values())))


def everything(options: argparse.Namespace) -> dict[str, Any]:
    """Build what is missing, then measure one after another, then the baseline."""
    artifacts = dict(item.split("=", 1) for item in options.artifacts)
    builds = build(options)
    print(json.dumps(builds), flush=True)
    here, variants = [__file__], {}
    for name, folder in artifacts.items():
        if "error" in builds[name]:
            variants[name] = {"build": builds[name]}
            continue
        asked = ["measure", "--artifact", folder, "--name", name, "--reference", str(options.reference)]
        found = run_json([options.trt_python, *here, *asked], 240)
        command = [options.trt_python, f"{folder}/run_trt.py", "--prompt-tokens", "5,17,33", "--json"]
        variants[name] = {"build": builds[name], **found, "command_line": run_json(command, 60)}
        print(name, json.dumps(found)[:2000], flush=True)
    config = next(iter(artifacts.values()))
    baseline = run_json([sys.executable, *here, "eager", "--config", config], 180)
    names = "name,driver_version,memory.total"
    smi = ["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader"]
    gpu = subprocess.run(smi, capture_output=True, text=True, check=False).stdout.strip()
    known = json.loads(options.reference.read_text())
    return {
        "benchmark": "gpu_tensorrt86",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": known["commit"],
        "environment": {"gpu": gpu},
        "variants": variants,
        "transformers_eager": baseline,
    }


def run_json(command: Sequence[str], timeout: float) -> dict[str, Any]:
    """The JSON object that a command prints last, or its failure."""
    begin = time.perf_counter()
    try:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {timeout} s", "command": list(map(str, command))}
    if done.returncode:
        return {"error": f"exit code {done.returncode}", "output": (done.stdout + done.stderr)[-3000:]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**result, "process_seconds": round(time.perf_counter() - begin, 1)}


def parse() -> argparse.Namespace:
    """One subcommand per step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    here = steps.add_parser("reference")
    here.add_argument("--fp32", type=Path, required=True, help="the artifact in fp32")
    here.add_argument("--text", type=Path, required=True)
    here.add_argument("-o", "--output", type=Path, required=True)
    one = steps.add_parser("measure")
    one.add_argument("--artifact", type=Path, required=True)
    one.add_argument("--reference", type=Path, required=True)
    one.add_argument("--name", default="", help="which of the reference's graphs this is")
    more = steps.add_parser("graphs")
    more.add_argument("--reference", type=Path, required=True, help="is read and written")
    more.add_argument("--artifacts", nargs="+", required=True, metavar="NAME=FOLDER")
    base = steps.add_parser("eager")
    base.add_argument("--config", required=True, help="a folder with config.json")
    base.add_argument("--device", default="cuda")
    base.add_argument("--rounds", type=int, default=10)
    plans, whole = steps.add_parser("build"), steps.add_parser("all")
    for step in (plans, whole):
        step.add_argument("--trt-python", required=True)
        step.add_argument("--artifacts", nargs="+", required=True, metavar="NAME=FOLDER")
        step.add_argument("--build-timeout", type=float, default=540)
        step.add_argument("--opt-level", type=int, help="of build_plan.py")
    whole.add_argument("--reference", type=Path, required=True)
    whole.add_argument("-o", "--output", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.step == "reference":
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(reference(options)) + "\n")
        return
    if options.step == "graphs":
        options.reference.write_text(json.dumps(graphs(options)) + "\n")
        return
    steps = {"measure": measure, "eager": eager, "build": build, "all": everything}
    result = steps[options.step](options)
    if options.step == "all":
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "gpu_tensorrt86.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
