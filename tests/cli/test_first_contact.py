"""What a newcomer meets: names of the hub, usage errors as JSON, lines of progress, the commands from Python."""

from __future__ import annotations

import functools
import json
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import hf_folders
import numpy as np
import pytest
import torch
from command_line import optc, optc_json
from huggingface_hub import constants

import optc as package
from optc.compiler.diagnostics import ArtifactError, InputError, UsageError
from optc.heartbeat import heartbeat
from optc.hub import local_model
from optc.progress import Bar, in_notebook, reporting


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with one model in it, offline."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = tmp_path / "hub" / "models--someone--tiny-llama"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    shutil.copytree(hf_folders.source("llama", 1), home / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return home / "snapshots" / commit


def test_names_of_the_hub(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert local_model("someone/tiny-llama") == cache
    assert local_model("someone/tiny-llama@main") == cache
    plan = optc_json(capsys, "plan", "someone/tiny-llama", "--target", "onnx-cpu")
    assert plan["model"] == "someone/tiny-llama"
    assert plan["linears"] == 7
    assert optc("plan", "someone/other", "--target", "onnx-cpu") == 3
    said = capsys.readouterr().err
    assert "there is no folder 'someone/other'" in said
    assert f"HF_HUB_OFFLINE is set, and the cache does not hold it ({tmp_path / 'hub'})" in said
    program = package.capture("someone/tiny-llama")
    assert program.contract.kind == "decoder"


def test_paths_are_no_names(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()
    for path in ("someone/tiny-llama", "folder", "/abs/path", "a/b/c", "./someone/x", "../x/y"):
        assert local_model(path) == path


def test_usage_errors_are_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert optc("compile", "--no-such-flag", "--json") == 2
    said = json.loads(capsys.readouterr().out)
    assert (said["error"], said["exit_code"], said["where"]) == ("usage", 2, "optc compile")
    assert "--no-such-flag" in said["what"]
    assert optc("inspect", "--json") == 2
    assert "PATH" in json.loads(capsys.readouterr().out)["what"]


def test_progress_from_python(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, str]] = []
    with reporting(lambda done, note: seen.append((done, note)), "compiling", lambda: 3) as update:
        assert update is not None
        update(1, "a pass")
    assert seen == [(1, "a pass")]
    for silent in (None, False):
        with reporting(silent, "compiling", lambda: 3) as update:
            assert update is None
    with pytest.raises(UsageError, match="progress cannot be 3"), reporting(3, "x", lambda: 3):  # type: ignore[arg-type]
        pass
    assert not in_notebook()
    monkeypatch.setattr("optc.progress.heartbeat", functools.partial(heartbeat, every=0.02))
    with reporting(True, "compiling", lambda: 3) as update:  # no terminal: lines
        assert update is not None
        update(2, "a pass")
        time.sleep(0.1)
    assert capsys.readouterr().err.splitlines()[-1].startswith("compiling: done after ")


def test_progress_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures: list[tuple[str, str]] = []
    show = SimpleNamespace(update=lambda bar: pictures.append((repr(bar), bar._repr_html_())))

    def display(bar: Bar, display_id: bool) -> SimpleNamespace:
        assert display_id
        show.update(bar)
        return show

    python = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=1), display=SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython", python)
    monkeypatch.setattr("optc.progress._OFTEN", 0.0)
    with reporting(True, "compiling", lambda: 4) as update:
        assert update is not None
        update(1, "<norm>")
    assert [text for text, _ in pictures] == [
        "compiling:   0%|                    | 0/4 [0 s]",
        "compiling:  25%|#####               | 1/4 [0 s, <norm>]",
        "compiling: 100%|####################| 4/4 [0 s, done]",
    ]
    assert "<progress value='1' max='4'></progress> 1/4 [0 s, &lt;norm&gt;]" in pictures[1][1]
    with pytest.raises(ValueError, match="stopped"), reporting(True, "compiling", lambda: None):
        raise ValueError("stopped")
    assert pictures[-1][0] == "compiling:   0%|                    | 0 [0 s]"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    net = torch.nn.Linear(32, 4)
    program = package.capture(net, (torch.ones(2, 32),), input_names=["x"], dynamic={"x": {0: "rows"}})
    result = package.compile(program, target="onnx-cpu", output=tmp_path_factory.mktemp("first") / "net", progress=True)
    shown = result._repr_html_()
    assert shown.count("<tr>") == 1 + len(result.manifest.passes)
    assert "<th style='text-align:left'>matched</th>" in shown
    assert "aten.linear.default</td><td style='text-align:left'>1</td>" in program._repr_html_()
    return result.artifact


def test_commands_from_python(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "in.npz", x=np.ones((3, 32), np.float32), labels=np.zeros(3, int))
    found = package.evaluate(artifact, inputs=tmp_path / "in.npz")
    assert found == optc_json(capsys, "eval", artifact, "--inputs", tmp_path / "in.npz")
    speed = package.bench(artifact, batch=2, samples=2)
    assert speed["inputs"] == {"x": ["float32", 2, 32]}
    assert package.inspect(artifact) == optc_json(capsys, "inspect", artifact)
    assert "<td style='text-align:left'>x</td>" in package.load(artifact)._repr_html_()
    with pytest.raises(UsageError, match="unknown key 'windws'"):
        package.evaluate(artifact, windws=3)
    with pytest.raises(UsageError, match="'samples' cannot be 0"):
        package.bench(artifact, samples=0)
    with pytest.raises(InputError):
        package.inspect(tmp_path / "none")
    for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME"):  # as on another machine
        monkeypatch.setenv(name, str(tmp_path / "elsewhere"))
    with pytest.raises(ArtifactError, match="was not made on this machine"):
        package.bench(artifact)


def test_quantize_and_train_from_python(tmp_path: Path) -> None:
    model = hf_folders.source("llama", 1)
    result = package.quantize(model, quant="rtn", output=tmp_path / "rtn", group_size=32)
    assert result.manifest.target == "vllm"
    with pytest.raises(UsageError, match="unknown key 'bit'"):
        package.train("qat", bit=4)
    with pytest.raises(UsageError, match="has no effect without QAT"):
        package.train("finetune", model=model, output=tmp_path / "t", bits=4)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("optc compile m --target o", ["onnx-cpu", "onnx-cuda"]),
        ("optc compile m --quant awq", ["awq", "awq+gptq"]),
        ("optc compile m --dtype f", ["fp32", "fp16"]),
        ("optc pla", ["plan"]),
    ],
)
def test_completion_in_a_shell(
    words: str, expected: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_OPTC_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    assert optc() == 0
    found = [line.partition(",")[2] for line in capsys.readouterr().out.splitlines()]
    assert sorted(found) == sorted(expected)
