"""The commands in README.md and docs/: all of them parse, requests resolve, and README's are run on the example model."""

from __future__ import annotations

import re
import shlex
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from command_line import optc as call
from conftest import EXAMPLE, ROOT
from once import example_artifact, once

import optc
from optc.cli.main import cli, normalize

FENCED = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
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


def commands(*files: Path) -> Iterator[str]:
    """What stands behind `optc` in code blocks: without comments, with what is optional, with the first of alternatives."""
    for file in files:
        for block in FENCED.findall(file.read_text()):
            for line in block.splitlines():
                line = re.sub(r"\s#.*", "", line).strip().removeprefix("$ ")
                line = re.sub(r"\[([^]|]*)\|?[^]]*\]", r"\1", line)
                line = re.sub(r"(\S+?)\|\S+", r"\1", line)
                for part in line.split(";"):
                    if found := re.match(r"(?:torchrun .* -m )?optc (.*)", part.strip()):
                        yield re.sub(r"\s+", " ", found[1])


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


def test_code_about_modules_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block by itself, in one folder: what one writes another loads."""
    monkeypatch.chdir(tmp_path)
    blocks = {
        name: next(code for code in PYTHON.findall((ROOT / "docs" / name).read_text()) if wanted in code)
        for name, wanted in (("compile.md", "torch.nn"), ("deploy.md", "optc.load"), ("quantize.md", "calibration="))
    }
    found: dict[str, dict[str, object]] = {name: {} for name in blocks}
    for name, code in blocks.items():
        exec(compile(code, name, "exec"), found[name])
    assert np.shape(found["deploy.md"]["scores"]) == (3, 4)
    assert optc.inspect("out/net-int8")["quantization"]["method"] == "gptq"


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
