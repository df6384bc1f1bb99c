"""The calibrated quantization passes as passes: every family, resume, overrides, errors."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from rewrites import stirred
from torch import Tensor, nn

from optc.compiler.calibration.sequences import Calibration, random_calibration
from optc.compiler.diagnostics import InputError, UsageError
from optc.compiler.ir.program import Program
from optc.compiler.pipeline.gate import UNLIMITED
from optc.compiler.pipeline.pipeline import Pipeline, PipelineOptions
from optc.compiler.rewriting.passes import Pass, PassContext, PassResult
from optc.compiler.target.options import QuantRequest
from optc.passes.quantization.arithmetic.stream import Stream
from optc.passes.quantization.clip import QuantizeClip
from optc.passes.quantization.gptq import QuantizeGptq
from optc.passes.quantization.rtn import QuantizeRtn
from optc.passes.quantization.scale_awq import ScaleAwq
from optc.passes.quantization.scale_smoothquant import ScaleSmoothQuant
from optc.passes.quantization.tune_scales import TuneScales
from optc.targets.methods import choose_quantization, quantization_steps

CALIBRATION = random_calibration(128, samples=6, length=24, seed=0)
CONTEXT = PassContext(calibration=CALIBRATION)


def _logits(program: Program, tokens: Tensor) -> Tensor:
    stream = Stream(program, tokens)
    output = program.graph.output_node().args[0][0]
    with torch.no_grad():
        stream.advance(output)
    return torch.cat(list(stream.values(output)))


def _distance(program: Program, result: Program) -> float:
    """Mean square difference of the logits on the calibration tokens."""
    return float((_logits(program, CALIBRATION.tokens) - _logits(result, CALIBRATION.tokens)).square().mean())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_closer_than_by_rounding_to_nearest(name: str) -> None:
    program = stirred(name)
    options = {"bits": 3, "group_size": 32, "symmetric": False}
    plain = QuantizeRtn(**options).run(program, PassContext())
    before = program.fingerprint()
    for rewrite in (QuantizeClip(**options), QuantizeGptq(**options)):
        result = rewrite.run(program, CONTEXT)
        assert program.fingerprint() == before
        assert (result.matched, result.candidates) == (plain.matched, plain.candidates)
        assert [miss.reason for miss in result.misses] == [miss.reason for miss in plain.misses]
        assert len(result.linears) == result.matched
        assert _distance(program, result.program) < _distance(program, plain.program)
        assert all(record.bits == 3 for record in result.linears)
        assert all(record.tokens == 144 for record in result.linears if "[" not in record.name)
        errors = [(record.error, record.error_rtn) for record in result.linears]
        assert all(after is not None and before is not None for after, before in errors)
        assert sum(after for after, _ in errors) < 0.95 * sum(before for _, before in errors)


def test_sweeps_come_closer_still() -> None:
    program = stirred("llama")
    plain, better = (
        QuantizeGptq(bits=3, group_size=32, symmetric=False, sweeps=count).run(program, CONTEXT) for count in (0, 2)
    )
    assert sum(item.error or 0 for item in better.linears) < 0.98 * sum(item.error or 0 for item in plain.linears)
    assert _distance(program, better.program) < _distance(program, plain.program)


def test_following_the_unquantized_outputs_changes_the_codes_of_later_layers_only() -> None:
    program = stirred("llama")
    plain, followed = (
        QuantizeGptq(bits=2, group_size=32, follow=follow).run(program, CONTEXT) for follow in (0.0, 1.0)
    )
    first, second = _codes(plain), _codes(followed)
    same = {name for name in first if torch.equal(first[name], second[name])}
    q_proj = "model.layers.{}.self_attn.q_proj.weight_codes"
    assert q_proj.format(0) in same  # its inputs are the unquantized model's
    assert q_proj.format(1) not in same


def _codes(result: PassResult) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in result.program.weights() if "_codes" in name or "_scale" in name}


def test_resume_after_a_kill_is_byte_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, rewrite = stirred("llama"), QuantizeGptq(group_size=32)
    whole = rewrite.run(program, CONTEXT)
    context = dataclasses.replace(CONTEXT, work_dir=tmp_path)
    calls: list[str] = []
    original = QuantizeGptq.round_group

    def counted(self: QuantizeGptq, *args: object) -> object:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(str(args[-1]))
        return original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(QuantizeGptq, "round_group", counted)
    with pytest.raises(KeyboardInterrupt):
        rewrite.run(program, context)
    files = sorted(path.name for path in next(tmp_path.iterdir()).iterdir())
    assert [name[:6] for name in files] == ["00000.", "00001.", "00002."]
    kept = next(tmp_path.iterdir()) / files[1]
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")  # a damaged file is computed again
    monkeypatch.setattr(QuantizeGptq, "round_group", original)
    resumed = rewrite.run(program, context)
    first, second = _codes(whole), _codes(resumed)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    # Another calibration, other options: nothing of it is used.
    other = dataclasses.replace(context, calibration=random_calibration(128, samples=6, length=24, seed=9))
    rewrite.run(program, other)
    QuantizeGptq(group_size=32, damping=0.02).run(program, context)
    assert len(list(tmp_path.iterdir())) == 3


def test_overrides_give_other_bits() -> None:
    result = QuantizeGptq(group_size=32, overrides=("*.down_proj.*=8", "*.q_proj.*=2")).run(stirred("llama"), CONTEXT)
    bits = {record.name: record.bits for record in result.linears}
    assert {value for name, value in bits.items() if "down_proj" in name} == {8}
    assert {value for name, value in bits.items() if "q_proj" in name} == {2}
    assert {value for name, value in bits.items() if "k_proj" in name} == {4}
    for name, entry in result.program.contract.quantization.items():
        assert entry.bits == bits[entry.source]
        assert int(result.program.weight(name).max()) < 2**entry.bits


@pytest.mark.parametrize("override", ["down_proj", "x=", "=4", "x=four"])
def test_malformed_override(override: str) -> None:
    with pytest.raises(UsageError, match="cannot read the override"):
        QuantizeGptq(overrides=(override,))


@pytest.mark.parametrize("rewrite", [QuantizeGptq(), QuantizeClip(), ScaleAwq(), ScaleSmoothQuant()])
def test_without_calibration(rewrite: Pass) -> None:
    with pytest.raises(InputError, match="needs calibration tokens"):
        rewrite.run(stirred("llama"), PassContext())


def test_group_size_that_does_not_divide() -> None:
    with pytest.raises(InputError, match="group size 48") as caught:
        QuantizeGptq(group_size=48).run(stirred("llama"), CONTEXT)
    assert "use 64" in str(caught.value.remedy)


def _damaged(program: Program, fragment: str, value: float) -> Program:
    edited = program.clone()
    name = next(name for name, _ in program.weights() if fragment in name)
    tensor = program.weight(name).detach().clone()
    tensor.view(-1)[7] = value
    edited.exported.state_dict[name] = nn.Parameter(tensor, requires_grad=False)
    return edited.changed()


def test_activations_that_are_not_finite_name_the_layer() -> None:
    program = _damaged(stirred("llama"), "layers.1.input_layernorm", float("nan"))
    for rewrite in (QuantizeGptq(group_size=32), QuantizeClip(group_size=32)):
        with pytest.raises(InputError, match="NaN or infinite") as caught:
            rewrite.run(program, CONTEXT)
        assert "layers.1.self_attn.q_proj" in str(caught.value.where)


def test_weights_that_are_not_finite_are_named() -> None:
    program = _damaged(stirred("llama"), "layers.0.mlp.down_proj", float("inf"))
    with pytest.raises(InputError, match="NaN or infinity") as caught:
        QuantizeGptq(group_size=32).run(program, CONTEXT)
    assert caught.value.where == "model.layers.0.mlp.down_proj.weight"


def test_few_tokens_raise_the_damping_and_say_so() -> None:
    calibration = Calibration(CALIBRATION.tokens[:1, :16].contiguous(), "a line")
    result = QuantizeGptq(group_size=32, damping=0.0).run(stirred("llama"), PassContext(calibration=calibration))
    assert all(record.damping is not None and record.damping > 0 for record in result.linears)
    assert "a line" in " ".join(result.notes)


def test_tuned_scales_lower_the_divergence() -> None:
    program = stirred("llama")
    rough = QuantizeRtn(bits=2, group_size=32).run(program, PassContext()).program
    rewrite = TuneScales(epochs=30, batch_tokens=72, learning_rate=2e-2)
    result = rewrite.run(rough, dataclasses.replace(CONTEXT, reference=program))

    def divergence(other: Program) -> float:
        p, q = (_logits(item, CALIBRATION.tokens).log_softmax(-1) for item in (program, other))
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert result.matched == 14
    assert divergence(result.program) < 0.7 * divergence(rough)
    for name, tensor in result.program.weights():
        if name.endswith("_scale"):
            assert torch.equal(tensor, tensor.half().float())
            assert bool((tensor > 0).all())
        elif name.endswith("_codes"):
            assert torch.equal(tensor, rough.weight(name))


def test_tune_scales_in_a_pipeline_reads_the_unquantized_program() -> None:
    steps = [QuantizeRtn(bits=2, group_size=32), TuneScales(epochs=2)]
    result = Pipeline(steps).run(stirred("llama"), PipelineOptions(context=CONTEXT, limits=UNLIMITED))
    assert "KL to the unquantized model" in result.records[-1].notes[0]
    with pytest.raises(InputError, match="the unquantized program"):
        TuneScales().run(result.program, CONTEXT)


@pytest.mark.parametrize("method", ["gptq", "awq", "awq+gptq", "best", "rtn"])
def test_methods_make_pipelines(method: str) -> None:
    steps = quantization_steps(choose_quantization(QuantRequest(quant=method, group_size=32)))
    result = Pipeline(steps).run(stirred("llama"), PipelineOptions(context=CONTEXT, limits=UNLIMITED))
    assert len(result.program.contract.quantization) == 14


def test_experts_say_how_many_tokens_reached_them() -> None:
    program = stirred("mixtral")
    result = QuantizeClip(group_size=32).run(program, CONTEXT)
    experts = {record.name: record.tokens for record in result.linears if "[" in record.name}
    assert len(experts) == 16  # 2 layers of 4 experts with 2 weights
    for layer in range(2):
        up, down = (
            [experts[f"model.layers.{layer}.mlp.experts.{kind}[{index}]"] for index in range(4)]
            for kind in ("gate_up_proj", "down_proj")
        )
        assert up == down
        assert sum(up) == 2 * 144  # each token goes to two experts
        assert max(up) < 144
    assert any("experts saw fewer than 128 tokens" in note for note in result.notes)
