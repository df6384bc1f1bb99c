"""run, eval and bench through the command line, over the example model run eagerly.

The engine is replaced by the captured Program, so that what the commands say and print is tested by
itself; tests/runtime/sessions/test_artifacts.py runs them over real engines.
"""

from __future__ import annotations

import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import captured_folder, make_manifest
from command_line import optc, optc_json
from conftest import EXAMPLE
from html_pages import Page
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from optc.compiler.artifact.folder import finish, read_manifest
from optc.compiler.artifact.manifest import Source
from optc.compiler.ir.program import Program
from optc.compiler.model_folder.checkpoint import check_folder, config_digest, weights_digest
from optc.compiler.rewriting.passes import PassContext
from optc.passes.kv_cache.paged import PageKVCache
from optc.runtime.generation.generate import generate
from optc.runtime.measuring.sample import NEW_TOKENS, PROMPT_TOKENS
from optc.runtime.sampling import Sampling
from optc.runtime.sessions.program import open_program

PROMPT = "The old man looked at the sea, and"
TEXT = "It was a dark night, and the ship lay at anchor. " * 40


@cache
def _program() -> Program:
    return PageKVCache().run(captured_folder(EXAMPLE), PassContext()).program


@cache
def _reference() -> Any:
    return AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32).eval()


def _artifact(folder: Path, *, source: Path = EXAMPLE, tokenizer: bool = True) -> Path:
    folder.mkdir()
    for name in ("tokenizer.json", "generation_config.json") if tokenizer else ():
        shutil.copyfile(EXAMPLE / name, folder / name)
    (folder / "model.onnx").write_bytes(b"graph")
    (folder / "report.html").write_text("old")
    info = check_folder(source)
    hashes = {"config_sha256": config_digest(info), "weights_sha256": weights_digest(info)}
    recorded = Source(path=str(source), parameters=3, dtype="bfloat16", **hashes)
    changes = {"source": recorded, "files": (), "weight_bytes": 12_000_000, "quantization": {}}
    finish(folder, make_manifest(contract=_program().contract, **changes))
    return folder


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def opened(folder: Path, manifest: Any, **options: Any) -> Any:
        return open_program(_program(), num_blocks=options["num_blocks"] or 256)

    monkeypatch.setattr("optc.runtime.sessions.load.open_session", opened)
    return _artifact(tmp_path / "artifact")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    return path


def expect(capsys: pytest.CaptureFixture[str], code: int, message: str, *args: object) -> None:
    assert optc(*args) == code
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""


def _greedy(prompt: str, count: int) -> tuple[list[int], list[int]]:
    ids = AutoTokenizer.from_pretrained(EXAMPLE)(prompt)["input_ids"]
    out = _reference().generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)
    return ids, list(map(int, out[0, len(ids) :]))


# -- run --------------------------------------------------------------------------------------


def test_run_json_equals_transformers(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = optc_json(capsys, "run", artifact, "--prompt", PROMPT, "--max-new-tokens", 24)
    ids, expected = _greedy(PROMPT, 24)
    assert found["prompt_tokens"] == ids
    assert found["tokens"] == expected
    assert found["text"] == AutoTokenizer.from_pretrained(EXAMPLE).decode(expected, skip_special_tokens=True)
    assert found["stop"] == "length"
    assert found["ttft_ms"] > 0
    assert found["tpot_ms"] > 0
    waste = found["kv_pool"]["peak_waste"]
    assert 0 < waste < 16
    assert set(found) == {"prompt_tokens", "tokens", "text", "stop", "ttft_ms", "tpot_ms", "kv_pool"}


def test_run_streams_the_same_text(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("run", artifact, "--prompt", PROMPT, "--max-new-tokens", 24)
    text = optc_json(capsys, *args)["text"]
    assert optc(*args) == 0
    out, err = capsys.readouterr()
    assert out == text + "\n"
    assert err == "", "remarks are for terminals"


def test_run_token_ids(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids, expected = _greedy(PROMPT, 8)
    listed = ",".join(map(str, ids))
    found = optc_json(capsys, "run", artifact, "--prompt_tokens", listed, "--max_new_tokens", 8)
    assert (found["prompt_tokens"], found["tokens"]) == (ids, expected)


def test_run_batch(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [PROMPT, "Once", "It was raining when they"]
    flags = [part for prompt in prompts for part in ("--prompt", prompt)]
    found = optc_json(capsys, "run", artifact, *flags, "--max-new-tokens", 12)
    assert set(found) == {"results", "ttft_ms", "tpot_ms", "kv_pool"}
    assert [(row["prompt_tokens"], row["tokens"]) for row in found["results"]] == [_greedy(p, 12) for p in prompts]
    assert optc("run", artifact, *flags, "--max-new-tokens", 12) == 0
    lines = capsys.readouterr().out
    assert lines == "".join(f"[{i}] {row['text']}\n" for i, row in enumerate(found["results"]))


def test_run_sampling_is_seeded(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def tokens(*flags: object) -> list[int]:
        found: list[int] = optc_json(capsys, "run", artifact, "--prompt", "Once", "--max-new-tokens", 12, *flags)[
            "tokens"
        ]
        return found

    greedy = tokens()
    warm = tokens("--temperature", 1, "--seed", 5)
    assert warm == tokens("--temperature", 1, "--seed", 5)
    assert warm != tokens("--temperature", 1, "--seed", 6)
    assert tokens("--top-k", 1) == greedy == tokens("--seed", 6)
    assert tokens("--top-p", 0.9) == tokens("--top-p", 0.9, "--temperature", 1)
    assert tokens("--min-p", 1) == greedy
    varied = tokens("--presence-penalty", 100)
    assert varied[0] == greedy[0]
    assert len(set(varied)) == 12
    assert tokens("--repetition-penalty", 1.5, "--temperature", 1, "--seed", 5) != warm


def test_run_stops_at_eos_unless_told(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, expected = _greedy(PROMPT, 8)
    config = artifact / "generation_config.json"
    config.write_text(json.dumps({"eos_token_id": [expected[3]]}))
    finish(artifact, read_manifest(artifact))
    args = ("run", artifact, "--prompt", PROMPT, "--max-new-tokens", 8)
    found = optc_json(capsys, *args)
    assert (found["tokens"], found["stop"]) == (expected[: expected.index(expected[3]) + 1], "stop-token")
    assert optc_json(capsys, *args, "--ignore-eos")["tokens"] == expected


def test_run_without_a_tokenizer(artifact: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plain = _artifact(tmp_path / "plain", tokenizer=False)
    ids, expected = _greedy(PROMPT, 8)
    listed = ",".join(map(str, ids))
    found = optc_json(capsys, "run", plain, "--prompt-tokens", listed, "--max-new-tokens", 8)
    assert (found["tokens"], found["text"]) == (expected, None)
    assert optc("run", plain, "--prompt-tokens", listed, "--max-new-tokens", 8) == 0
    assert capsys.readouterr().out == ",".join(map(str, expected)) + "\n"
    expect(capsys, 3, "remedy: give token ids: --prompt-tokens 5,17,33", "run", plain, "--prompt", PROMPT)


@pytest.mark.parametrize(
    ("code", "message", "flags"),
    [
        (2, "give either --prompt or --prompt-tokens", []),
        (2, "give either --prompt or --prompt-tokens, not both", ["--prompt", "a", "--prompt-tokens", "1"]),
        (2, "'prompt-tokens' cannot be ('5,x',)", ["--prompt-tokens", "5,x"]),
        (2, "'temperature' cannot be '-1'", ["--prompt", "a", "--temperature", "-1"]),
        (2, "'top-p' cannot be '1.5'", ["--prompt", "a", "--top-p", "1.5"]),
        (
            2,
            "top-k, top-p and min-p have no effect at temperature 0",
            ["--prompt", "a", "--temperature", "0", "--top-k", "3"],
        ),
        (2, "'max-new-tokens' cannot be '0'", ["--prompt", "a", "--max-new-tokens", "0"]),
        (2, "--tempersture", ["--prompt", "a", "--tempersture", "0"]),
        (3, "token id 8192 is outside the vocabulary", ["--prompt-tokens", "1,8192"]),
        (3, "token id -2 is outside the vocabulary", ["--prompt-tokens", "-2"]),
        (3, "does not fit the context of 2048", ["--prompt-tokens", ",".join(["7"] * 2049)]),
        (8, "the KV pool is out of blocks", ["--prompt-tokens", ",".join(["7"] * 65), "--kv-blocks", "4"]),
    ],
)
def test_run_refuses(
    artifact: Path, capsys: pytest.CaptureFixture[str], code: int, message: str, flags: list[str]
) -> None:
    expect(capsys, code, message, "run", artifact, *flags)


def test_empty_prompts(artifact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # The tokenizer adds a begin-of-text token, so even empty text is a prompt of one token ...
    assert len(optc_json(capsys, "run", artifact, "--prompt", "", "--max-new-tokens", 2)["tokens"]) == 2
    # ... and where it adds none, it is refused.
    monkeypatch.setattr("optc.runtime.generation.tokenizer.Tokenizer.encode", lambda self, text: [])
    expect(capsys, 3, "prompt 0 is empty", "run", artifact, "--prompt", "")


def test_tampered_and_missing_artifacts(artifact: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (artifact / "tokenizer.json").write_text("{}")
    expect(capsys, 7, "'tokenizer.json' has the wrong size", "run", artifact, "--prompt", "a")
    expect(capsys, 3, "the artifact does not exist", "run", tmp_path / "none", "--prompt", "a")


# -- eval -------------------------------------------------------------------------------------


def test_eval_json(artifact: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = optc_json(capsys, "eval", artifact, "--text", text)
    ids = torch.tensor([AutoTokenizer.from_pretrained(EXAMPLE)(TEXT)["input_ids"]])
    size = min(1024, ids.shape[1] - 1)
    with torch.no_grad():
        logits = _reference()(ids[:, :size]).logits[0].double()
    expected = float(torch.nn.functional.cross_entropy(logits, ids[0, 1 : size + 1]).exp())
    assert found["tokens"] == size
    assert found["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert found["reference_perplexity"] == pytest.approx(expected, rel=1e-5)
    assert 0 <= found["kl"] < 1e-8
    assert found["top1_agreement"] == 1.0
    assert (found["windows"], found["source"], found["source_matches"]) == (1, str(EXAMPLE), True)


def test_eval_for_people(artifact: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert optc("eval", artifact, "--text", text) == 0
    out, err = capsys.readouterr()
    lines = r"(evaluating: \d+ s, windows\n)*"  # of a machine that takes longer than ten seconds
    assert re.fullmatch(rf"evaluating: begun\n{lines}evaluating: done after \d+ s\n", err)
    assert [line.split("  ")[0] for line in out.splitlines()] == [
        "tokens",
        "perplexity",
        f"reference perplexity {out.splitlines()[2].split()[2]}",
        f"KL(source||artifact) {out.splitlines()[3].split()[1]} nats per token",
        "top-1 agreement",
    ]


def _changed_model(folder: Path) -> Path:
    shutil.copytree(EXAMPLE, folder)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name] = weights[name] * 1.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_eval_against_another_model(
    artifact: Path, text: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    other = _changed_model(tmp_path / "other")
    found = optc_json(capsys, "eval", artifact, "--text", text, "--source", other)
    assert found["kl"] > 1e-4
    assert found["source_matches"] is False
    assert found["reference_perplexity"] != pytest.approx(found["perplexity"], rel=1e-3)


def test_eval_notices_a_changed_source(
    artifact: Path, text: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = shutil.copytree(EXAMPLE, tmp_path / "source")
    mine = _artifact(tmp_path / "mine", source=source)
    shutil.rmtree(source)
    expect(capsys, 3, "the source model is not there", "eval", mine, "--text", text)
    _changed_model(source)
    expect(capsys, 3, "the source model is not the one that was compiled", "eval", mine, "--text", text)
    found = optc_json(capsys, "eval", mine, "--text", text, "--no-reference")
    assert (found["kl"], found["reference_perplexity"], found["source"]) == (None, None, None)


def test_eval_saves_figures(artifact: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And what both models write behind the text's beginning; the artifact's engine is the captured program here."""
    found = optc_json(capsys, "eval", artifact, "--text", text, "--save", "--windows", "1")
    quality = read_manifest(artifact).quality
    assert quality is not None
    assert quality["perplexity"] == found["perplexity"]
    page = Page((artifact / "report.html").read_text())
    assert page.card("perplexity")[0] == f"{found['perplexity']:,.4g}"
    page.check_alone()
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    prompt = tokenizer.encode(text.read_text())[:PROMPT_TOKENS]
    ids = _reference().generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW_TOKENS)
    expected = tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)
    assert quality["sample"]["source"] == quality["sample"]["artifact"] == expected
    assert quality["sample"]["same_tokens"] == quality["sample"]["tokens"] == len(ids[0]) - len(prompt)
    assert "all tokens are the same" in page.texts["quality"]
    assert optc("verify", artifact) == 0


def test_eval_refuses(artifact: Path, text: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_bytes(b"")
    expect(capsys, 3, "the text is not UTF-8", "eval", artifact, "--text", tmp_path / "latin.txt")
    expect(capsys, 3, "failed while reading the text", "eval", artifact, "--text", tmp_path / "none.txt")
    expect(
        capsys,
        3,
        "too few to predict anything",
        "eval",
        artifact,
        "--text",
        tmp_path / "empty.txt",
        "--no-reference",
    )
    expect(
        capsys,
        2,
        "'windows' cannot be '0'",
        "eval",
        artifact,
        "--text",
        text,
        "--windows",
        0,
        "--no-reference",
    )
    expect(capsys, 2, "contradict", "eval", artifact, "--text", text, "--no-reference", "--source", EXAMPLE)


# -- bench ------------------------------------------------------------------------------------


@pytest.fixture
def quick_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optc.runtime.measuring.benchmark.read_bandwidth", lambda threads: 24e9)


def test_equal_prompts_of_a_batch(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the help says: the first draws what it draws alone, each of the others something of its own."""
    flags = ("--temperature", 5, "--seed", 7, "--max-new-tokens", 12)
    once, other = ("--prompt-tokens", "5,17,33"), ("--prompt-tokens", "6,17,33")
    alone = optc_json(capsys, "run", artifact, *once, *flags)["tokens"]
    rows = [row["tokens"] for row in optc_json(capsys, "run", artifact, *other, *once, *once, *flags)["results"]]
    assert rows[1] == alone
    assert rows[2] != alone
    assert optc("run", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "of equal prompts in a batch the first gives that text, and each of the others one of its own" in text


@pytest.mark.usefixtures("quick_bandwidth")
def test_bench_json(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = ("--prompt-length", 16, "--prompt-length", 5)
    found = optc_json(capsys, "bench", artifact, *lengths, "--new-tokens", 4, "--samples", 3, "--batch", 2)
    for key in ("decode_tokens_per_s", "prefill_tokens_per_s", "ttft_ms"):
        assert 0 < found[key]["ci95"][0] <= found[key]["median"] <= found[key]["ci95"][1]
        assert found[key] == found["prompts"][0][key]
    assert [row["prompt_tokens"] for row in found["prompts"]] == [16, 5]
    assert found["weight_bytes"] == 12_000_000
    assert found["weight_read_limit_tokens_per_s"] == 2 * 24e9 / 12e6
    assert (found["samples"], found["batch"], found["new_tokens"]) == (3, 2, 4)
    assert found["sampling"]["temperature"] == 0
    assert found["peak_rss_bytes"] > 50e6


@pytest.mark.usefixtures("quick_bandwidth")
def test_bench_of_sampling(artifact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed draws as it was told to."""
    seen = []
    monkeypatch.setattr(
        "optc.runtime.measuring.benchmark.generate",
        lambda *args, sampling, **rest: seen.append(sampling) or generate(*args, sampling=sampling, **rest),
    )
    args = ("--prompt-length", 8, "--new-tokens", 4, "--samples", 2, "--top-p", 0.9, "--seed", 3)
    found = optc_json(capsys, "bench", artifact, *args)
    penalties = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert found["sampling"] == {"temperature": 1.0, "top_k": 0, "top_p": 0.9, "min_p": 0.0, "seed": 3, **penalties}
    assert seen == [Sampling(temperature=1.0, top_p=0.9, seed=3)] * 3
    assert optc("bench", artifact, *args) == 0
    sizes = "prompt of 8 tokens, batch 1, 2 samples"
    assert capsys.readouterr().out.startswith(f"{sizes}, drawn at temperature 1, top-p 0.9, seed 3\n")
    assert optc("bench", artifact, *args[:6], "--repetition-penalty", 1.5) == 0
    assert capsys.readouterr().out.startswith(f"{sizes}, greedy with repetition-penalty 1.5\n")


@pytest.mark.usefixtures("quick_bandwidth")
def test_bench_for_people_and_saved(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--prompt-length", 8, "--new-tokens", 4, "--samples", 2, "--warmup", 0, "--threads", 2, "--save")
    assert optc("bench", artifact, *args) == 0
    out = capsys.readouterr().out
    assert out.startswith("prompt of 8 tokens, batch 1, 2 samples\n  decode ")
    assert "24.0 GB/s measured read bandwidth: at most 2000 tokens/s, each weight read once per step" in out
    speed = read_manifest(artifact).speed
    assert speed is not None
    assert speed["weight_bytes"] == 12_000_000


def test_bench_refuses(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expect(capsys, 2, "'samples' cannot be '0'", "bench", artifact, "--samples", 0)
    expect(capsys, 2, "top-k, top-p and min-p have no effect", "bench", artifact, "--temperature", 0, "--top-k", 3)
    expect(capsys, 2, "do not fit the context", "bench", artifact, "--prompt-length", 2048)
