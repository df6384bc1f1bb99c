"""trt: a TensorRT plan, with the ONNX graph that it is built of."""

from __future__ import annotations

import dataclasses

from optc.compiler.diagnostics import TargetError
from optc.compiler.target.options import CompileOptions
from optc.compiler.target.target import KV_CACHE, QuantSupport, Step, Target
from optc.exporters.trt import LEGAL, TrtOptions, choose, export_trt
from optc.passes.fusion.attention import FuseAttention, spells_attention
from optc.passes.fusion.norm import FuseNorm
from optc.passes.fusion.rotary import FuseRotary
from optc.passes.kv_cache.fixed import FixedKVCache
from optc.passes.legalization.trt import LegalizeTrt
from optc.passes.quantization.activations import QuantizeActivations
from optc.passes.quantization.inputs import QuantizeInputs
from optc.targets.methods import WEIGHT_ONLY, quantization_steps, stored_scales

_BASIC_QUANT = ("smoothquant",)
_FP8_ARCHITECTURES = ("sm89", "sm120", "sm121")


def _recipe(kind: str, options: CompileOptions) -> list[Step]:
    if kind != "decoder":
        raise TargetError(
            f"the target trt takes decoders, not a model of kind '{kind}'", remedy="choose --target onnx-cpu"
        )
    steps = quantization_steps(options.quantization, choices=(4, 8))
    return [
        Step(FuseAttention(), optional=True, when=spells_attention),
        Step(FuseRotary(), optional=True),
        Step(FuseNorm(), optional=True),
        *(_static(step) for step in steps),
        *stored_scales(options),
        Step(FixedKVCache(capacity=options.of(TrtOptions).max_seq_len), needs=KV_CACHE),
        Step(LegalizeTrt()),
    ]


def _static(step: Step) -> Step:
    """TensorRT has no dynamic quantization of these: scales of inputs are calibrated."""
    if isinstance(step.rewrite, QuantizeActivations):
        assert step.rewrite.format != "fp8-128", "no method of this target has it"
        return dataclasses.replace(step, rewrite=QuantizeInputs(format=step.rewrite.format, own_type=True))
    return step


def _check(options: CompileOptions) -> None:
    """What depends on the builder that this machine has, on the op set and the architectures.

    Raises:
        TargetError: names what would do.
    """
    choice = choose(options.of(TrtOptions))
    method = None if options.quantization is None else options.quantization.method
    if choice.ops == "basic" and options.dtype == "bf16":
        raise TargetError("the op set 'basic' does not take dtype bf16", remedy="it takes: fp16, fp32")
    if choice.ops == "basic" and method not in (None, *_BASIC_QUANT):
        raise TargetError(
            f"the op set 'basic' does not take quantization '{method}'",
            why="TensorRT before 10 has no 4-bit weights, and multiplies 8-bit ones with 8-bit inputs only",
            remedy=f"nearest here: --quant {_BASIC_QUANT[0]}; or --trt-ops fused, for TensorRT 10.15 and RTX",
        )
    old = [name for name in choice.architectures or ("portable",) if name not in _FP8_ARCHITECTURES]
    if method == "fp8" and choice.runtime == "rtx" and old:
        raise TargetError(
            f"fp8 does not run on {', '.join(old)}",
            why="GPUs have it from compute capability 8.9 on",
            remedy=f"add --arch {','.join(_FP8_ARCHITECTURES[:2])}, or use --quant smoothquant",
        )


_INTEGERS = QuantSupport(
    bits=(4, 8), group_sizes=(0, 32, 64, 128), symmetric=(True,), note="op set fused; no zero points"
)
_FIXED = {
    "int8": "weights only; op set fused",
    "smoothquant": "inputs with one calibrated scale each",
    "fp8": "inputs with one calibrated scale each; op set fused, compute capability 8.9 or newer",
}

TARGET = Target(
    name=TrtOptions.target,
    aliases=("tensorrt", "rtx"),
    summary="a TensorRT plan and the ONNX graph it is built of (TensorRT for RTX, or standard TensorRT on its GPU)",
    device="cpu",
    dtypes=("fp16", "fp32", "bf16"),
    kv_caches=("static",),
    quant={
        **dict.fromkeys((*WEIGHT_ONLY, "auto"), _INTEGERS),
        **{
            name: QuantSupport(bits=(8,), group_sizes=(0,), symmetric=(True,), note=note)
            for name, note in _FIXED.items()
        },
    },
    legal=LEGAL,
    recipe=_recipe,
    export=export_trt,
    options=TrtOptions,
    check_machine=_check,
)
