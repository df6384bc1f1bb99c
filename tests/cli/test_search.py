"""`optc search`: what is tried, what is best of it, and going on with a search that was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from command_line import optc, optc_json
from once import short_example

from optc.compiler.artifact.folder import verify
from optc.request import from_python
from optc.searching import Limits, Tried, front, names_of

TEXT = "It was a dark night, and the ship lay at anchor. The captain had gone ashore. " * 6


def _tried(name: str, size: int, loss: float, speed: float | None = None) -> Tried:
    return Tried(name=name, outcome="made", size=size, loss=loss, speed=speed)


def test_the_front() -> None:
    rows = [
        _tried("none", 100, 0.0, 1.0),
        _tried("eight", 50, 0.01, 1.5),
        _tried("slow", 50, 0.01, 1.2),  # beaten by "eight"
        _tried("four", 30, 0.05, 2.0),
        _tried("worse", 40, 0.06, 1.9),  # beaten by "four"
        Tried(name="two", outcome="gate", why="KL", size=20),
    ]
    assert [item.name for item in front(rows, Limits())] == ["four", "eight", "none"]
    assert [item.name for item in front(rows, Limits(max_loss=0.02))] == ["eight", "none"]
    assert [item.name for item in front(rows, Limits(max_size=45e-6))] == ["four"]
    assert front(rows, Limits(max_loss=0.02, max_size=45e-6)) == []
    equal = [_tried("a", 10, 0.1), _tried("b", 10, 0.1)]
    assert front(equal, Limits()) == equal


def test_what_is_tried() -> None:
    onnx = from_python("onnx-cpu")
    names = dict(names_of(onnx, (), (4, 8)))
    assert list(names)[:3] == ["none", "rtn-4", "rtn-8"]
    assert names["gptq-8"] == {"quant": "gptq", "bits": 8}
    assert names["int8"] == {"quant": "int8"}
    assert "auto-4" not in names
    assert dict(names_of(onnx, ("auto",), (3,)))["auto-3"] == {"quant": "auto", "average_bits": 3.0}
    with pytest.raises(Exception, match="does not take the method 'mxfp4'"):
        names_of(onnx, ("mxfp4",), (4,))


def test_a_search_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text, out = tmp_path / "book.txt", tmp_path / "out"
    text.write_text(TEXT)
    model = short_example(1)
    common = ("search", model, "--target", "onnx-cpu", "--text", text, "-o", out, "--methods", "rtn", "--bits", "4")
    limits = ("--max-kl", 1e-3, "--max-size", 4, "--samples", 1)  # no 4 bits pass this gate
    found = optc_json(capsys, *common, *limits)
    outcomes = {row["name"]: row["outcome"] for row in found["tried"]}
    assert outcomes == {"none": "made", "rtn-4": "gate"}
    plain, _ = found["tried"]
    assert plain["size"] == verify(out / "none").weight_bytes
    assert abs(plain["loss"]) < 1e-4  # fp32 beside fp32: the same numbers but for the order of sums
    assert plain["kl"] < 1e-6
    assert (plain["size"] > 4e6, found["front"]) == (True, [])
    kept = json.loads((out / "search.json").read_text())
    assert list(kept["tried"]) == list(outcomes)

    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("everything is known")

    monkeypatch.setattr("optc.api.compile", never)
    again = optc_json(capsys, *common, *limits[:2], *limits[4:])
    assert again["front"] == ["none"]
    assert again["tried"] == found["tried"]
    assert optc(*common, *limits[4:]) == 3
    assert "the folder is of another search" in capsys.readouterr().err


def test_what_makes_no_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, vocab_size=20)).save_pretrained(tmp_path / "bert")
    (tmp_path / "text").write_text("a")
    given = ("--target", "onnx-cpu", "--text", tmp_path / "text", "-o", tmp_path / "out")
    assert optc("search", tmp_path / "bert", *given) == 4
    assert "this model makes none" in capsys.readouterr().err


def test_tries_are_read_back() -> None:
    row = _tried("a", 10, 0.1, 2.0)
    assert msgspec.json.decode(msgspec.json.encode(row), type=Tried) == row
