"""Passes of one's own in a recipe, by `module:Class`, before or after one of the recipe's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import optc
from optc.compiler.diagnostics import NoMatchError, UsageError
from optc.request import from_python
from optc.resolving import recipe_steps, resolve

_SOURCE = """
from dataclasses import dataclass
from typing import ClassVar

import torch

from optc import Match, Pass, PassContext, PassResult, Program, Rule, apply_rules
from optc.compiler.ir.surgery import replace_call

RELU = torch.ops.aten.relu.default


class _Twice(Rule):
    def match(self, program, node):
        inner = node.args[0] if node.target is RELU else None
        return Match(node) if getattr(inner, "target", None) is RELU else None

    def rewrite(self, program, match):
        replace_call(program, match.node, RELU, match.node.args[0].args)


@dataclass(frozen=True, kw_only=True)
class FuseRelu(Pass):
    name: ClassVar[str] = "fuse-relu"
    strength: int = 1

    def run(self, program: Program, context: PassContext) -> PassResult:
        return apply_rules(program, [_Twice()])


class NoPass:
    pass
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "passes_of_mine.py").write_text(_SOURCE)
    monkeypatch.chdir(tmp_path)


def _names(*insertions: str, **options: Any) -> list[str]:
    request = from_python("onnx-cpu", output="out", insert_pass=list(insertions), **options)
    return [str(step.rewrite) for step in recipe_steps(resolve(request), "module")]


def test_places() -> None:
    plain = _names()
    found = _names("before:legalize_ort=passes_of_mine:FuseRelu", "after:fuse-norm=passes_of_mine:FuseRelu")
    assert found.index("fuse-relu") == plain.index("fuse-norm") + 1
    assert found[found.index("legalize-ort") - 1] == "fuse-relu"
    assert [name for name in found if name != "fuse-relu"] == plain
    assert "fuse-relu(strength=3)" in _names(
        "after:fuse-norm=passes_of_mine:FuseRelu", pass_option=["fuse-relu.strength=3"]
    )
    assert _names(passes="passes_of_mine:FuseRelu") == ["fuse-relu"]


def test_it_runs_and_is_requested(tmp_path: Path) -> None:
    def compile(module: torch.nn.Module, name: str) -> list[tuple[str, int]]:
        own = ["before:legalize-ort=passes_of_mine:FuseRelu"]
        x = (torch.randn(2, 4),)
        result = optc.compile(module, example_inputs=x, target="onnx-cpu", output=tmp_path / name, insert_pass=own)
        return [(row.name, row.matched) for row in result.manifest.passes]

    twice = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.ReLU())
    assert ("fuse-relu", 1) in compile(twice, "twice")
    with pytest.raises(NoMatchError, match="pass 'fuse-relu' matched nothing"):
        compile(torch.nn.Linear(4, 4), "once")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("fuse-norm=passes_of_mine:FuseRelu", "cannot read --insert-pass"),
        ("after:fuse-norm", "cannot read --insert-pass"),
        ("after:fuse-nrm=passes_of_mine:FuseRelu", "unknown pass of this recipe 'fuse-nrm'"),
        ("after:fuse-norm=passes_of_mine:Nothing", "the pass 'passes_of_mine:Nothing' cannot be imported"),
        ("after:fuse-norm=no_module_here:FuseRelu", "the pass 'no_module_here:FuseRelu' cannot be imported"),
        ("after:fuse-norm=passes_of_mine:NoPass", "'passes_of_mine:NoPass' is not a pass"),
        ("after:fuse-norm=fuse-nrm", "unknown pass 'fuse-nrm'"),
    ],
)
def test_what_is_refused(text: str, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        _names(text)
