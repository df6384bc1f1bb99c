"""int4 on the CPU: our artifacts beside those of onnxruntime-genai's own builder, of the same models.

    python benchmarks/edge_peers.py                                        # all of it
    python benchmarks/edge_peers.py --only fiction-3m fiction-26m          # some models
    python benchmarks/edge_peers.py --only fiction-3m --methods rtn        # and some methods: no gptq, no other groups
    python benchmarks/edge_peers.py --small                                # fiction-3m by rtn, two rounds: whether it works

For fiction-3m, fiction-26m and a random decoder of 115 M parameters (speed only):

    builder    onnxruntime_genai.models.builder -p int4 -e cpu: 4 bits everywhere, groups of 32, scales in float32
    rtn        optc compile --quant rtn: the linears in 4 bits, embedding and head in 8
    rtn-head4  the same with --head-bits 4, the bits of the builder's
    rtn-head4-g32  besides with --group-size 32, the groups of the builder's: 4 bits everywhere, as it has them
    rtn-g32    head in 8 bits, linears in the builder's groups of 32
    gptq       quality only: its graph is rtn's

`bytes` are those of the graph and its weights. Perplexity is of windows of 1024 tokens; the builder's graph
is run by ONNX Runtime, each window in one call. `loss` is what the perplexity rose by over the source's, in fp32.
Decode is the median of interleaved rounds, of PROMPT tokens and STEPS steps; prefill the time to the first token of a
prompt of PREFILL tokens. Both in onnxruntime-genai, and ours in the session of `optc run` too; intervals are 95 %
bootstrap ones. Compile times are of the commands, one after the other, each with Python's bytecode in place, as it is
where packages are installed (`warm` makes that of this tree).

`goals` says which of these hold: size <= 1.0 of the builder's, loss <= 0.95 by rtn and <= 0.7 by gptq, decode >= 1.05,
prefill >= 1.0 (both in genai), compile time of rtn <= 1.5. The file is written after each model, with the load of the
machine before it.

    llama.cpp  Q4_K_M of the same folder, in llama.cpp, where llama-cpp-python and gguf are there (see llama_cpp_peer.py);
               else the result says what is missing. `fallback` names what its k-quants cannot hold. It is held to no
               goal: neither its file nor its engine is what a user of onnxruntime-genai has.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import DECODER_115M, ROOT, genai_seconds, interleave, open_gate_flags, random_llama, ratio, record
from llama_cpp_peer import LlamaCppSession, fallback, in_llama_cpp, runs, stored_types, why_not, write_q4_k_m

import optc
from optc.compiler.artifact.folder import verify
from optc.compiler.ir.contract import Contract
from optc.runtime.generation.tokenizer import load_tokenizer
from optc.runtime.measuring.benchmark import median_rate
from optc.runtime.measuring.evaluate import evaluate
from optc.runtime.measuring.reference import open_reference
from optc.runtime.sessions.ort import OrtSession

PROMPT, STEPS, PREFILL = 128, 64, 512
TEXT = ROOT / "examples" / "book.txt"
BUILDER, LLAMA_CPP, RANDOM = "builder", "llama.cpp", "decoder-115m"
MODELS = ("fiction-3m", "fiction-26m", RANDOM)
METHODS: dict[str, list[str]] = {
    "rtn": ["--quant", "rtn"],
    "rtn-head4": ["--quant", "rtn", "--head-bits", "4"],
    "rtn-head4-g32": ["--quant", "rtn", "--head-bits", "4", "--group-size", "32"],
    "rtn-g32": ["--quant", "rtn", "--group-size", "32"],
    "gptq": ["--quant", "gptq"],
}
FAST = ("rtn", "rtn-head4", "rtn-head4-g32")
"""Those that are timed: the graphs of the others are theirs."""
Timed = Callable[[int, int], tuple[float, float]]
"""From the tokens of a prompt and a number of steps to seconds to the first token, and of the steps."""


def make(model: Path, name: str, folder: Path, flags: list[str]) -> float:
    """Write an artifact with the command that a user would type; its seconds."""
    if name == BUILDER:
        cache = folder.parent / "cache"
        command = [
            "onnxruntime_genai.models.builder",
            "-m",
            model,
            "-o",
            folder,
            "-p",
            "int4",
            "-e",
            "cpu",
            "-c",
            cache,
        ]
    else:
        command = ["optc", "compile", model, "--target", "onnx-cpu", *METHODS[name], "-o", folder, *flags]
    begin = time.perf_counter()
    keeping = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)], capture_output=True, text=True, check=False, env=keeping
    )
    if done.returncode:
        raise SystemExit(f"{name} of {model}: {done.stderr[-2000:]}")
    return time.perf_counter() - begin


def warm(place: Path) -> None:
    """Compile once by either side: the builder's modules have their bytecode since they were installed, those of a
    source tree get it when they are first run."""
    for name in (BUILDER, "rtn"):
        make(ROOT / "examples" / "fiction-3m", name, place / name, [])


def stored(folder: Path) -> dict[str, int]:
    """Bytes of the graph, of its weights, and of both."""
    graph, weights = ((folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    return {"graph": graph, "weights": weights, "bytes": graph + weights}


class BuilderSession:
    """The builder's graph as `evaluate` reads one: all tokens of a window in one call, from an empty cache.

    Its inputs have the names of ours, but the axes of its caches are open, which an artifact's session refuses.
    """

    def __init__(self, graph: Path, contract: Contract, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self._names = {item.name for item in self._session.get_inputs()}
        layer = contract.layers[0]
        self._empty = np.zeros((1, layer.num_kv_heads, 0, layer.head_dim), np.float32)
        self.vocab_size, self.context_length = contract.model.vocab_size, contract.model.context_length

    def score(self, tokens: Sequence[int]) -> Iterator[np.ndarray[Any, Any]]:
        """Logits float32 [len(tokens), V]."""
        length = len(tokens)
        feeds: dict[str, Any] = {name: self._empty for name in self._names if name.startswith("past_key_values.")}
        plain = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(length, dtype=np.int64)[None],
        }
        feeds |= {name: value for name, value in plain.items() if name in self._names}
        yield self._session.run(["logits"], feeds)[0][0]


def perplexities(
    folders: dict[str, Path], gguf: Path | None, threads: int, windows: int
) -> dict[str, dict[str, float]]:
    """Perplexity and KL of each artifact, and of a file of llama.cpp's, and how much of perplexity each lost."""
    manifest = verify(folders["rtn"])
    reference = open_reference(manifest)
    tokenizer = load_tokenizer(reference.path)
    assert tokenizer is not None
    tokens = tokenizer.encode(TEXT.read_text(encoding="utf-8"))
    opened: dict[str, Callable[[], Any]] = {
        name: functools.partial(
            BuilderSession if name == BUILDER else OrtSession, folder / "model.onnx", manifest.contract, threads=threads
        )
        for name, folder in folders.items()
    }
    if gguf is not None:
        context = manifest.contract.model.context_length
        opened[LLAMA_CPP] = functools.partial(LlamaCppSession, gguf, threads=threads, context=context)
    found: dict[str, dict[str, float]] = {}
    for name, open_session in opened.items():
        session = open_session()
        score = evaluate(session, tokens, reference, windows=windows)
        assert score.reference_perplexity is not None
        assert score.kl is not None
        loss = score.perplexity - score.reference_perplexity
        found[name] = {
            "perplexity": score.perplexity,
            "source": score.reference_perplexity,
            "loss": loss,
            "kl": score.kl,
        }
        print(name, found[name], flush=True)
    return found


def in_genai(folder: Path, vocab: int) -> Timed:
    """onnxruntime-genai's Generator, greedy."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))

    return lambda length, steps: genai_seconds(model, random_tokens(vocab, length), steps)


def in_optc(folder: Path, vocab: int, threads: int) -> Timed:
    """What `optc run` does."""
    model = optc.load(folder, threads=threads)

    def run(length: int, steps: int) -> tuple[float, float]:
        found = model.generate(random_tokens(vocab, length), max_new_tokens=steps + 1, ignore_eos=True)
        return found.ttft_ms / 1e3, (found.tpot_ms or 0.0) * steps / 1e3

    return run


def random_tokens(vocab: int, length: int) -> list[int]:
    """The same for all contenders."""
    return [int(token) for token in np.random.default_rng(length).integers(3, vocab, length)]


def speeds(folders: dict[str, Path], gguf: Path | None, threads: int, rounds: int) -> dict[str, Any]:
    """Tokens per second of decode and prefill by contender, and the ratios of ours to the builder's, round by round."""
    vocab = verify(folders["rtn"]).contract.model.vocab_size
    timed: dict[str, Timed] = {f"{name} in genai": in_genai(folder, vocab) for name, folder in folders.items()}
    ours = {name: folder for name, folder in folders.items() if name != BUILDER}
    timed |= {f"{name} in optc": in_optc(folder, vocab, threads) for name, folder in ours.items()}
    if gguf is not None:
        timed[LLAMA_CPP] = in_llama_cpp(gguf, threads, PREFILL + STEPS + PROMPT)
    found: dict[str, Any] = {}
    measured: dict[str, Callable[[Timed], float]] = {
        "decode": lambda run: STEPS / run(PROMPT, STEPS)[1],
        "prefill": lambda run: PREFILL / run(PREFILL, 0)[0],
    }
    for what, once in measured.items():
        figures = interleave({name: functools.partial(once, run) for name, run in timed.items()}, rounds)
        base = figures[f"{BUILDER} in genai"]
        found[what] = {
            "tokens_per_s": {name: median_rate(rows).to_dict() for name, rows in figures.items()},
            "ratio_to_builder": {name: ratio(rows, base) for name, rows in figures.items() if rows is not base},
        }
    return found


GOALS: dict[str, tuple[str, float]] = {
    "size": ("<=", 1.0),
    "loss": ("<=", 0.95),
    "loss of gptq": ("<=", 0.7),
    "decode": (">=", 1.05),
    "prefill": (">=", 1.0),
    "compile time of rtn": ("<=", 1.5),
}


def goals(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What our artifacts are held to beside the builder's: each figure with its limit, and whether it keeps to it."""
    rows = [("size", name, value) for name, value in result["size_to_builder"].items()]
    losses = result.get("loss_to_builder", {})
    rows += [("loss of gptq" if name == "gptq" else "loss", name, value) for name, value in losses.items()]
    times = result["compile_to_builder"]
    rows += [("compile time of rtn", name, value) for name, value in times.items() if name.startswith("rtn")]
    for what in ("decode", "prefill"):
        rows += [(what, name, found["median"]) for name, found in result[what]["ratio_to_builder"].items()]
    return [
        {
            "what": what,
            "artifact": name,
            "value": value,
            "limit": " ".join(map(str, GOALS[what])),
            "holds": value <= GOALS[what][1] if GOALS[what][0] == "<=" else value >= GOALS[what][1],
        }
        for what, name, value in rows
        if name not in (BUILDER, LLAMA_CPP)
    ]


def in_llama_cpps_form(model: Path, place: Path) -> tuple[Path | None, dict[str, Any]]:
    """The model's file in Q4_K_M and what is in it; None and why there is no row."""
    missing = why_not()
    if missing is None:
        gguf = write_q4_k_m(model, place / LLAMA_CPP)
        missing = runs(gguf)
    if missing is not None:
        print(f"no row of llama.cpp: {missing}", flush=True)
        return None, {"skipped": missing}
    return gguf, {"types": stored_types(gguf), "fallback": fallback(gguf)}


def measure(model: Path, place: Path, given: argparse.Namespace, *, trained: bool) -> dict[str, Any]:
    """Everything about one model."""
    more = [name for name in given.methods if name not in FAST]
    names = [BUILDER, *FAST, *(more if trained else [])]
    folders = {name: place / name for name in names}
    flags = [] if trained else open_gate_flags()
    seconds = {name: make(model, name, folder, flags) for name, folder in folders.items()}
    result: dict[str, Any] = {
        "source_bytes": sum(path.stat().st_size for path in model.glob("*.safetensors")),
        "stored": {name: stored(folder) for name, folder in folders.items()},
        "compile_s": seconds,
    }
    gguf, result[LLAMA_CPP] = in_llama_cpps_form(model, place)
    if gguf is not None:
        result["stored"][LLAMA_CPP] = {"bytes": gguf.stat().st_size}
    size = result["stored"][BUILDER]["bytes"]
    result["size_to_builder"] = {name: row["bytes"] / size for name, row in result["stored"].items()}
    result["compile_to_builder"] = {name: row / seconds[BUILDER] for name, row in seconds.items()}
    if trained:
        quality = perplexities(folders, gguf, given.threads, given.windows)
        result["quality"] = quality
        result["loss_to_builder"] = {name: row["loss"] / quality[BUILDER]["loss"] for name, row in quality.items()}
    timed = {name: folders[name] for name in (BUILDER, *FAST)}
    result |= speeds(timed, gguf, given.threads, given.rounds)
    return result | {"goals": goals(result)}


def main() -> None:
    """Measure every model, print and record the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=ROOT.parent / "shared" / "models", help="holds fiction-26m")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), help="which models")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help=f"{', '.join(FAST)} always"
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="fiction-3m by rtn alone, two rounds and two windows")
    given = parser.parse_args()
    if given.small:
        given.only, given.methods, given.rounds, given.windows = ["fiction-3m"], ["rtn"], 2, 2
    result: dict[str, Any] = {
        "prompt": PROMPT,
        "steps": STEPS,
        "prefill": PREFILL,
        "rounds": given.rounds,
        "models": {},
    }
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        warm(place / "warm")
        models = {
            "fiction-3m": ROOT / "examples" / "fiction-3m",
            "fiction-26m": given.models / "fiction-26m",
            RANDOM: place / RANDOM,
        }
        for title in given.only:
            load, begin = os.getloadavg()[0], time.perf_counter()
            if title == RANDOM:
                random_llama(place / RANDOM, **DECODER_115M)
            found = measure(models[title], place / "made" / title, given, trained=title != RANDOM)
            result["models"][title] = found | {"load_before": load, "seconds": time.perf_counter() - begin}
            record("edge_peers_small" if given.small else "edge_peers", result, given.threads)


if __name__ == "__main__":
    main()
