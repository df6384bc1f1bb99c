"""The Pipeline: gate, no-op detection, verification, dumps and resume."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from families import make_model
from torch.fx import Node

from optc.compiler.capture import capture_model, capture_module
from optc.compiler.diagnostics import GateError, InputError, NoMatchError
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import replace_call
from optc.compiler.ir.verification import VerificationError
from optc.compiler.pipeline.pipeline import Pipeline, PipelineOptions
from optc.compiler.rewriting.passes import Match, Miss, Pass, PassContext, PassResult, Rule, apply_rules
from optc.compiler.target.target import Step

SILU = torch.ops.aten.silu.default


@dataclass(frozen=True)
class _Replace(Rule):
    """silu -> another operator; layers before `first` are near-misses."""

    target: object
    first: int = 0

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        if node.target is not SILU:
            return None
        index = program.calls(SILU).index(node)
        return Match(node) if index >= self.first else Miss(node.name, "too early")

    def rewrite(self, program: Program, match: Match) -> None:
        replace_call(program, match.node, self.target, (match.node.args[0],))


@dataclass(frozen=True, kw_only=True)
class WrongPass(Pass):
    """silu(x) -> relu(x): wrong on purpose"""

    name: ClassVar[str] = "wrong-pass"

    def run(self, program: Program, context: PassContext) -> PassResult:
        return apply_rules(program, [_Replace(torch.ops.aten.relu.default, first=0)])


@dataclass(frozen=True, kw_only=True)
class NeverPass(Pass):
    """silu(x) -> silu(x), but every site is a near-miss"""

    name: ClassVar[str] = "never-pass"
    first: int = 99

    def run(self, program: Program, context: PassContext) -> PassResult:
        return apply_rules(program, [_Replace(SILU, first=self.first)])


@dataclass(frozen=True, kw_only=True)
class BreakPass(Pass):
    """Drops an input from the contract: malformed on purpose"""

    name: ClassVar[str] = "break-pass"

    def run(self, program: Program, context: PassContext) -> PassResult:
        return PassResult(program.with_contract(inputs=program.contract.inputs[:1]), 1, 1)


@pytest.fixture(scope="module")
def llama() -> Program:
    return capture_model(make_model("llama"))


def test_wrong_pass_is_caught_and_named(llama: Program) -> None:
    with pytest.raises(GateError) as caught:
        Pipeline([WrongPass()]).run(llama)
    assert caught.value.exit_code == 5
    assert "wrong-pass" in caught.value.what
    # The first layer's attention sees only the embedding; the second is the one that moved.
    assert caught.value.where is not None
    assert caught.value.where.startswith("layer 1 (model.layers.1.self_attn)")


def test_pass_that_matches_nothing_lists_near_misses(llama: Program) -> None:
    with pytest.raises(NoMatchError) as caught:
        Pipeline([NeverPass()]).run(llama)
    assert caught.value.exit_code == 6
    assert "too early" in str(caught.value.where)
    for allowed in (Pipeline([Step(NeverPass(), optional=True)]).run(llama),
                    Pipeline([NeverPass()]).run(llama, PipelineOptions(allow_noop=True))):  # fmt: skip
        assert [(row.matched, row.candidates) for row in allowed.records] == [(0, 2)]
        assert allowed.records[0].max_abs_diff is None


def test_malformed_program_is_caught(llama: Program) -> None:
    with pytest.raises(VerificationError, match="break-pass") as caught:
        Pipeline([BreakPass()]).run(llama)
    assert "2 graph inputs, 1 in the contract" in str(caught.value)


def test_records_stages_and_dumps(llama: Program, tmp_path: Path) -> None:
    result = Pipeline([NeverPass(first=1)]).run(llama, PipelineOptions(dump_ir=tmp_path / "ir"))
    row = result.records[0]
    assert (row.name, row.matched, row.candidates, row.max_abs_diff) == ("never-pass", 1, 2, 0.0)
    assert row.options == {"first": 1}
    assert result.program.contract.passes == ("never-pass(first=1)",)
    assert sorted(path.name for path in (tmp_path / "ir").iterdir()) == [
        "00-capture.txt",
        "01-never-pass.txt",
    ]
    assert (tmp_path / "ir" / "01-never-pass.txt").read_text() == result.stages[1].text


def test_input_program_is_unchanged(llama: Program) -> None:
    before = str(llama.graph)
    Pipeline([NeverPass(first=0)]).run(llama)
    assert str(llama.graph) == before


def test_resume_skips_finished_stages(
    llama: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [NeverPass(first=1), NeverPass(first=0)]
    options = PipelineOptions(work_dir=tmp_path)
    first = Pipeline(steps).run(llama, options)
    ran: list[int] = []
    original = NeverPass.run

    def counted(self: NeverPass, program: Program, context: PassContext) -> PassResult:
        ran.append(self.first)
        return original(self, program, context)

    monkeypatch.setattr(NeverPass, "run", counted)
    again = Pipeline(steps).run(llama, options)
    assert ran == []
    ids, positions = torch.arange(6)[None], torch.arange(6)[None]
    assert torch.equal(again.program(ids, positions), first.program(ids, positions))
    assert [row.name for row in again.records] == [row.name for row in first.records]
    Pipeline([steps[0], NeverPass(first=1)]).run(llama, options)
    assert ran == [1]  # only the step whose options changed


def test_a_step_for_other_programs_is_no_step(llama: Program, tmp_path: Path) -> None:
    """It leaves no record and no stage, and a rerun goes on behind it."""
    seen: list[str] = []

    def never(program: Program) -> bool:
        seen.append(program.contract.passes[-1])
        return False

    steps = [Step(NeverPass(first=1)), Step(NeverPass(), when=never), Step(NeverPass(first=0))]
    options = PipelineOptions(work_dir=tmp_path)
    for _ in range(2):
        result = Pipeline(steps).run(llama, options)
        assert [row.options for row in result.records] == [{"first": 1}, {"first": 0}]
        assert [stage.number for stage in result.stages] == [0, 1, 2]
    assert seen == ["never-pass(first=1)"] * 2
    assert len(list(tmp_path.iterdir())) == 2


def test_damaged_stage_is_named(llama: Program, tmp_path: Path) -> None:
    options = PipelineOptions(work_dir=tmp_path)
    Pipeline([NeverPass(first=0)]).run(llama, options)
    (record,) = tmp_path.glob("*/record.json")
    record.write_text("{")
    with pytest.raises(InputError, match=r"record\.json"):
        Pipeline([NeverPass(first=0)]).run(llama, options)


def test_modules_are_gated_on_their_example_inputs() -> None:
    program = capture_module(
        torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.SiLU()),
        (torch.ones(2, 3),),
        dynamic={"input_0": {0: "rows"}},
    )
    with pytest.raises(GateError, match="wrong-pass"):
        Pipeline([WrongPass()]).run(program)
