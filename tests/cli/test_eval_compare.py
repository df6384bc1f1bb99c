"""`optc eval` of several artifacts and of tasks, over the example model run eagerly in place of an engine."""

from __future__ import annotations

import json
import math
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import captured_folder, make_manifest
from command_line import optc, optc_json
from conftest import EXAMPLE

from optc.compiler.artifact.folder import finish, read_manifest
from optc.compiler.artifact.manifest import Source
from optc.compiler.artifact.sizes import Sizes
from optc.compiler.ir.program import Program
from optc.compiler.model_folder.checkpoint import check_folder, weights_digest
from optc.compiler.rewriting.passes import PassContext
from optc.exporters.reports.comparison import size_bars
from optc.passes.quantization.rtn import QuantizeRtn
from optc.runtime.sessions.program import open_program

TEXT = "It was a dark night, and the ship lay at anchor. The captain had gone ashore. " * 12


@cache
def _program(bits: int) -> Program:
    program = captured_folder(EXAMPLE)
    return QuantizeRtn(bits=bits).run(program, PassContext()).program if bits else program


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(folder: Path, manifest: Any, **options: Any) -> Any:
        return open_program(_program(manifest.engine_info["bits"]))

    monkeypatch.setattr("optc.runtime.sessions.load.open_session", opened)


def _artifact(folder: Path, bits: int, digest: str = "") -> Path:
    folder.mkdir()
    for name in ("tokenizer.json", "generation_config.json"):
        shutil.copyfile(EXAMPLE / name, folder / name)
    digest = digest or weights_digest(check_folder(EXAMPLE))
    source = Source(path=str(EXAMPLE), parameters=3, dtype="", config_sha256="", weights_sha256=digest)
    contract = _program(0).contract
    finish(
        folder,
        make_manifest(contract=contract, source=source, files=(), quantization={}, engine_info={"bits": bits}),
    )
    return folder


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    return [_artifact(tmp_path / name, bits) for name, bits in (("four", 4), ("eight", 8), ("plain", 0))]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    return path


def test_compare_json(
    three: list[Path], text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    from optc.runtime.measuring.reference import SourceModel

    run = SourceModel.__call__
    monkeypatch.setattr(SourceModel, "__call__", lambda self, tokens: runs.append(1) or run(self, tokens))
    found = optc_json(capsys, "eval", "--compare", *three, "--text", text, "--top-k", 5)
    rows = found["results"]
    assert [row["artifact"] for row in rows] == list(map(str, three))
    assert rows[0]["kl"] > 10 * rows[1]["kl"] > 0
    assert rows[2]["kl"] < 1e-8
    for row in rows:
        assert 0 <= row["top_k_kl"] <= row["kl"] + 1e-12
        assert (row["top_k"], row["source_matches"], row["text"]) == (5, True, "book.txt")
    assert len(runs) == rows[0]["windows"] == 1, "the source model sees each window once, not once per artifact"
    pairs = [(item["first"], item["second"]) for item in found["differences"]]
    assert pairs == [(str(three[a]), str(three[b])) for a, b in ((0, 1), (0, 2), (1, 2))]
    gain = math.log(rows[0]["perplexity"] / rows[1]["perplexity"])
    assert found["differences"][0]["log_likelihood"] == pytest.approx(gain, rel=1e-9)
    alone = optc_json(capsys, "eval", three[0], "--text", text, "--top-k", 5)
    assert all(alone[key] == rows[0][key] for key in alone if key != "seconds")
    assert "artifact" not in alone


def test_compare_for_people(three: list[Path], text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert optc("eval", "--compare", *three[:2], "--text", text, "--top-k", 5) == 0
    out, err = capsys.readouterr()
    assert [line.partition(" after")[0] for line in err.splitlines()] == ["evaluating: begun", "evaluating: done"]
    lines = out.splitlines()
    assert lines[0].startswith("reference perplexity ")
    assert lines[1].split() == [
        "artifact",
        "perplexity",
        "KL",
        "top-5",
        "KL",
        "top-1",
        "seconds",
        "gain",
        "(95",
        "%)",
    ]
    assert lines[2].split()[0] == str(three[0])
    assert lines[2].split()[-1] == "-"
    assert lines[3].split()[-1].startswith(("+", "-0"))


def test_compare_saves_each(three: list[Path], text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = optc_json(capsys, "eval", "--compare", *three[:2], "--text", text, "--no-reference", "--save")["results"]
    for path, row in zip(three[:2], rows, strict=True):
        quality = read_manifest(path).quality
        assert quality is not None
        assert quality["perplexity"] == row["perplexity"]
        assert "artifact" not in quality


def test_refuses(three: list[Path], text: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    foreign = _artifact(tmp_path / "foreign", 8, digest="f" * 64)
    cases: list[tuple[int, str, list[Any]]] = [
        (2, "2 artifacts were given", [*three[:2], "--text", text]),
        (2, "an artifact was named twice", ["--compare", three[0], three[0], "--text", text]),
        (2, "there is nothing to evaluate on", [three[0]]),
        (2, "--windows has no effect without --text", [three[0], "--tasks", "a.yaml", "--windows", 3]),
        (2, "--no-reference has no effect without --text", [three[0], "--tasks", "a.yaml", "--no-reference"]),
        (2, "--limit has no effect without --tasks", [three[0], "--text", text, "--limit", 3]),
        (2, "'top-k' cannot be '0'", [three[0], "--text", text, "--top-k", 0]),
        (2, "top-k KL needs a reference", [three[0], "--text", text, "--top-k", 3, "--no-reference"]),
        (3, "compiled from different weights", ["--compare", three[0], foreign, "--text", text]),
        (3, "the task does not exist", [three[0], "--tasks", tmp_path / "none.yaml"]),
    ]
    for code, message, args in cases:
        assert optc("eval", *args) == code, message
        out, err = capsys.readouterr()
        assert message in err
        assert out == ""
    found = optc_json(capsys, "eval", "--compare", three[0], foreign, "--text", text, "--no-reference")
    assert found["results"][1]["kl"] is None


def test_other_tokens_are_refused(three: list[Path], text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = three[1] / "tokenizer.json"
    data = json.loads(file.read_text())
    data["post_processor"] = None
    file.write_text(json.dumps(data))
    finish(three[1], read_manifest(three[1]))
    assert optc("eval", "--compare", *three[:2], "--text", text) == 3
    assert "the artifacts do not see the same tokens" in capsys.readouterr().err


def test_tasks(
    three: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data.jsonl"
    data.write_text('{"a": "The ship lay at", "b": " anchor"}\n{"a": "He opened the", "b": " door"}\n')
    (tmp_path / "tiny.yaml").write_text(
        f"""task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {tmp_path / "cache"}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{a}}}}"
doc_to_target: "{{{{b}}}}"
metric_list: [{{metric: perplexity}}, {{metric: acc}}]
"""
    )
    task = tmp_path / "tiny.yaml"
    rows = optc_json(capsys, "eval", "--compare", *three[1:], "--tasks", task)["results"]
    assert [row["tasks"]["tiny"]["samples"] for row in rows] == [2, 2]
    values = [row["tasks"]["tiny"]["perplexity"]["value"] for row in rows]
    assert values[0] == pytest.approx(values[1], rel=0.1)
    assert values[0] != values[1]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32),
        AutoTokenizer.from_pretrained(EXAMPLE),
    )
    total = 0.0
    for line in data.read_text().splitlines():
        row = json.loads(line)
        prompt, whole = (tokenizer(item)["input_ids"] for item in (row["a"], row["a"] + row["b"]))
        with torch.no_grad():
            log_p = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        total += sum(float(log_p[i - 1, whole[i]]) for i in range(len(prompt), len(whole)))
    assert values[1] == pytest.approx(math.exp(-total / 2), rel=1e-3)
    assert optc("eval", three[2], "--tasks", task) == 0
    assert capsys.readouterr().out.startswith("tiny                 perplexity ")


def test_side_by_side(
    three: list[Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`optc compare`: the figures of the manifests, those of `optc eval --compare`, and rates in turn."""
    report = tmp_path / "report.html"
    timed = {"prompt_length": 4, "new_tokens": 2, "samples": 2}
    flags = [word for name, value in timed.items() for word in (f"--{name.replace('_', '-')}", value)]
    found = optc_json(capsys, "compare", *three, "--text", text, "-o", report, *flags)
    known = optc_json(capsys, "eval", "--compare", *three, "--text", text)
    assert found["differences"] == known["differences"]
    for row, quality in zip(found["artifacts"], known["results"], strict=True):
        assert all(row["quality"][key] == quality[key] for key in ("perplexity", "kl", "top1_agreement"))
        assert row["gate"]["kl"] == 2e-9
        assert row["speed"]["decode_tokens_per_s"]["median"] > 0
        low, high = row["speed"]["prefill_tokens_per_s"]["to_first"]["ci95"]
        assert low <= row["speed"]["prefill_tokens_per_s"]["to_first"]["median"] <= high
    assert found["artifacts"][0]["speed"]["decode_tokens_per_s"]["to_first"] == {"median": 1.0, "ci95": [1.0, 1.0]}
    written = report.read_text()
    perplexity = f"{known['results'][1]['perplexity']:.4f}"
    assert all(item in written for item in (*map(str, three), perplexity, str(EXAMPLE)))
    assert "http://" not in written.replace("http://www.w3.org", "")
    assert optc("compare", *three, "--no-speed", "-o", report) == 3
    assert "the report exists already" in capsys.readouterr().err
    assert optc("compare", *three[:2], "--no-speed") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["artifact", "quantization", "weights"]
    assert [line.split()[0] for line in lines[1:3]] == list(map(str, three[:2]))


def test_what_is_not_compared(three: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = _artifact(tmp_path / "foreign", 8, digest="f" * 64)
    for code, said, given in (
        (3, "compiled from different weights", [three[0], foreign]),
        (2, "at least two different artifacts", [three[0]]),
        (2, "at least two different artifacts", [three[0], three[0]]),
        (2, "do not fit the shortest context", [*three[:2], "--prompt-length", 1 << 20]),
    ):
        assert optc("compare", *given) == code
        assert said in capsys.readouterr().err


def test_bars_of_sizes() -> None:
    """Shares of the largest; every artifact has the parts that one of them has, in one order."""
    rows = [
        {"artifact": "plain", "sizes": Sizes(embedding=600, linears=400).to_dict()},
        {"artifact": "four", "sizes": Sizes(embedding=150, linears=50, scales=50).to_dict()},
        {"artifact": "of memory", "sizes": None},
    ]
    plain, four = size_bars(rows)
    assert plain["parts"] == [("embedding", 600, 60.0), ("linears", 400, 40.0), ("scales", 0, 0.0)]
    assert four["parts"] == [("embedding", 150, 15.0), ("linears", 50, 5.0), ("scales", 50, 5.0)]
    assert (plain["total"], four["total"]) == (1000, 250)
