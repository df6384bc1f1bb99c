"""The commands in README.md and docs/: all of them parse, requests resolve, and README's are run on the example model."""

from __future__ import annotations

import re
import shlex
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import optc as call
from conftest import EXAMPLE, ROOT
from once import example_artifact, once, short_example
from pages import commands

import optc
from optc.cli.main import cli, normalize

SMALL = {  # README's commands as they stand, and these flags, which only make them short
    "run": "--max-new-tokens 4",
    "eval": "--windows 1",
    "bench": "--samples 2 --warmup 1 --new-tokens 4 --prompt-length 8",
    "quantize": "--calibration-samples 4 --calibration-seq-len 64",
    "train": "--set max_steps=1 --set seq_len=64 --set batch_size=2",
}
ELSEWHERE = {  # slow commands, and one that does not end, which these files run
    "compile examples/fiction-3m --target inductor-cpu -o out/fiction-pt2": "runtime/sessions/test_artifacts.py",
    "compile examples/fiction-3m --target executorch -o out/phone": "export/test_executorch.py",
    "compile examples/fiction-3m --target inductor-cpu --kv-cache paged -o out/fiction-paged": "cli/test_serve.py",
    "serve out/fiction-paged": "cli/test_serve.py",
}


README = list(commands(ROOT / "README.md"))
ALL = list(dict.fromkeys(commands(ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))))


def test_commands_are_found() -> None:
    assert (len(README), len(ALL)) >= (18, 40)
    assert set(ELSEWHERE) <= set(README)


@pytest.mark.parametrize("command", ALL)
def test_the_command_parses(command: str) -> None:
    name, *rest = normalize(shlex.split(command))
    with cli.make_context("optc", [name]) as context:
        found = cli.get_command(context, name)
        assert found is not None
        found.make_context(name, rest)


REQUESTS = [item for item in ALL if item.startswith(("compile ", "plan MODEL"))]
MADE = re.compile(r"--(medusa|draft) out/")
HEADS = [item for item in REQUESTS if MADE.search(item)]  # what drafts is there: cli/test_speculative.py


@pytest.mark.parametrize("command", [item for item in REQUESTS if item not in HEADS])
def test_the_request_is_one_that_its_target_takes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, _model, *rest = shlex.split(
        re.sub(r" (-o|--base|--expose-hidden|--calibration) \S+", "", command)
    )  # of compile alone
    filled = {"TARGET": "onnx-cpu", "METHOD": "rtn", "PATTERN": "*.down_proj.*"}
    refused = "--quant fp8" in command  # which its line in the docs says
    assert call("plan", str(EXAMPLE), *(filled.get(item, item) for item in rest)) == (4 if refused else 0)
    assert not refused or "nearest here" in capsys.readouterr().err


@pytest.fixture(scope="module")
def place() -> Path:
    """A folder like the repository's, with what README's first command makes."""

    def make(folder: Path) -> None:
        (folder / "examples").symlink_to(ROOT / "examples")
        shutil.copytree(example_artifact("onnx-cpu", quant="rtn"), folder / "out" / "fiction-onnx")

    return once("readme", make)


def _run(place: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    name, *rest = shlex.split(command)
    small = "" if "--embed" in rest else SMALL.get(name, "")
    assert call(name, *rest, *small.split()) == 0


@pytest.mark.slow
def test_readme_runs(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    checks: dict[str, Callable[[str], bool]] = {
        "run": lambda text: len(text.split()) >= 1,
        "eval": lambda text: "top-1 agreement" in text,
        "verify": lambda text: "intact" in text,
        "diff": lambda text: "nodes " in text,
    }
    first, *rest = [command for command in README if command not in ELSEWHERE]
    assert first == "compile examples/fiction-3m --target onnx-cpu --quant rtn -o out/fiction-onnx"
    for command in rest:
        _run(place, command, monkeypatch)
        shown = capsys.readouterr().out
        name = command.split()[0]
        assert name not in checks or "--compare" in command or checks[name](shown), command


@pytest.mark.parametrize("command", ELSEWHERE)
def test_slow_commands_have_a_test(command: str) -> None:
    target = re.search(r"--target (\S+)|serve out/(\S+)", command)
    assert target is not None
    assert f'"{target[1] or target[2]}"' in (ROOT / "tests" / ELSEWHERE[command]).read_text()


PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
CODE = {
    (file.name, number): code
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for number, code in enumerate(PYTHON.findall(file.read_text()))
}
HERE = [("README.md", 0), ("compile.md", 0), ("deploy.md", 0), ("quantize.md", 0), ("write-a-pass.md", 0)]
HERE += [("write-a-pass.md", 1)]
CODE_ELSEWHERE = {  # files that run all code of a page
    "cuda.md": "gpu/test_docs_cuda.py",
    "embeddings.md": "export/test_embeddings.py",
    "encoder-decoder.md": "export/test_encoder_decoder.py",
    "serve.md": "cli/test_serve.py",
    "torch-compile.md": "export/test_torch_compile.py",
}


def test_all_code_is_run() -> None:
    assert set(HERE) | {key for key in CODE if key[0] in CODE_ELSEWHERE} == set(CODE)
    for page, test in CODE_ELSEWHERE.items():
        text = (ROOT / "tests" / test).read_text()
        assert f'"docs" / "{page}"' in text, test
        assert "exec(" in text or '"-c", script' in text, test


def test_code_about_modules_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block by itself, in one folder: what one writes another loads."""
    monkeypatch.chdir(tmp_path)
    found: dict[str, dict[str, object]] = {}
    for name in ("compile.md", "deploy.md", "quantize.md"):
        found[name] = {}
        exec(compile(CODE[name, 0], name, "exec"), found[name])
    assert np.shape(found["deploy.md"]["scores"]) == (3, 4)
    assert optc.inspect("out/net-int8")["quantization"]["method"] == "gptq"


def test_the_pass_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The second block runs the pass of the first on a module of the reader's."""
    module = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.ReLU())
    scope: dict[str, object] = {"module": module, "example": torch.randn(2, 3)}
    for number in (0, 1):
        exec(compile(CODE["write-a-pass.md", number], "write-a-pass.md", "exec", dont_inherit=True), scope)
    assert capsys.readouterr().out == "1 0.0\n"


@pytest.mark.slow
def test_the_code_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a model of fewer layers, and with the first pages of the book."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "fiction-3m").symlink_to(short_example(1))
    (tmp_path / "examples" / "book.txt").write_text((ROOT / "examples" / "book.txt").read_text()[:8000])
    scope: dict[str, object] = {}
    exec(compile(CODE["README.md", 0], "README.md", "exec"), scope)
    *_text, perplexity = capsys.readouterr().out.splitlines()
    assert float(perplexity) > 1
    assert isinstance(scope["program"], optc.Program)
    assert isinstance(scope["result"], optc.CompileResult)


def test_the_extras_are_those_of_the_package() -> None:
    """README names each extra that a user may want."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (line,) = [line for line in (ROOT / "README.md").read_text().splitlines() if "Extras:" in line]
    named = set(re.findall(r"`([a-z-]+)`", line.partition("Extras:")[2])) - {
        "onnx-cpu",
        "inductor-cpu",
        "inductor-cuda",
    }
    assert named - {"vllm", "trtllm"} == extras.keys() - {"dev", "mutants", "test-oracles"}
