"""legalize-trt, fixed-kv-cache and quantize-inputs: what they make, what they leave alone, and that numbers stay."""

from __future__ import annotations

import functools

import bounds
import pytest
import torch
from rewrites import stirred
from stages import apply, largest, sequences, tiny_decoder

from optc.compiler.calibration.sequences import random_calibration
from optc.compiler.diagnostics import InputError, TargetError
from optc.compiler.execution.stage_driver import run_stage
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import PassContext
from optc.compiler.target.target import check_lowered
from optc.exporters.trt.table import OP_SETS
from optc.passes.fusion.norm import FuseNorm
from optc.passes.fusion.rotary import FuseRotary
from optc.passes.kv_cache.codes import StoreKVCodes
from optc.passes.kv_cache.fixed import FixedKVCache
from optc.passes.legalization.trt import LegalizeTrt
from optc.passes.quantization.inputs import QuantizeInputs
from optc.passes.quantization.rtn import QuantizeRtn

_aten, _optc = torch.ops.aten, torch.ops.optc
ROWS = sequences(21, 9, 14, 5)
STATIC_INPUTS = QuantizeInputs(format="int8", own_type=True)
CONTEXT = PassContext(calibration=random_calibration(128, samples=4, length=32, seed=0))


@functools.cache
def fused(name: str) -> Program:
    program = stirred(name)
    for rewrite in (FuseRotary(), FuseNorm()):
        program = apply(rewrite, program).program
    return program


@functools.cache
def cached(name: str) -> Program:
    return apply(FixedKVCache(capacity=32), fused(name)).program


def test_fixed_cache() -> None:
    """int32 tokens and positions; caches of the capacity in and out; logits in float32."""
    program = cached("gemma3")
    contract = program.contract
    specs = {spec.name: (spec.dtype, spec.dims) for spec in contract.inputs}
    assert specs["input_ids"] == ("int32", ("batch", "tokens"))
    assert specs["positions"] == ("int32", ("batch",))
    assert specs["past_key_values.1.value"] == ("float32", ("batch", 2, 32, 16))
    assert [spec.name for spec in contract.outputs][:2] == ["logits", "present.0.key"]
    assert (contract.kv_cache.kind, contract.kv_cache.capacity) == ("linear", 32)
    assert largest(run_stage(fused("gemma3"), ROWS).logits, run_stage(program, ROWS).logits) <= 1e-5


def test_fixed_cache_leaves_what_it_cannot_hold() -> None:
    result = apply(FixedKVCache(capacity=32), tiny_decoder("mean"))
    assert result.matched == 0
    assert result.misses


def test_a_sequence_that_does_not_fit_is_not_run() -> None:
    with pytest.raises(AssertionError, match="longer than the KV cache"):
        run_stage(cached("gemma3"), sequences(33))


@pytest.mark.parametrize("name", ["mistral", "gemma3", "gemma2"])
def test_numbers_stay(name: str) -> None:
    result = apply(LegalizeTrt(), cached(name))
    assert result.matched == 6  # two attentions, four rotary embeddings
    assert largest(run_stage(cached(name), ROWS).logits, run_stage(result.program, ROWS).logits) <= 1e-5


def test_masks_and_tables_are_shared() -> None:
    """Gemma 3: one layer with a window, one without, and the same frequencies twice or not."""
    program = apply(LegalizeTrt(), cached("gemma3")).program
    assert len(program.calls(_optc.masked_attention.default)) == 2
    assert len(program.calls(_optc.tensor_scatter.default)) == 4
    layers = {node.args[3] for node in program.calls(_optc.masked_attention.default)}
    windows = {layer.window for layer in program.contract.layers}
    assert len(layers) == len(windows)
    assert len(program.calls(_aten.gt.Tensor)) == sum(window > 0 for window in windows)
    tables = [name for name, _ in program.weights() if name.endswith("_cache")]
    assert all(program.weight(name).shape == (32, 8) for name in tables)
    assert len(tables) == 2 * len({node.args[2] for node in program.calls(_optc.rotary_cached.default)})


@pytest.mark.parametrize(
    ("rewrite", "text"),
    [
        (QuantizeRtn(bits=4, group_size=32, symmetric=False), "does not take weights with zero points"),
        (QuantizeRtn(bits=8, group_size=32, symmetric=False), "does not take weights with zero points"),
        (QuantizeRtn(bits=3, group_size=32), "does not take 3-bit weights"),
    ],
)
def test_weights_that_tensorrt_lacks_are_named(rewrite: QuantizeRtn, text: str) -> None:
    program = apply(FixedKVCache(capacity=32), apply(rewrite, fused("gemma3")).program).program
    with pytest.raises(TargetError, match=text) as caught:
        apply(LegalizeTrt(), program)
    assert "layers.0.self_attn.q_proj.weight_codes" in str(caught.value)


def test_a_growing_cache_is_left_alone() -> None:
    from optc.passes.kv_cache.static import StaticKVCache

    result = apply(LegalizeTrt(), apply(StaticKVCache(), fused("gemma3")).program)
    assert result.matched == 0
    assert {miss.reason.rpartition(": ")[2] for miss in result.misses} == {"see fixed-kv-cache"}


def test_caches_of_codes_have_no_lowering() -> None:
    """TensorRT's caches are of half precision."""
    program = cached("gemma3")
    assert apply(StoreKVCodes(), program).matched == 0
    assert _optc.cached_attention_codes.default not in OP_SETS["fused"].table
    with pytest.raises(TargetError, match="cannot run 6 node"):
        check_lowered(program, OP_SETS["fused"].legal, "the op set 'fused'")


# -- static scales of inputs ----------------------------------------------------------------------


@functools.cache
def eight_bits() -> Program:
    return apply(QuantizeRtn(bits=8, group_size=0), fused("llama")).program


def test_static_scales() -> None:
    """One scale per input, shared by the linears that read it: the largest magnitude of the text / 127."""
    result = STATIC_INPUTS.run(eight_bits(), CONTEXT)
    program = result.program
    assert (result.matched, result.candidates) == (14, 14)
    calls = program.calls(_optc.quantize.default)
    assert len(calls) == 8
    assert all(program.weight(program.weight_of(node.args[1]) or "").shape == (1,) for node in calls)
    entries = program.contract.quantization.values()
    assert {entry.activations for entry in entries} == {"int8"}
    seen: list[float] = []
    tokens = CONTEXT.calibration.tokens if CONTEXT.calibration else torch.empty(0)
    interpreter = torch.fx.Interpreter(eight_bits().module())
    norm = next(node for node in interpreter.module.graph.nodes if node.target is _aten.rms_norm.default)

    def watch(node: torch.fx.Node) -> object:
        value = torch.fx.Interpreter.run_node(interpreter, node)
        if node is norm:
            seen.append(float(value.abs().max()))
        return value

    interpreter.run_node = watch  # type: ignore[method-assign]
    interpreter.run(tokens, torch.arange(tokens.shape[1]).expand_as(tokens))
    first = program.weight(program.weight_of(calls[0].args[1]) or "")
    assert float(first) == pytest.approx(seen[0] / 127, rel=1e-6)


def test_static_scales_cost_little() -> None:
    before, after = (
        run_stage(item, ROWS).logits for item in (eight_bits(), STATIC_INPUTS.run(eight_bits(), CONTEXT).program)
    )
    drift = bounds.gap(after, before)
    assert drift.largest <= 0.1  # of the largest logit
    assert drift.kl <= 2.5e-3


def test_static_scales_need_a_text_and_codes() -> None:
    with pytest.raises(InputError, match="needs calibration tokens"):
        apply(STATIC_INPUTS, eight_bits())
    grouped = apply(QuantizeRtn(bits=8, group_size=32), fused("llama")).program
    result = STATIC_INPUTS.run(grouped, CONTEXT)
    assert result.matched == 0
    assert {miss.reason for miss in result.misses} == {"its weight has several scales per channel: use group size 0"}
    again = STATIC_INPUTS.run(STATIC_INPUTS.run(eight_bits(), CONTEXT).program, CONTEXT)
    assert {miss.reason for miss in again.misses} == {"its input is already quantized"}
