"""Calibrated quantization from the command line, on the example model: it works alone, and bad input is named."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from command_line import optc
from conftest import EXAMPLE
from hf_folders import source
from once import short_example

from optc.compiler.capture import capture_pretrained

Capture = pytest.CaptureFixture[str]
QUICK = ("--calibration-samples", "8", "--calibration-seq-len", "64")


def test_awq_with_nothing_else(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    model = short_example(layers=1)
    code = optc("compile", model, "--target", "onnx-cpu", "--quant", "awq", *QUICK, "-o", out, "--json")
    result = json.loads(capsys.readouterr().out)
    assert code == 0
    names = [row["name"] for row in result["passes"]]
    assert names.index("scale-awq") < names.index("quantize-clip") < names.index("static-kv-cache")
    scale = next(row for row in result["passes"] if row["name"] == "scale-awq")
    assert scale["matched"] == 4
    assert scale["drift"]["kl"] < 1e-9
    summary = result["quantization"]
    assert (summary["method"], summary["bits"], summary["linears"]) == (
        "rtn+clip",
        [4, 8],
        5,
    )  # q, k, v and gate, up are merged; the head, tied, is rounded to 8 bits
    assert summary["ratio_to_ideal"] <= 1.02
    manifest = json.loads((out / "manifest.json").read_text())
    clip = next(row for row in manifest["passes"] if row["name"] == "quantize-clip")
    assert len(clip["linears"]) == 7
    assert all(row["error"] < row["error_rtn"] for row in clip["linears"])
    assert "built-in text" in " ".join(clip["notes"])


@functools.cache
def _captured() -> Any:
    return capture_pretrained(EXAMPLE)


def _captured_once(model: Path, **options: Any) -> Any:
    """The example's capture, made once: these compiles end before they use it."""
    return _captured()


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        ("few words", "a.txt", "too short"),
        ('{"tokens": [1, 2, 99999]}\n' * 99, "a.jsonl", "99999 is outside the vocabulary"),
        ("{oops", "a.jsonl", "is not JSON"),
        (None, "a.txt", "calibration file"),
    ],
)
def test_bad_calibration_files(
    content: str | None,
    name: str,
    words: str,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("optc.capturing.capture_pretrained", _captured_once)
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    out = tmp_path / "out"
    code = optc(
        "compile",
        EXAMPLE,
        "--target",
        "onnx-cpu",
        "--quant",
        "gptq",
        "--calibration",
        path,
        *QUICK,
        "-o",
        out,
    )
    captured = capsys.readouterr()
    assert code == 3
    assert words in captured.err
    assert str(path) in captured.err
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--quant", "gptqq"), 2, "did you mean 'gptq'"),
        (("--quant", "int8", "--bits", "4"), 2, "does not support --bits 4"),
        (("--quant", "auto", "--bits", "4"), 2, "use --average-bits"),
        (("--quant", "gptq", "--average-bits", "3"), 2, "--quant auto"),
        (("--quant", "gptq", "--calibration-samples", "0"), 2, "give an integer from 1"),
        (("--quant", "fp8"), 4, "does not take"),
    ],
)
def test_contradictions(flags: tuple[str, ...], code: int, words: str, tmp_path: Path, capsys: Capture) -> None:
    assert optc("compile", EXAMPLE, "--target", "onnx-cpu", *flags, "-o", tmp_path / "out") == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_zero_is_a_value(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    flags = ("--quant", "rtn", "--bits", "8", "--group-size", "32", "--accuracy-level", "0")
    assert optc("compile", source("llama"), "--target", "onnx-cpu", *flags, "-o", out) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert [row["name"] for row in manifest["passes"]][-1] == "legalize-ort"  # and no round-activations behind it
