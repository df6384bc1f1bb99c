"""Every lossy pass with its arithmetic broken: the gate stops it, names it and exits with 5.

On the example model and its built-in passage, as random weights hide much. Each pass runs once, as it is, and passes;
what it made is then damaged: a wrong scale, a wrong zero point, codes in the wrong order, scales along the wrong axis.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any, ClassVar

import pytest
import torch
from conftest import EXAMPLE
from torch import Tensor
from torch.fx import Node

from optc.compiler.calibration.sequences import cut_sequences
from optc.compiler.capture import capture_model, capture_pretrained
from optc.compiler.diagnostics import GateError
from optc.compiler.execution.probe import Probe, run_probe, text_probe
from optc.compiler.execution.stage_driver import StageRun
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import insert_call, set_weight
from optc.compiler.pipeline import pipeline
from optc.compiler.pipeline.pipeline import Pipeline, PipelineOptions
from optc.compiler.rewriting.passes import Pass, PassContext, PassResult
from optc.passes.kv_cache.quantize import QuantizeKVCache
from optc.passes.legalization.inductor import LegalizeInductor
from optc.passes.legalization.ort import LegalizeOrt
from optc.passes.legalization.round_activations import RoundActivations
from optc.passes.legalization.xnnpack import PackXnnpack
from optc.passes.quantization.activations import QuantizeActivations
from optc.passes.quantization.auto import QuantizeAuto
from optc.passes.quantization.clip import QuantizeClip
from optc.passes.quantization.fp8 import QuantizeFp8
from optc.passes.quantization.gptq import QuantizeGptq
from optc.passes.quantization.head import QuantizeHead
from optc.passes.quantization.inputs import QuantizeInputs
from optc.passes.quantization.llm_int8 import QuantizeLlmInt8
from optc.passes.quantization.mxfp4 import QuantizeMxfp4
from optc.passes.quantization.nf4 import QuantizeNf4
from optc.passes.quantization.nvfp4 import QuantizeNvfp4
from optc.passes.quantization.round_scales import RoundScales
from optc.passes.quantization.rtn import QuantizeRtn
from optc.passes.quantization.smooth_activations import QuantizeSmoothActivations
from optc.passes.quantization.static import QuantizeStatic
from optc.passes.quantization.tune_scales import TuneScales
from optc.passes.registry import passes

Damage = Callable[[Program], None]
"""Edits a program in place."""

_optc, _aten = torch.ops.optc, torch.ops.aten

# -- damages ----------------------------------------------------------------------------------


def weights(suffix: str, change: Callable[[Tensor], Tensor]) -> Damage:
    """Change the weights of this name."""

    def edit(program: Program) -> None:
        found = [(name, tensor) for name, tensor in program.weights() if name.endswith(suffix)]
        assert found, f"no weight ends with {suffix}"
        for name, tensor in found:
            changed = change(tensor.detach().clone())
            assert not torch.equal(changed.float(), tensor.float()), "the damage changes nothing"
            set_weight(program, name, changed.to(tensor.dtype).contiguous())

    return edit


def results(op: Any, target: Any, *args: Any) -> Damage:
    """Put `target(result, *args)` behind every call of `op`."""

    def edit(program: Program) -> None:
        calls = program.calls(op)
        assert calls, f"no call of {op}"
        for node in calls:
            users = list(node.users)
            changed = insert_call(program, users[0], target, (node, *args))
            for user in users:
                user.replace_input_with(node, changed)

    return edit


def inputs(op: Any, index: int, target: Any, *args: Any) -> Damage:
    """Let every call of `op` read `target(x, *args)` for its argument x of this index."""

    def edit(program: Program) -> None:
        calls = program.calls(op)
        assert calls, f"no call of {op}"
        for node in calls:
            source = node.args[index]
            assert isinstance(source, Node)
            node.update_arg(index, insert_call(program, node, target, (source, *args)))

    return edit


def times(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.float() * factor


def swapped(tensor: Tensor) -> Tensor:
    """Neighbouring columns exchanged, as by the wrong order of nibbles."""
    raw = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
    changed = raw.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return changed.view(tensor.dtype)


def across(tensor: Tensor) -> Tensor:
    """The groups of one axis read along the other."""
    return tensor.float().t().reshape(tensor.shape)


def numbers(op: Any, name: str, change: Callable[[Any], Any]) -> Damage:
    """Change a number that every call of `op` is given."""

    def edit(program: Program) -> None:
        calls = program.calls(op)
        assert calls, f"no call of {op}"
        for node in calls:
            node.update_kwarg(name, change(node.kwargs[name]))

    return edit


SCALE = weights("_scale", times(7.0))
ORDER = weights("_codes", swapped)
AXIS = weights("_scale", across)
ZERO = weights("_zero", lambda zero: zero.float() + 1)
ROUNDED = _optc.dequantize_activation.default
ACTIVATION_SCALE = results(ROUNDED, _aten.mul.Tensor, 7.0)
ACTIVATION_ORDER = results(ROUNDED, _aten.roll.default, [1], [-1])


# -- the passes -------------------------------------------------------------------------------

RTN_4 = QuantizeRtn(bits=4, group_size=64)
RTN_4_FULL = QuantizeRtn(bits=4, group_size=64, ranges="full")  # scales of searched ranges are float16 numbers
RTN_8 = QuantizeRtn(bits=8, group_size=0)
PACKED = (RTN_4, LegalizeInductor())
LINEAR = _optc.linear_nbits.default
MATMUL = _optc.matmul_nbits.default
ROUND_4 = _optc.quantize_nvfp4.default
STATIC, BACK = _optc.quantize_tensor.default, _optc.dequantize_tensor.default

CASES: list[tuple[Pass, tuple[Pass, ...], dict[str, Damage]]] = [
    (RTN_4, (), {"scale": SCALE, "order": ORDER, "axis": AXIS}),
    (QuantizeRtn(bits=4, group_size=64, symmetric=False), (), {"zero": ZERO}),
    (QuantizeRtn(bits=8, group_size=64), (), {"scale": SCALE, "small": weights("_scale", times(1.1)), "axis": AXIS}),
    (QuantizeRtn(bits=3, group_size=64), (), {"scale": SCALE, "order": ORDER}),
    (QuantizeHead(), (), {"scale": SCALE, "small": weights("_scale", times(1.1)), "axis": AXIS}),
    (QuantizeHead(bits=4, symmetric=False), (), {"scale": SCALE, "zero": ZERO, "order": ORDER}),
    (QuantizeGptq(bits=4, group_size=64), (), {"scale": SCALE, "order": ORDER, "axis": AXIS}),
    (QuantizeClip(bits=4, group_size=64, symmetric=False), (), {"scale": SCALE, "zero": ZERO, "order": ORDER}),
    (QuantizeAuto(choices=(4, 8), samples=1, group_size=64), (), {"scale": SCALE, "order": ORDER}),
    (QuantizeNf4(), (), {"scale": SCALE, "order": ORDER, "table": weights("nf4_table", lambda table: table.flip(0))}),
    (QuantizeNf4(double_quant=True), (), {"mean": weights("_mean", times(0.0))}),
    (QuantizeNvfp4(), (), {
        "scale": weights("_global_scale", times(7.0)), "order": ORDER,
        "axis": weights(".weight_scale", lambda scale: scale.float().roll(1, -1)),
    }),
    (QuantizeMxfp4(), (), {"scale": weights("_scale", lambda scale: scale + 3), "order": ORDER}),
    (QuantizeFp8(), (), {"scale": SCALE, "order": ORDER, "axis": weights("_scale", lambda scale: scale.float().roll(1, 0))}),
    (QuantizeLlmInt8(), (), {
        "scale": SCALE, "order": ORDER, "activations": ACTIVATION_SCALE, "activation order": ACTIVATION_ORDER,
    }),
    (QuantizeLlmInt8(threshold=3.0), (), {
        "outliers": weights("_outliers", lambda kept: kept.roll(1, 0))
    }),
    (QuantizeActivations(), (RTN_8,), {"scale": ACTIVATION_SCALE, "order": ACTIVATION_ORDER}),
    (QuantizeActivations(format="fp8"), (QuantizeFp8(),), {"scale": ACTIVATION_SCALE, "order": ACTIVATION_ORDER}),
    (QuantizeSmoothActivations(), (RTN_8,), {"scale": ACTIVATION_SCALE, "order": ACTIVATION_ORDER}),
    (QuantizeInputs(format="int8"), (RTN_8,), {
        "scale": ACTIVATION_SCALE, "clipped": weights("_input_scale", times(1 / 7)), "coarse": weights("_input_scale", times(7.0)),
    }),
    (QuantizeInputs(format="nvfp4"), (QuantizeNvfp4(),), {
        "scale": inputs(ROUND_4, 0, _aten.mul.Tensor, 7.0), "order": inputs(ROUND_4, 0, _aten.roll.default, [1], [-1]),
    }),
    (QuantizeStatic(), (), {
        "scale": SCALE, "order": ORDER, "axis": weights("_scale", lambda scale: scale.float().roll(1, 0)),
        "activations": numbers(BACK, "scale", lambda scale: 1.25 * scale), "zero": numbers(BACK, "zero", lambda zero: zero + 8),
        "clipped": numbers(STATIC, "scale", lambda scale: 1.25 * scale),
    }),
    (QuantizeKVCache(), (), {
        "scale": ACTIVATION_SCALE, "order": results(ROUNDED, _aten.roll.default, [1], [1]),
        "clipped": weights("_scale", times(1 / 7)), "coarse": weights("_scale", times(7.0)),
    }),
    (QuantizeKVCache(format="fp8"), (), {"scale": ACTIVATION_SCALE, "clipped": weights("_scale", times(1 / 7))}),
    (RoundScales(), (RTN_4_FULL,), {"scale": SCALE, "power": weights("_scale", lambda scale: torch.exp2(scale.float().log2().round()))}),
    (TuneScales(epochs=1, batch_tokens=256), (RTN_4,), {
        "scale": SCALE, "axis": AXIS, "norms": weights("norm.weight", times(0.5)),
    }),
    (RoundActivations(), PACKED, {
        "scale": inputs(LINEAR, 0, _aten.mul.Tensor, 7.0), "order": inputs(LINEAR, 0, _aten.roll.default, [1], [-1]),
    }),
    (RoundActivations(), (RTN_4, LegalizeOrt()), {
        "scale": inputs(MATMUL, 0, _aten.mul.Tensor, 7.0), "order": inputs(MATMUL, 0, _aten.roll.default, [1], [-1]),
    }),
    (PackXnnpack(bits=4), (RTN_4,), {
        "scale": weights("_scales", times(7.0)), "zero": weights("_signed", lambda codes: codes + 1),
        "order": weights("_signed", swapped), "axis": weights("_scales", across),
    }),
    (PackXnnpack(bits=8), (RTN_8,), {"scale": weights("_scales", times(1.05))}),
]  # fmt: skip


def test_every_lossy_pass_is_damaged() -> None:
    """A new lossy pass fails here until it has its damages."""
    assert {rewrite.name for rewrite, _, _ in CASES} == {name for name, cls in passes().items() if cls.lossy}
    assert all(damages for _, _, damages in CASES)


# -- the tests --------------------------------------------------------------------------------


@functools.cache
def _example() -> tuple[Program, PipelineOptions]:
    """The example model, and a pipeline's options with a short passage and calibration tokens."""
    from optc.runtime.generation.tokenizer import load_tokenizer

    program, info = capture_pretrained(EXAMPLE)
    tokenizer = load_tokenizer(info.path)
    assert tokenizer is not None
    data = resources.files("optc.compiler") / "data"
    passage, text = ((data / f"{name}.txt").read_text() for name in ("passage", "calibration"))
    calibration = cut_sequences(
        [tokenizer.encode(text)],
        samples=4,
        length=128,
        vocab_size=program.contract.model.vocab_size,
        seed=0,
        source="text",
    )
    probe = text_probe(tokenizer.encode(passage), longest=48)
    return program, PipelineOptions(probe=probe, context=PassContext(calibration=calibration))


@functools.cache
def _prepared(before: tuple[Pass, ...]) -> Program:
    program, options = _example()
    for rewrite in before:
        result = rewrite.run(program, options.context)
        assert result.matched, rewrite
        program = result.program
    return program


@functools.cache
def _made(rewrite: Pass, before: tuple[Pass, ...]) -> PassResult:
    """What a pass makes, undamaged: it passes the gate."""
    _, options = _example()
    program = _prepared(before)
    context = dataclasses.replace(
        options.context, reference=_prepared(before[:-1]) if rewrite.needs_reference else None
    )
    result = rewrite.run(program, context)
    assert result.matched
    _gate(rewrite, before, result)
    return result


@functools.cache
def _outputs(before: tuple[Pass, ...]) -> StageRun:
    """What the stage in front of a pass gives: all damages of the pass are compared with it."""
    probe = _example()[1].probe
    assert probe is not None
    return run_probe(_prepared(before), probe)


def _gate(rewrite: Pass, before: tuple[Pass, ...], result: PassResult) -> None:
    """Run a pipeline of one pass that returns this result."""

    def run(program: Program, probe: Probe, **kept: Any) -> StageRun:
        return _outputs(before) if program is _prepared(before) else run_probe(program, probe, **kept)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "run_probe", run)
        patch.setattr(type(rewrite), "run", lambda *_: result)
        Pipeline([rewrite]).run(_prepared(before), _example()[1])


def _all() -> Iterator[Any]:
    for rewrite, before, damages in CASES:
        for name in damages:
            yield pytest.param(rewrite, before, damages[name], id=f"{rewrite}-{name}")


@pytest.mark.parametrize(("rewrite", "before", "damage"), _all())
def test_damage_is_stopped(rewrite: Pass, before: tuple[Pass, ...], damage: Damage) -> None:
    result = _made(rewrite, before)
    edited = result.program.clone()
    damage(edited)
    with pytest.raises(GateError) as caught:
        _gate(rewrite, before, PassResult(edited.changed(), result.matched, result.candidates))
    assert caught.value.exit_code == 5
    assert caught.value.what == f"pass '{rewrite.name}' failed the numerics gate"


@dataclass(frozen=True, kw_only=True)
class Exact(Pass):
    """A pass that should keep the numbers, of a program that rounds activations."""

    name: ClassVar[str] = "exact"

    def run(self, program: Program, context: PassContext) -> PassResult:
        return PassResult(program, 1, 1)


def test_a_wrong_exact_pass_behind_rounded_activations_is_stopped() -> None:
    """Single logits jump there, so divergence is bounded: a scale that is off by 5 % is above it."""
    before = (RTN_8, QuantizeActivations())
    edited = _prepared(before).clone()
    weights("_scale", times(1.05))(edited)
    with pytest.raises(GateError, match=r"pass 'exact' failed the numerics gate\n(.*\n)*.*KL .* > 0\.002"):
        _gate(Exact(), before, PassResult(edited.changed(), 1, 1))


def test_what_rounding_jumps_by_is_let_through() -> None:
    before = (RTN_8, QuantizeActivations())
    result = LegalizeInductor().run(_prepared(before), PassContext())
    assert result.matched
    _gate(LegalizeInductor(), before, result)


@functools.cache
def _random_model() -> Program:
    """A Llama as transformers initializes it: its distribution over 2048 tokens is nearly flat."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    config = LlamaConfig(**sizes, vocab_size=2048, max_position_embeddings=64)
    return capture_model(LlamaForCausalLM(config).eval().requires_grad_(False))


def test_random_weights_are_judged_by_relative_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of their tokens none is decided: a third of them may have another successor, which says nothing."""
    rewrite = QuantizeRtn(bits=4, group_size=32)
    (row,) = Pipeline([rewrite]).run(_random_model()).records
    assert row.drift is not None
    assert float(row.drift.top1_agreement or 0.0) < 0.8
    assert 0.1 < float(row.drift.relative_error or 0.0) < 0.5
    edited = rewrite.run(_random_model(), PassContext()).program.clone()
    SCALE(edited)
    result = PassResult(edited.changed(), 1, 1)
    monkeypatch.setattr(QuantizeRtn, "run", lambda *_: result)
    with pytest.raises(GateError) as caught:
        Pipeline([rewrite]).run(_random_model())
    assert "relative error" in str(caught.value.why)
    assert "the model's own distribution is nearly flat: entropy 7.6" in str(caught.value.why)
