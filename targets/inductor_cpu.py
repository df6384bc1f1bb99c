"""AOTInductor on the CPU: native code for torch's runtime, no Python and no compiler where it runs."""

from __future__ import annotations

from optc.compiler.target.options import NO_CACHE, CompileOptions
from optc.compiler.target.target import KV_CACHE, QuantSupport, Step, StoredWeights, Target
from optc.exporters.inductor import LEGAL, export_encoder_decoder, export_inductor
from optc.exporters.options.inductor import InductorOptions
from optc.passes.fusion.attention import FuseAttention, spells_attention
from optc.passes.fusion.group_experts import GroupExperts, has_experts
from optc.passes.fusion.norm import FuseNorm
from optc.passes.fusion.projections import MergeProjections
from optc.passes.fusion.share_heads import ShareHeads
from optc.passes.kv_cache.paged import PageKVCache
from optc.passes.kv_cache.static import StaticKVCache
from optc.passes.legalization.complex_pairs import ComplexPairs, has_complex
from optc.passes.legalization.inductor import LegalizeInductor
from optc.passes.legalization.round_activations import RoundActivations
from optc.targets.exposing import exposing_steps
from optc.targets.methods import WEIGHT_ONLY, head_steps, quantization_steps, rounded_last, stored_scales

_HEAD_GROUP = 32
"""Neighbours that share a scale in an embedding and a head of 4 bits, at most (see targets/onnx_cpu.py)."""
FAST = 4
"""The accuracy level at which packed products round activations to int8."""


def recipe(kind: str, options: CompileOptions) -> list[Step]:
    """Decoder: fuse-attention -> share-heads -> [quantize -> quantize-head] -> KV cache -> [Medusa heads -> [tree]] -> [merge]
    -> [group-experts] -> legalize. Encoder: [quantize -> quantize-head] -> [group-experts] -> legalize. Module:
    fuse-attention -> share-heads -> [quantize] -> [group-experts] -> legalize. In front, complex numbers become pairs:
    Inductor fuses products of pairs, and leaves those of complex numbers to ATen. Its Fourier transforms are left as they are.

    Attention of modules is found first, however it is spelled: behind it stands a product of its own, whose causal mask is
    never made. Experts in float32 are grouped, so that a token goes through its own alone. Rotary embeddings and norms are
    left as they are: Inductor fuses them itself. Norms are made whole for quantization, which folds scales into them.
    Quantized projections of one input are merged: fewer packed products. Accuracy level 4, the default of quantized
    programs, rounds activations to int8 in a stage of its own, so that the gate sees what it costs; below 4 they are left
    as they are.
    """
    steps = [Step(ComplexPairs(transforms=False), optional=True, when=has_complex)]
    if kind != "encoder":
        steps += [Step(item, optional=True, when=spells_attention) for item in (FuseAttention(), ShareHeads())]
    bits = options.of(InductorOptions).head_bits
    if options.quantization is not None:
        steps += [
            Step(FuseNorm(), optional=True),
            *rounded_last(
                [
                    *quantization_steps(options.quantization),
                    *head_steps(options.quantization, bits, largest_at_4=_HEAD_GROUP),
                ]
            ),
            *stored_scales(options),
        ]
    else:
        steps += head_steps(None, bits, largest_at_4=_HEAD_GROUP)
    tree = options.of(InductorOptions).speculative_tree or 0
    if kind == "decoder" and options.kv_cache != NO_CACHE:
        steps.append(
            Step(
                PageKVCache(tree=tree > 0)
                if options.kv_cache == "paged"
                else StaticKVCache(in_place=True, states=True),
                needs=KV_CACHE,
            )
        )
        steps += exposing_steps(options, tree)
        if options.quantization is not None:
            steps.append(Step(MergeProjections(), optional=True))
    steps.append(Step(GroupExperts(), optional=True, when=has_experts))
    steps.append(Step(LegalizeInductor(), optional=True))
    if options.of(InductorOptions).accuracy_level == FAST:  # a model folder may hold quantized weights
        steps.append(Step(RoundActivations(), optional=True))
    return steps


_INTEGERS = QuantSupport(
    bits=(2, 3, 4, 8),
    group_sizes=(0, 16, 32, 64, 128, 256),
    note="packed kernels for every dtype; --accuracy-level 4 (default) rounds activations to int8, 0 does not",
)

TARGET = Target(
    name=InductorOptions.target,
    summary="AOTInductor package (.pt2) with its weights beside it, for the CPU",
    device="cpu",
    dtypes=("fp32", "bf16", "fp16"),
    kv_caches=("static", "paged", NO_CACHE),
    quant={
        **dict.fromkeys((*WEIGHT_ONLY, "auto"), _INTEGERS),
        **dict.fromkeys(("int8", "smoothquant", "llm-int8", "fp8"), QuantSupport(bits=(8,), group_sizes=(0,))),
        "nf4": QuantSupport(bits=(4,), group_sizes=()),
    },
    legal=LEGAL,
    recipe=recipe,
    stored=StoredWeights(scale_bytes=2, zero_bits=8),
    export=export_inductor,
    export_encoder_decoder=export_encoder_decoder,
    aliases=("inductor",),
    options=InductorOptions,
)
