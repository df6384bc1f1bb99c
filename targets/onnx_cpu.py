"""onnx-cpu: ONNX Runtime and onnxruntime-genai on the CPU."""

from __future__ import annotations

from dataclasses import replace

import torch

from optc.compiler.ir.program import Program
from optc.compiler.ops.packed.onnxruntime import ROUNDS
from optc.compiler.target.options import NO_CACHE, CompileOptions
from optc.compiler.target.target import KV_CACHE, QuantSupport, Step, StoredWeights, Target, obstacle
from optc.exporters.onnx import LEGAL, export_encoder_decoder, export_onnx
from optc.exporters.options.onnx import OnnxOptions
from optc.passes.fusion.attention import FuseAttention, spells_attention
from optc.passes.fusion.norm import FuseNorm
from optc.passes.fusion.projections import MergeProjections
from optc.passes.fusion.rotary import FuseRotary
from optc.passes.kv_cache.codes import StoreKVCodes, rounds_keys_and_values
from optc.passes.kv_cache.static import StaticKVCache
from optc.passes.legalization.complex_pairs import ComplexPairs, has_complex
from optc.passes.legalization.decompose import Decompose
from optc.passes.legalization.functionalize import Functionalize
from optc.passes.legalization.ort import LegalizeOrt
from optc.passes.legalization.ort_nbits import stored_layout
from optc.passes.legalization.round_activations import RoundActivations
from optc.passes.quantization.head import QuantizeHead
from optc.passes.quantization.rtn import QuantizeRtn
from optc.targets.methods import STATIC, WEIGHT_ONLY, head_steps, quantization_steps, rounded_last, stored_scales

_HEAD_GROUP = 32
"""Neighbours that share a scale in an embedding and a head of 4 bits, at most: in groups of 128 these two lose half of what
all other linears do, and scales of smaller groups are a few percent of the file."""


def _recipe(kind: str, options: CompileOptions) -> list[Step]:
    steps = [
        Step(Functionalize(), optional=True, when=_writes_in_place),
        Step(ComplexPairs(), optional=True, when=has_complex),
        Step(FuseAttention(), optional=True, when=spells_attention),
        Step(FuseRotary(), optional=True),
        Step(FuseNorm(), optional=True),
    ]
    rounding = quantization_steps(options.quantization, choices=(2, 4, 8))
    rounding += head_steps(options.quantization, options.of(OnnxOptions).head_bits, largest_at_4=_HEAD_GROUP)
    rounding = [_signed(step) for step in rounding]
    static = options.quantization is not None and options.quantization.method == STATIC
    steps += rounded_last(rounding) if static else rounding
    steps += stored_scales(options)
    if kind == "decoder" and options.kv_cache != NO_CACHE:
        # Of a model whose keys and values are rounded (a folder with a kv_cache_scheme) the caches hold the codes.
        steps.append(Step(StaticKVCache(select_logits=True, states=True), needs=KV_CACHE))
        steps.append(Step(StoreKVCodes(), optional=True, when=rounds_keys_and_values))
        steps.append(Step(MergeProjections(), optional=True))
    steps.append(Step(Decompose(), optional=True, when=_lacks_operators))
    steps.append(Step(LegalizeOrt(), optional=True))
    if options.of(OnnxOptions).accuracy_level == ROUNDS:  # a model folder may hold quantized weights
        steps.append(Step(RoundActivations(), optional=True))
    return steps


def _signed(step: Step) -> Step:
    """ONNX Runtime's kernels take negative scales; other steps stay as they are."""
    if not isinstance(step.rewrite, QuantizeRtn | QuantizeHead):
        return step
    return replace(step, rewrite=replace(step.rewrite, signed=True))


def _obstacles(program: Program) -> list[torch._ops.OpOverload]:
    """The ATen operators of a program that ONNX Runtime cannot run as they are called."""
    calls = [node for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return [node.target for node in calls if node.target.namespace == "aten" and obstacle(LEGAL, node) is not None]


def _writes_in_place(program: Program) -> bool:
    return any(target._schema.is_mutable for target in _obstacles(program))


def _lacks_operators(program: Program) -> bool:
    return bool(_obstacles(program))


_INTEGERS = QuantSupport(
    bits=(2, 3, 4, 8),
    group_sizes=(16, 32, 64, 128, 256),
    note="3-bit codes are stored in 4 bits: MatMulNBits has no 3-bit kernel",
)

TARGET = Target(
    name=OnnxOptions.target,
    aliases=("edge", "onnx"),
    summary="ONNX Runtime on the CPU; the folder loads in unmodified onnxruntime-genai",
    device="cpu",
    dtypes=("fp32",),
    kv_caches=("static", NO_CACHE),
    quant={
        **dict.fromkeys((*WEIGHT_ONLY, "auto"), _INTEGERS),
        **dict.fromkeys(("int8", "smoothquant", "llm-int8"), QuantSupport(bits=(8,), group_sizes=(0,))),
        STATIC: QuantSupport(bits=(8,), group_sizes=(0,), symmetric=(True,)),
        "nf4": QuantSupport(bits=(4,), group_sizes=()),
    },
    legal=LEGAL,
    recipe=_recipe,
    export=export_onnx,
    export_encoder_decoder=export_encoder_decoder,
    stored=StoredWeights(scale_bytes=2, layout=stored_layout),
    options=OnnxOptions,
    lacks={
        "dtype": "ONNX Runtime has no 16-bit kernels for MatMul, Gemm, Conv, Add, Mul, Softmax and Sigmoid on an x86 CPU, "
        "and would cast to fp32 around each call; weights that are quantized are stored in fewer bits anyway"
    },
)
