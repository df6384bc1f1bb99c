"""AOTInductor on the CPU: native code for torch's runtime, no Python and no compiler where it runs."""

from __future__ import annotations

from optc.compiler.target import CompileOptions, QuantSupport, Step, Target
from optc.exporters.inductor import LEGAL, export_inductor
from optc.passes.fuse_norm import FuseNorm
from optc.passes.legalize_inductor import INT4_GROUP_SIZES, LegalizeInductor
from optc.passes.page_kv_cache import PageKVCache
from optc.passes.quantize.methods import WEIGHT_ONLY, quantization_steps
from optc.passes.static_kv_cache import StaticKVCache


def recipe(kind: str, options: CompileOptions) -> list[Step]:
    """Decoder: [quantize] -> KV cache -> legalize. Encoder and module: [quantize] -> legalize.

    Rotary embeddings and norms are left as they are: Inductor fuses them itself. Norms are made whole for
    quantization, which folds scales into them.
    """
    steps: list[Step] = []
    if options.quant is not None:
        steps += [Step(FuseNorm(), optional=True), *quantization_steps(options)]
    if kind == "decoder":
        steps.append(Step(PageKVCache() if options.kv_cache == "paged" else StaticKVCache(in_place=True)))
    return [*steps, Step(LegalizeInductor(), optional=True)]


_RTN = QuantSupport(
    bits=(2, 3, 4, 8),
    group_sizes=(0, *INT4_GROUP_SIZES),
    note="4 bits with --dtype bf16 have a packed kernel, all else is dequantized before each use",
)

TARGET = Target(
    name="inductor-cpu",
    summary="AOTInductor package (.pt2) with its weights beside it, for the CPU",
    device="cpu",
    dtypes=("fp32", "bf16", "fp16"),
    kv_caches=("static", "paged"),
    quant={**dict.fromkeys(WEIGHT_ONLY, _RTN), "int8": QuantSupport(bits=(8,), group_sizes=(0,))},
    legal=LEGAL,
    recipe=recipe,
    export=export_inductor,
    aliases=("inductor",),
    needs_extra="inductor",
    takes=("max_seq_len",),
)
