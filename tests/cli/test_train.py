"""optc train through the command line, and the whole way of QAT: train, compile, evaluate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from artifacts import captured_folder, quick_artifact
from command_line import optc, optc_json
from conftest import EXAMPLE, ROOT
from training_runs import small_model, token_file

import optc as package

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("start")
    return small_model(folder / "model"), token_file(folder / "text.jsonl")


@pytest.fixture(scope="module")
def recipe(start: tuple[Path, Path]) -> Path:
    """A recipe file that changes one that ships."""
    path = start[0].parent / "recipe.yaml"
    path.write_text(
        f"recipe: finetune\nmodel: {start[0]}\nbatch_size: 4\nseq_len: 32\ndevice: cpu\nmax_steps: 4\n"
        f"data: {{text: [{start[1]}]}}\noptimizer: {{lr: 1e-2}}\nsaving: {{every: 2}}\n"
    )
    return path


def test_a_recipe_file_trains(recipe: Path, tmp_path: Path, capsys: Capture) -> None:
    assert optc("train", recipe, "--max_steps", 3, "--set", "optimizer.lr=3e-3", "-o", tmp_path / "out", "--json") == 0
    found = capsys.readouterr()
    result = json.loads(found.out)
    assert result["steps"] == 3
    assert result["config"]["optimizer"]["lr"] == 3e-3
    # No bar without a terminal: a line at the start and the end, and others where ten seconds pass.
    begun, first, *_ = found.err.splitlines()
    assert begun == "training: begun"
    assert first == f"training: step 0 of 3; log and checkpoints in {tmp_path / 'out'}.run"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "log.jsonl",
        "model.safetensors",
        "report.html",
        "train.json",
    ]


def test_training_from_python(recipe: Path, tmp_path: Path, capsys: Capture) -> None:
    """The run of the command, step for step."""
    given = ("--max_steps", 2, "--set", "optimizer.lr=3e-3")
    assert optc("train", recipe, *given, "-o", tmp_path / "command", "--json") == 0
    expected = json.loads(capsys.readouterr().out)
    steps: list[int] = []
    result = package.train(
        recipe,
        output=tmp_path / "python",
        max_steps=2,
        set=["optimizer.lr=3e-3"],
        progress=True,
        on_step=lambda record: steps.append(record.step),
    )
    assert (result.steps, steps) == (2, [1, 2])
    assert (result.first_loss, result.last_loss) == (expected["first_loss"], expected["last_loss"])
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("command", "python")]
    assert written[0] == written[1]
    assert "training: step 0 of 2" in capsys.readouterr().err


def test_flags_win_over_the_recipe_that_ships(start: tuple[Path, Path], tmp_path: Path, capsys: Capture) -> None:
    flags = ["--recipe", "finetune", "--model", start[0], "--text", start[1], "--text", start[1]]
    flags += [
        "--max-steps",
        1,
        "--seed",
        3,
        "--batch-size",
        2,
        "--lr",
        "1e-4",
        "--save-every",
        7,
        "--set",
        "seq_len=32",
    ]
    flags += ["--validation", start[1]]
    assert optc("train", *flags, "-o", tmp_path / "out", "--json") == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert (config["seed"], config["batch_size"], config["optimizer"]["lr"]) == (3, 2, 1e-4)
    assert (config["saving"]["every"], config["validation"]["text"]) == (7, [str(start[1])])
    assert config["data"]["text"] == [str(start[1])] * 2
    assert optc("train", *flags, "-o", tmp_path / "out") == 3
    assert "the output exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ([], 2, "give one recipe"),
        (["a.yaml", "--recipe", "qat"], 2, "give one recipe, not two"),
        (["--recipe", "qatt"], 2, "did you mean 'qat'?"),
        (["--recipe", "finetune", "--set", "optimizer.learning=1"], 2, "unknown key 'optimizer.learning'"),
        (["--recipe", "finetune"], 2, "no model given"),
        (["--recipe", "finetune", "--model", "none", "--text", "none"], 2, "no output given"),
        (["--recipe", "finetune", "--bits", "4"], 2, "--bits has no effect without QAT"),
        (
            ["--recipe", "qat", "--epochs", "2", "--max-steps", "3"],
            2,
            "--epochs and --max-steps are two lengths of a run",
        ),
        (["--recipe", "finetune", "--group-size", "4"], 2, "--group-size has no effect without QAT"),
        (
            ["--recipe", "finetune", "--model", "none", "--text", "none", "-o", "OUT"],
            3,
            "the model folder does not exist",
        ),
        (
            ["--recipe", "finetune", "--model", EXAMPLE, "--text", "none", "-o", "OUT"],
            3,
            "the training text does not exist",
        ),
        (["--recipe", "finetune", "--model", EXAMPLE, "-o", "OUT"], 3, "no training text"),
    ],
)
def test_errors(flags: list[Any], code: int, message: str, tmp_path: Path, capsys: Capture) -> None:
    given = [tmp_path / "out" if flag == "OUT" else flag for flag in flags]
    assert optc("train", *given) == code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_qat_is_trained_compiled_and_better_than_rounding(tmp_path: Path, capsys: Capture) -> None:
    """Few steps on one half of the book, judged on the other half."""
    book = (ROOT / "examples" / "book.txt").read_text()
    middle = book.index("\n\n", len(book) // 2)
    (tmp_path / "train.txt").write_text(book[:middle])
    (tmp_path / "unseen.txt").write_text(book[middle:])
    grid = ("--bits", 3, "--group-size", 32)
    small = ("--set", "batch_size=4", "--set", "seq_len=128", "--set", "optimizer.lr=2e-4", "--max-steps", 12)
    learned = ("--recipe", "qat", "--model", EXAMPLE, "--text", tmp_path / "train.txt", *grid, *small)
    assert optc("train", *learned, "-o", tmp_path / "qat") == 0
    assert optc("compile", tmp_path / "qat", "--target", "onnx-cpu", "-o", tmp_path / "trained") == 0
    quick_artifact(
        "onnx-cpu", captured_folder(EXAMPLE), tmp_path / "rounded", source=EXAMPLE, quant="rtn", bits=3, group_size=32
    )
    capsys.readouterr()
    nll = {}
    for name in ("trained", "rounded"):
        text = ("--text", tmp_path / "unseen.txt", "--no-reference")
        nll[name] = optc_json(capsys, "eval", tmp_path / name, *text)["perplexity"]
    assert nll["trained"] < nll["rounded"]


def test_threads_sleep_while_they_wait(
    start: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the user has said otherwise; the command has not loaded torch before, which reads it once."""
    missing = (
        "train",
        "--recipe",
        "finetune",
        "--model",
        tmp_path / "none",
        "--text",
        start[1],
        "-o",
        tmp_path / "out",
    )
    for given, expected in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        monkeypatch.setenv("OMP_WAIT_POLICY", given or "")  # so that the test's own value comes back
        if given is None:
            monkeypatch.delenv("OMP_WAIT_POLICY")
        assert optc(*missing) == 3
        assert os.environ["OMP_WAIT_POLICY"] == expected
    asked = "import sys, optc.cli.train, optc.training.config, optc.training.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", asked], check=False).returncode == 0
