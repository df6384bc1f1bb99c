"""executorch: a .pte for ExecuTorch's runtime on phones and boards, on the CPU through XNNPACK."""

from __future__ import annotations

from optc.compiler.diagnostics import TargetError
from optc.compiler.target.options import CompileOptions
from optc.compiler.target.target import KV_CACHE, QuantSupport, Step, Target
from optc.exporters.executorch import LEGAL, export_executorch, require_executorch
from optc.exporters.options.executorch import ExecutorchOptions
from optc.passes.fusion.attention import FuseAttention, spells_attention
from optc.passes.fusion.norm import FuseNorm
from optc.passes.fusion.rotary import FuseRotary
from optc.passes.kv_cache.static import StaticKVCache
from optc.passes.legalization.executorch import LegalizeExecutorch
from optc.passes.legalization.xnnpack import PackXnnpack
from optc.targets.methods import WEIGHT_ONLY, head_steps, quantization_steps


def recipe(kind: str, options: CompileOptions) -> list[Step]:
    """Whole attention, rotary embeddings and norms, [quantize], [quantize-head], then caches and legalization, [XNNPACK's products].

    Raises:
        TargetError: not a decoder.
    """
    if kind != "decoder":
        raise TargetError(
            f"target 'executorch' takes decoders, not a model of kind '{kind}'",
            remedy="--target onnx-cpu takes encoders and plain modules",
        )
    head = options.of(ExecutorchOptions).head_bits
    steps = [
        Step(FuseAttention(), optional=True, when=spells_attention),
        Step(FuseRotary(), optional=True),
        Step(FuseNorm(), optional=True),
        *quantization_steps(options.quantization),
        *head_steps(options.quantization, head, rows_at_8=True),
        Step(StaticKVCache(in_place=True), needs=KV_CACHE),
        Step(LegalizeExecutorch(), optional=True),
    ]
    if options.quantization is not None:
        assert options.quantization.bits is not None  # no method here chooses them itself
        steps.append(Step(PackXnnpack(bits=options.quantization.bits)))
    elif head == 8:  # the head alone
        steps.append(Step(PackXnnpack(bits=8)))
    return steps


_NOTE = "XNNPACK rounds activations to int8, with a scale and zero point of each token"

TARGET = Target(
    name=ExecutorchOptions.target,
    aliases=("pte",),
    summary="ExecuTorch program (.pte) for phones and boards: XNNPACK on the CPU",
    device="cpu",
    dtypes=("fp32",),
    kv_caches=("static",),
    quant={
        **dict.fromkeys(
            WEIGHT_ONLY,
            QuantSupport(bits=(4,), group_sizes=(0, 32, 64, 128, 256), symmetric=(True,), note=_NOTE),
        ),
        "int8": QuantSupport(bits=(8,), group_sizes=(0,), symmetric=(True,), note=_NOTE),
    },
    legal=LEGAL,
    recipe=recipe,
    export=export_executorch,
    options=ExecutorchOptions,
    check_machine=lambda options: require_executorch(),
)
