"""A model and one that drafts for it in one artifact: what is written, what is said of it, and what is refused."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from command_line import optc as command
from command_line import optc_json
from conftest import EXAMPLE
from eagle3_models import small_draft, some_targets
from hf_folders import rename_token
from once import once, short_example
from safetensors import safe_open

import optc
from optc.compiler.artifact.folder import verify
from optc.compiler.artifact.sizes import Sizes
from optc.compiler.diagnostics import InputError, OptcError, TargetError, UsageError
from optc.compiler.ir.program import Program
from optc.compiler.model_folder.eagle3 import write_eagle3

EAGLE = EXAMPLE.parent / "fiction-3m-eagle3"
Capture = pytest.CaptureFixture[str]


def artifact() -> Path:
    """Two layers with one that drafts for them, for CUDA: nothing is compiled to native code."""

    def make(folder: Path) -> None:
        _compile(short_example(2), folder / "artifact", short_example(1), quant="rtn")

    return once("drafted-inductor-cuda", make) / "artifact"


def _compile(model: Path, output: Path, draft: Path, **options: str) -> None:
    optc.compile(model, output=output, draft=draft, **{"target": "inductor-cuda", "speculative": "draft", **options})


def _stored(folder: Path, names: Sequence[str] = ("weights.safetensors", "constants.safetensors")) -> int:
    """Bytes of all tensors, by safetensors' own reader."""
    total = 0
    for name in names:
        with safe_open(str(folder / name), "pt") as file:
            total += sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    return total


def test_what_is_written() -> None:
    folder, model, draft = artifact(), short_example(2), short_example(1)
    manifest = verify(folder)
    assert set(manifest.programs) == {"model", "draft"}
    entry = manifest.programs["draft"]
    assert entry.engine_info["graph"] == "draft/graph.json"
    assert (entry.contract.kv_cache.kind, manifest.contract.kv_cache.kind) == ("paged", "paged")
    assert {role: len(item.contract.layers) for role, item in manifest.programs.items()} == {"model": 2, "draft": 1}
    assert len(Program.load(folder / "draft").contract.layers) == 1
    assert entry.source is not None
    assert (entry.source.path, manifest.source.path) == (str(draft.resolve()), str(model.resolve()))
    assert entry.capture is not None
    assert entry.capture.proved
    assert {row.program for row in manifest.passes} == {"model", "draft"}
    assert {path.parent.name for path in (folder / "ir").rglob("*.txt")} == {"ir", "draft"}
    linears = [item.name for row in manifest.passes for item in row.linears]
    assert len(set(linears)) == len(linears), "those of both models have names of their own"
    assert manifest.quantization["linears"] == len(manifest.contract.quantization), "the model's alone"
    sizes = manifest.sizes
    assert sizes is not None
    assert sizes.draft == _stored(folder / "draft")
    assert sizes.total == manifest.weight_bytes == _stored(folder) + sizes.draft
    sources = [(item / "model.safetensors").stat().st_size for item in (model, draft)]
    assert (sizes.source, sizes.before["draft"]) == (sum(sources), sources[1])


def test_what_is_said_of_it(capsys: Capture) -> None:
    """Inspect, the report and the plan."""
    folder, model, draft = artifact(), short_example(2), short_example(1)
    assert command("inspect", folder) == 0
    text = capsys.readouterr().out
    assert "inputs of the draft, draft/graph.json:" in text
    assert f"draft:\n  source: {draft.resolve()} (" in text
    assert "  capture: proved against LlamaForCausalLM" in text
    rounded = [row for row in verify(folder).passes if (row.program, row.name) == ("draft", "quantize-rtn")]
    assert [f"draft: quantize-rtn: matched {row.matched} of" in text for row in rounded] == [True]
    assert "draft model 1." in text
    report = (folder / "report.html").read_text()
    assert "draft model" in report
    assert all(text in report for text in ("draft: source", str(draft.resolve()), "draft: capture"))
    options = ("--target", "inductor-cuda", "--quant", "rtn", "--speculative", "draft", "--draft", draft)
    planned = optc_json(capsys, "plan", model, *options)
    written = verify(folder).sizes
    assert written is not None
    assert planned["draft"]["model"] == str(draft)
    assert planned["sizes"]["draft"] == planned["draft"]["weight_bytes"]
    assert Sizes.read(planned["sizes"]).draft == pytest.approx(written.draft, rel=0.01)
    assert planned["sizes"]["source"] == written.source


def test_a_draft_model_that_reads_states(tmp_path: Path, capsys: Capture) -> None:
    """The model gives those that it reads, unasked."""
    _compile(EXAMPLE, tmp_path / "out", EAGLE, speculative="eagle3")
    manifest = verify(tmp_path / "out")
    draft = manifest.programs["draft"].contract
    assert draft.draft is not None
    (states,) = [item for item in manifest.contract.outputs if item.role == "aux_hidden"]
    assert states.layers == draft.draft.boundaries
    assert manifest.sizes is not None
    assert manifest.sizes.draft == _stored(tmp_path / "out" / "draft")
    options = ("--target", "inductor-cuda", "--speculative", "eagle3", "--draft", EAGLE)
    planned = Sizes.read(optc_json(capsys, "plan", EXAMPLE, *options)["sizes"])
    assert planned.draft == pytest.approx(manifest.sizes.draft, rel=0.02)
    with pytest.raises(UsageError) as found:
        optc.compile(
            EXAMPLE, output=tmp_path / "x", target="inductor-cuda", speculative="eagle3", draft=EAGLE, expose_hidden="1"
        )
    assert "--expose-hidden has no effect with --speculative eagle3" in found.value.what


def test_what_is_refused_before_anything_is_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optc.api.capture_resolved", lambda *_: pytest.fail("captured"))
    other, eagle, model = tmp_path / "other", tmp_path / "eagle", short_example(2)
    shutil.copytree(short_example(1), other)
    rename_token(other / "tokenizer.json", 300)
    eagle.mkdir()
    write_eagle3(eagle, small_draft().config, small_draft().tensors(), some_targets(), None)
    short = short_example(1)
    no_tokens = tmp_path / "no-tokens"
    shutil.copytree(short, no_tokens)
    (no_tokens / "tokenizer.json").unlink()
    compile_ = functools.partial(_compile, output=tmp_path / "out")
    cases: list[tuple[type[OptcError], str, Path, dict[str, str]]] = [
        (InputError, "token id 300 is 'changed' there", other, {}),
        (InputError, "cannot be compared", no_tokens, {}),
        (InputError, "is no model folder", tmp_path, {}),
        (UsageError, "generates by itself", eagle, {}),
        (InputError, "its architecture is", short, {"speculative": "eagle3"}),
        (InputError, "was made for another base", EAGLE, {"speculative": "eagle3"}),
        (UsageError, "needs a paged KV cache", short, {"target": "inductor-cpu", "kv_cache": "static"}),
        (TargetError, "does not take --draft", short, {"target": "onnx-cpu"}),
    ]
    for kind, message, draft, options in cases:
        with pytest.raises(kind) as found:
            compile_(model, draft=draft, **options)
        assert message in f"{found.value.what} {found.value.why}"
    for given, missing in ({"speculative": "draft"}, "give --draft"), ({"draft": short}, "add --speculative"):
        with pytest.raises(UsageError) as found:
            optc.compile(model, target="inductor-cpu", output=tmp_path / "out", **given)
        assert missing in str(found.value.remedy)
