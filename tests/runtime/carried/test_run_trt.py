"""The runner of TensorRT artifacts: token logic on ONNX Runtime, and its TensorRT calls on a stand-in."""

from __future__ import annotations

import ast
import ctypes
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trt_graphs
from fake_tensorrt import FakeCuda, fake_tensorrt
from trt_graphs import CAPACITY, PROFILES, VOCAB, description, save_folder

from optc.runtime.carried import run_trt
from optc.runtime.carried.run_trt import Decoder, RunnerError, Sampler, generate, main, perplexity, read_token_lists
from optc.runtime.generation.sampling import Sampler as OwnSampler
from optc.runtime.sampling import Sampling
from optc.runtime.sessions.onnx_engine import OnnxEngine

PROMPTS = [[3, 4, 5], [7], [2, 9, 11, 12, 13, 14, 15, 16]]  # the last is longer than the widest profile


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    trt_graphs.save_graph(path)
    return path


@pytest.fixture
def decoder(graph: Path) -> Decoder:
    return Decoder(OnnxEngine(graph, PROFILES, threads=1))


@pytest.fixture
def built(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a plan that the stand-in runs."""
    monkeypatch.setattr(run_trt, "Cuda", FakeCuda)
    monkeypatch.setattr(run_trt.importlib, "import_module", lambda name: fake_tensorrt())
    plan = json.dumps({"graph": str(graph), "profiles": PROFILES}).encode()
    made = {"runtime": "tensorrt", "runtime_version": "8.6.0", "plan": "model.plan"}
    digest = hashlib.sha256(plan).hexdigest()
    folder = save_folder(tmp_path / "out", **made, plan_sha256=digest, compute_capabilities=["sm90"])
    (folder / "model.plan").write_bytes(plan)
    return folder


def greedy(prompt: list[int], count: int) -> list[int]:
    """By the NumPy model, which has no cache, until its context is full."""
    row = list(prompt)
    while len(row) < len(prompt) + count and len(row) <= CAPACITY:
        row.append(int(trt_graphs.reference(row)[-1].argmax()))
    return row[len(prompt) :]


def plain(prompts: list[list[int]]) -> Sampler:
    return Sampler(prompts, 0.0, 0, 1.0, 0)


def test_ragged_prompts_longer_than_a_profile_give_the_logits_of_each_alone(decoder: Decoder) -> None:
    for prompt, logits in zip(PROMPTS, decoder.prefill(PROMPTS), strict=True):
        np.testing.assert_allclose(logits, trt_graphs.reference(prompt)[-1], atol=1e-4)


def test_greedy_tokens_are_those_of_the_model_without_a_cache(decoder: Decoder) -> None:
    """Up to a full context, where the padding of a row would pass the end of its cache."""
    found = generate(decoder, PROMPTS, 40, (), plain(PROMPTS))
    assert found.tokens == [greedy(prompt, 40) for prompt in PROMPTS]
    assert found.stop == ["context"] * 3
    assert len(found.step_ms) == len(found.tokens[1]) - 1


def test_a_row_that_stops_does_not_disturb_the_others(decoder: Decoder) -> None:
    wanted = [greedy(prompt, 6) for prompt in PROMPTS]
    stop = wanted[0][1]
    found = generate(decoder, PROMPTS, 6, (stop,), plain(PROMPTS))
    cut = [row[: row.index(stop) + 1] if stop in row else row for row in wanted]
    assert found.tokens == cut
    assert found.stop == ["stop-token" if stop in row else "length" for row in wanted]


def test_padding_near_the_end_of_the_cache_starts_earlier(decoder: Decoder) -> None:
    """Row 0 has one place left while row 1 takes six tokens at once: row 0 reads its last tokens again."""
    full = [(5 * i) % VOCAB for i in range(CAPACITY - 1)]
    decoder.prefill([full, [2]])
    logits = decoder.advance([[4], [5, 6, 7, 8, 9, 10]])
    np.testing.assert_allclose(logits[0], trt_graphs.reference([*full, 4])[-1], atol=1e-4)
    np.testing.assert_allclose(logits[1], trt_graphs.reference([2, 5, 6, 7, 8, 9, 10])[-1], atol=1e-4)
    logits = decoder.advance([[], [11]])  # row 0 is full and stays as it is
    np.testing.assert_allclose(logits[1], trt_graphs.reference([2, 5, 6, 7, 8, 9, 10, 11])[-1], atol=1e-4)


def test_rewound_tokens_are_forgotten(decoder: Decoder) -> None:
    decoder.prefill([[3, 4, 5, 6, 7]])
    decoder.rewind([2])
    np.testing.assert_allclose(decoder.advance([[9]])[0], trt_graphs.reference([3, 4, 9])[-1], atol=1e-4)


@pytest.mark.parametrize("text", ["[[1e999]]", "[[NaN]]", "[[1.5]]", "[[true]]", '[["5"]]', "[5]", "[" * 5000])
def test_token_lists_hold_whole_numbers(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ids.json"
    path.write_text(text)
    with pytest.raises(RunnerError, match="not a JSON list of lists of token ids") as caught:
        read_token_lists(str(path))
    assert caught.value.exit_code == 3
    path.write_text("[[1, 2], [3]]")
    assert read_token_lists(str(path)) == [[1, 2], [3]]


def test_perplexity_is_that_of_all_logits(decoder: Decoder) -> None:
    windows = [[3, 4, 5, 6, 7, 8, 9, 10, 11], [1, 2]]
    losses = []
    for row in windows:
        logits = trt_graphs.reference(row[:-1])
        shifted = logits - logits.max(1, keepdims=True)
        chances = np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)
        losses += list(-np.log(chances[np.arange(len(row) - 1), row[1:]]))
    found = perplexity(decoder, windows)
    assert found["tokens"] == 9
    assert found["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.7), (9, 0.8)])
def test_draws_are_those_of_optc(top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(3).standard_normal((40, 3, 50)).astype(np.float32)
    prompts = [[1, 2], [1, 2], [4]]
    mine = Sampler(prompts, 0.9, top_k, top_p, 11)
    own = OwnSampler([Sampling(temperature=0.9, top_k=top_k, top_p=top_p, seed=11)] * len(prompts), prompts)
    assert [mine(step, [True] * 3) for step in logits] == [own(step) for step in logits]


@pytest.mark.parametrize(
    ("action", "text", "code"),
    [
        (lambda d: d.prefill([[1] * (CAPACITY + 1)]), "row 0: 17 tokens do not fit the plan's cache of 16", 3),
        (lambda d: d.prefill([[1, VOCAB]]), "row 0: token ids must be from 0 to 22", 3),
        (lambda d: d.prefill([[1]] * 4), "a batch of 4 does not fit the plan, which takes 1 to 3 rows", 3),
        (lambda d: d.prefill([[]]), "give at least one prompt, each of at least one token", 3),
        (lambda d: generate(d, [[1]], 0, (), plain([[1]])), "max-new-tokens must be 1 or more", 2),
        (lambda d: perplexity(d, [[1]]), "a window of fewer than 2 tokens has no perplexity", 3),
        (lambda d: Sampler([], 0.0, 5, 1.0, 0), "top-k and top-p have no effect at temperature 0", 2),
        (lambda d: Sampler([], 1.0, 0, 0.0, 0), "top-p above 0", 2),
    ],
)
def test_what_does_not_fit_is_refused_before_it_runs(decoder: Decoder, action: Any, text: str, code: int) -> None:
    with pytest.raises(RunnerError, match=text) as caught:
        action(decoder)
    assert caught.value.exit_code == code


def test_logits_that_are_no_numbers_stop_the_run() -> None:
    with pytest.raises(RunnerError, match="row 0: the plan computes logits that are not finite") as caught:
        plain([[1]])(np.array([[0.0, np.nan]], np.float32), [True])
    assert caught.value.exit_code == 5


# -- the TensorRT side ----------------------------------------------------------------------------


def test_a_plan_runs_with_two_sets_of_caches(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lists = [part for row in PROMPTS for part in ("--prompt-tokens", ",".join(map(str, row)))]
    assert main(["--artifact", str(built), "--json", "--ignore-eos", "--max-new-tokens", "5", *lists]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["tokens"] for row in result["results"]] == [greedy(prompt, 5) for prompt in PROMPTS]
    assert result["decode_ms_median"] > 0


def test_bench_and_perplexity_of_a_plan(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    windows = tmp_path / "windows.json"
    windows.write_text("[[3, 4, 5, 6, 7, 8, 9]]")
    assert main(["--artifact", str(built), "--json", "--perplexity", str(windows)]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 6
    sizes = ["--batch", "2", "--bench-prompt", "4", "--bench-steps", "3", "--rounds", "2"]
    assert main(["--artifact", str(built), "--json", "--bench", *sizes]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["decode_gpu_ms"] == 0.25
    assert found["prefill_host_ms"] > 0


def test_memory_of_a_plan_is_given_back(built: Path) -> None:
    engine = run_trt.TrtEngine(str(built), run_trt.read_description(str(built)))
    decoder = Decoder(engine)
    decoder.prefill(PROMPTS)
    decoder.prefill(PROMPTS[:2])  # another batch: new caches
    assert len(engine.cuda.memory) == 4 + 3
    engine.close()
    assert engine.cuda.memory == {}


@pytest.mark.parametrize(
    ("change", "text", "code"),
    [
        (
            {"runtime_version": "8.6.1"},
            "the plan was made by tensorrt 8.6.1, this is 8.6.0: run build_plan.py here",
            4,
        ),
        (
            {"compute_capabilities": ["sm80", "8.9"]},
            "compute capability 9.0, the plan was built for 8.0, 8.9",
            4,
        ),
        (
            {"compute_capabilities": "portable"},
            "capability 9.0, the plan was built for 8.0, 8.6, 8.9, 12.0",
            4,
        ),
        ({"plan": None}, "there is no plan yet: run build_plan.py on this machine", 4),
        ({"plan": "../model.plan"}, "is not a plain file of the artifact", 7),
        ({"plan_sha256": "0" * 64}, "the plan was changed after engine.json was written", 7),
        ({"format": 2}, "no readable engine.json", 7),
        ({"vocab_size": 24}, "vocabulary or capacity is not that of engine.json", 7),
    ],
)
def test_a_plan_that_cannot_run_here(
    built: Path, change: dict[str, Any], text: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = built / "engine.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert main(["--artifact", str(built), "--prompt-tokens", "5"]) == code
    assert text in capsys.readouterr().err


def test_a_plan_that_tensorrt_refuses(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (built / "model.plan").write_bytes(b"junk")
    digest = hashlib.sha256(b"junk").hexdigest()
    path = built / "engine.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"plan_sha256": digest}))
    assert main(["--artifact", str(built), "--prompt-tokens", "5"]) == 4
    assert "TensorRT refuses the plan: Serialization assertion" in capsys.readouterr().err


def test_without_a_driver_that_is_said(
    built: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.undo()
    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert main(["--artifact", str(built), "--prompt-tokens", "5"]) == 4
    assert "there is no NVIDIA driver on this machine: libcuda.so.1" in capsys.readouterr().err


def test_a_driver_without_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        @staticmethod
        def cuInit(flags: int) -> int:  # noqa: N802
            return 100

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    with pytest.raises(RunnerError, match=r"finds no GPU that it can use \(CUDA error 100\)") as caught:
        run_trt.Cuda()
    assert caught.value.exit_code == 4


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunnerError, match="the Python package tensorrt_nowhere is not installed") as caught:
        run_trt.import_tensorrt("tensorrt_nowhere", None)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("arguments", "text", "code"),
    [
        ([], "give one of --prompt, --prompt-tokens", 2),
        (["--prompt-tokens", "a"], "--prompt-tokens takes integers and commas", 2),
        (["--prompt", "text"], "text needs tokenizer.json", 4),
        (["--prompts", "/nowhere.json"], "not a JSON list of lists of token ids", 3),
    ],
)
def test_bad_arguments(
    built: Path, arguments: list[str], text: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--artifact", str(built), *arguments]) == code
    assert text in capsys.readouterr().err


def test_the_file_is_python_3_8() -> None:
    ast.parse(Path(run_trt.__file__).read_text(), feature_version=(3, 8))
    assert description()["format"] == run_trt.FORMAT


def test_caches_that_come_out_in_another_type_are_refused(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their buffers are of one size: the plan would write past the end."""
    info = run_trt.read_description(str(built))
    original = run_trt.TrtEngine._read_bindings

    def halved(engine: run_trt.TrtEngine, facts: dict[str, Any]) -> None:
        plan, real = engine._engine, engine._engine.get_tensor_dtype
        half = type("Half", (), {"name": "HALF"})
        monkeypatch.setattr(plan, "get_tensor_dtype", lambda n: half if n.startswith("present") else real(n))
        original(engine, facts)

    monkeypatch.setattr(run_trt.TrtEngine, "_read_bindings", halved)
    with pytest.raises(RunnerError, match="cache inputs and outputs differ in shape or type") as caught:
        run_trt.TrtEngine(str(built), info)
    assert caught.value.exit_code == 7
