"""The Pipeline: gate, no-op detection, verification, dumps and resume."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from families import make_model
from torch import Tensor
from torch.fx import Node

from optc.compiler.capture import capture_model, capture_module
from optc.compiler.diagnostics import ArtifactError, GateError, NoMatchError, TargetError
from optc.compiler.execution.probe import random_probe
from optc.compiler.execution.stage_driver import StageRun
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import insert_call, replace_call, set_weight
from optc.compiler.ir.verification import VerificationError
from optc.compiler.pipeline.gate import Limits
from optc.compiler.pipeline.pipeline import Pipeline, PipelineOptions
from optc.compiler.rewriting.budget import Budget
from optc.compiler.rewriting.passes import Match, Miss, Pass, PassContext, PassResult, Rule, apply_rules
from optc.compiler.target.target import KV_CACHE, Step
from optc.passes.kv_cache.static import StaticKVCache
from optc.passes.quantization.arithmetic.budgets import weight_budget
from optc.passes.quantization.rtn import QuantizeRtn

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
    for allowed in (
        Pipeline([Step(NeverPass(), optional=True)]).run(llama),
        Pipeline([NeverPass()]).run(llama, PipelineOptions(allow_noop=True)),
    ):
        assert [(row.matched, row.candidates) for row in allowed.records] == [(0, 2)]
        assert allowed.records[0].drift is None


def test_a_target_that_needs_a_step_refuses_the_model(llama: Program) -> None:
    """Exit 4, not 6: nobody asked for the pass. The second KV cache finds one there."""
    steps = [Step(StaticKVCache()), Step(StaticKVCache(), needs=KV_CACHE)]
    with pytest.raises(TargetError, match="the target needs a KV cache, which this model does not take") as caught:
        Pipeline(steps).run(llama)
    assert caught.value.where == "program: it already has a linear KV cache"


def test_attention_that_is_left_as_it_was_spelled_is_named() -> None:
    """Bloom's attention is captured as it is spelled; no KV cache reads that before it is fused."""
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    program = capture_model(BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=64)))
    (miss,) = StaticKVCache().run(program, PassContext()).misses
    assert "softmax" in miss.node
    assert "biases of keys (ALiBi), and nothing else" in miss.reason


def test_malformed_program_is_caught(llama: Program) -> None:
    with pytest.raises(VerificationError, match="break-pass") as caught:
        Pipeline([BreakPass()]).run(llama)
    assert "2 graph inputs, 1 in the contract" in str(caught.value)


def test_records_stages_and_dumps(llama: Program, tmp_path: Path) -> None:
    result = Pipeline([NeverPass(first=1)]).run(llama, PipelineOptions(dump_ir=tmp_path / "ir"))
    row = result.records[0]
    assert (row.name, row.matched, row.candidates) == ("never-pass", 1, 2)
    assert row.drift is not None
    assert (row.drift.max_abs_diff, row.drift.kl, row.drift.top1_agreement) == (0.0, 0.0, 1.0)
    assert row.since_capture == row.drift
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


def test_resume_skips_finished_stages(llama: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    with pytest.raises(ArtifactError, match=r"record\.json"):
        Pipeline([NeverPass(first=0)]).run(llama, options)


def test_modules_are_gated_on_their_example_inputs() -> None:
    program = capture_module(
        torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.SiLU()),
        (torch.ones(2, 3),),
        dynamic={"input_0": {0: "rows"}},
    )
    with pytest.raises(GateError, match="wrong-pass"):
        Pipeline([WrongPass()]).run(program)


@dataclass(frozen=True, kw_only=True)
class Lose(Pass):
    """linear(x, W)  ->  linear(x, W * factor), of the last linear alone: a loss of any size"""

    name: ClassVar[str] = "lose"
    lossy: ClassVar[bool] = True
    factor: float = 1.0
    kl: float = 1e-3

    def budget(self, before: Program) -> Budget:
        return Budget(kl=self.kl, top1=0.5, perplexity=0.1, relative=0.1, cosine=0.9)

    def run(self, program: Program, context: PassContext) -> PassResult:
        edited = program.clone()
        name = "lm_head.weight"
        set_weight(edited, name, edited.weight(name).detach() * self.factor)
        return PassResult(edited.changed(), 1, 1)


def test_losses_add_up_to_the_sum(llama: Program) -> None:
    """Every step is within its budget; all of them point one way and are more than independent ones would be."""
    step = Pipeline([Lose(factor=1.02, kl=1.0)]).run(llama).records[0]
    assert step.drift is not None
    assert step.drift.relative_error == pytest.approx(0.02, rel=1e-3)
    cost = float(step.drift.kl or 0.0)
    result = Pipeline([Lose(factor=1.02, kl=1.5 * cost)] * 1).run(llama)
    assert result.records[0].since_capture == result.records[0].drift
    with pytest.raises(GateError) as caught:
        Pipeline([Lose(factor=1.02, kl=1.5 * cost)] * 3).run(llama)
    assert caught.value.what == "pass 'lose' failed the numerics gate: too much is lost since the capture"
    assert str(caught.value.why).startswith("KL ")


def test_both_comparisons_are_recorded(llama: Program) -> None:
    first, second = Pipeline([Lose(factor=1.02, kl=1.0), Lose(factor=1 / 1.02, kl=1.0)]).run(llama).records
    assert first.since_capture == first.drift
    assert first.allowed is not None
    assert second.allowed is not None
    assert (first.allowed.kl, second.allowed.kl) == (1.0, 2.0)
    assert second.drift is not None
    assert second.since_capture is not None
    assert second.drift.relative_error == pytest.approx(0.02 / 1.02, rel=1e-3)
    assert float(second.since_capture.relative_error or 0.0) < 1e-6


def test_the_sum_stands_where_no_number_changes(llama: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not measured again, and is what measuring again would give; a loss behind it counts."""
    steps = [Lose(factor=1.02, kl=1.0), NeverPass(first=0), Lose(factor=1.02, kl=1.0)]
    quick = [record.since_capture for record in Pipeline(steps).run(llama).records]
    monkeypatch.setattr(StageRun, "equals", lambda self, other: False)
    assert quick == [record.since_capture for record in Pipeline(steps).run(llama).records]
    assert quick[0] == quick[1] != quick[2]


def test_the_sum_is_kept_across_a_resume(llama: Program, tmp_path: Path) -> None:
    """The capture and the budgets of finished stages count in a later run as they did in the first."""
    steps = [Lose(factor=1.02, kl=1.0), Lose(factor=1.02, kl=1.0)]
    whole = Pipeline(steps).run(llama).records[-1]
    options = PipelineOptions(work_dir=tmp_path)
    Pipeline(steps[:1]).run(llama, options)
    resumed = Pipeline(steps).run(llama, options).records[-1]
    assert (resumed.drift, resumed.since_capture) == (whole.drift, whole.since_capture)
    limits = Limits(kl=1.01 * float((whole.drift and whole.drift.kl) or 0.0))
    with pytest.raises(GateError, match="since the capture"):
        Pipeline([*steps, Lose(factor=1.02, kl=1.0)]).run(llama, PipelineOptions(work_dir=tmp_path, limits=limits))


@dataclass(frozen=True, kw_only=True)
class Negate(Pass):
    """gelu(x)  ->  -x"""

    name: ClassVar[str] = "negate"
    lossy: ClassVar[bool] = True

    def budget(self, before: Program) -> Budget:
        return weight_budget(8)

    def run(self, program: Program, context: PassContext) -> PassResult:
        edited = program.clone()
        for node in edited.calls(torch.ops.aten.gelu.default):
            replace_call(edited, node, torch.ops.aten.neg.default, (node.args[0],))
        return PassResult(edited.changed(), 1, 1)


class _TwoOutputs(torch.nn.Module):
    """A large output that is right beside a small one that is not."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return 1000.0 * x, torch.nn.functional.gelu(x)


def test_a_lossy_pass_on_a_module_is_gated_per_output() -> None:
    torch.manual_seed(0)
    program = capture_module(_TwoOutputs(), (torch.randn(8, 16),))
    with pytest.raises(GateError, match="pass 'negate' failed the numerics gate") as caught:
        Pipeline([Negate()]).run(program)
    assert "relative error" in str(caught.value.why)
    assert "cosine" in str(caught.value.why)


@dataclass(frozen=True, kw_only=True)
class Reshape(Pass):
    """gelu(x)  ->  gelu(x) in another shape, with the same numbers where broadcasting looks"""

    name: ClassVar[str] = "reshape"
    shape: tuple[int, ...]

    def run(self, program: Program, context: PassContext) -> PassResult:
        edited = program.clone()
        for node in edited.calls(torch.ops.aten.gelu.default):
            same = insert_call(edited, node, torch.ops.aten.gelu.default, (node.args[0],))
            replace_call(edited, node, torch.ops.aten.expand.default, (same, list(self.shape)))
        return PassResult(edited.changed(), 1, 1)


@dataclass(frozen=True, kw_only=True)
class LossyReshape(Reshape):
    """gelu(x)  ->  gelu(x) in another shape, by a pass that may lose something"""

    name: ClassVar[str] = "lossy-reshape"
    lossy: ClassVar[bool] = True

    def budget(self, before: Program) -> Budget:
        return weight_budget(8)


@pytest.mark.parametrize("kind", [Reshape, LossyReshape])
@pytest.mark.parametrize("shape", [(3, 16), (1, 1, 16)])
def test_an_output_of_another_shape_is_caught(kind: type[Reshape], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    program = capture_module(_TwoOutputs(), (torch.randn(1, 16),))
    with pytest.raises(GateError, match="reshape' failed the numerics gate"):
        Pipeline([kind(shape=shape)]).run(program)


@pytest.mark.parametrize("kind", ["BertModel", "BertForSequenceClassification", "BertForTokenClassification"])
@pytest.mark.parametrize("is_text", [False, True])
def test_encoders_are_gated(kind: str, is_text: bool) -> None:
    """Hidden states by relative error, classes by KL too; text makes no perplexity."""
    import transformers as hf

    torch.manual_seed(0)
    config = hf.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=64,
        num_labels=3,
    )
    model = getattr(hf, kind)(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(4.0)
    program = capture_model(model)
    options = PipelineOptions(probe=dataclasses.replace(random_probe(64), is_text=is_text))
    (row,) = Pipeline([QuantizeRtn(bits=8, group_size=32)]).run(program, options).records
    assert row.drift is not None
    assert (row.drift.kl is None) == (kind == "BertModel")
    assert row.drift.perplexity_increase is None
    assert 0 < float(row.drift.relative_error or 0.0) < 0.05
    with pytest.raises(GateError, match="pass 'negate'"):
        Pipeline([Negate()]).run(program, options)
