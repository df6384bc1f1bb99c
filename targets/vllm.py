"""vllm: a Hugging Face model folder that vLLM, SGLang and transformers load."""

from __future__ import annotations

from optc.compiler.diagnostics import TargetError
from optc.compiler.formats.layouts.registry import CHOICES, LAYOUTS
from optc.compiler.target.options import CompileOptions
from optc.compiler.target.target import QuantSupport, Step, Target
from optc.exporters.hf import FolderOptions, export_hf
from optc.passes.kv_cache.quantize import QuantizeKVCache
from optc.passes.quantization.round_scales import RoundScales
from optc.targets.every_operator import EveryOperator
from optc.targets.methods import METHODS, quantization_steps

_BITS = {name: LAYOUTS[name].integer_bits for name in CHOICES if LAYOUTS[name].integer_bits}
"""Bits of weight-only quantization that loaders run, by layout."""
_NOTE = "; ".join(f"{name}: {', '.join(map(str, bits))} bits" for name, bits in _BITS.items())


def _recipe(kind: str, options: CompileOptions) -> list[Step]:
    """[quantize] -> [round scales to float16, for layouts that keep those] -> [round keys and values].

    One scale of keys and values for each layer, as vLLM reads them.
    """
    cache = options.of(FolderOptions).kv_cache_dtype
    layout = options.of(FolderOptions).layout or CHOICES[0]
    if cache == "auto":
        return _weights(layout, options)
    if layout != CHOICES[0]:
        raise TargetError(
            f"the layout '{layout}' has no place for the scales of keys and values", remedy=f"use --layout {CHOICES[0]}"
        )
    return [*_weights(layout, options), Step(QuantizeKVCache(format=cache, granularity="layer"))]


def _weights(layout: str, options: CompileOptions) -> list[Step]:
    chosen = options.quantization
    rounds = layout != CHOICES[0] and bool(LAYOUTS[layout].integer_bits)
    if chosen is None:
        # A folder that is already quantized may change its layout; export refuses one for plain weights.
        return [Step(RoundScales(), optional=True)] if rounds else []
    held = METHODS[chosen.method].layouts
    if held is not None:
        if layout not in held:
            raise TargetError(
                f"the layout '{layout}' has no place for {chosen.method} weights",
                remedy=f"use --layout {' or '.join(held)}",
            )
    elif not LAYOUTS[layout].integer_bits:
        alone = [name for name, method in METHODS.items() if layout in (method.layouts or ())]
        raise TargetError(
            f"the layout '{layout}' holds weights of --quant {' or '.join(alone)} alone",
            remedy=f"use --layout {CHOICES[0]}",
        )
    elif chosen.bits is not None and chosen.bits not in _BITS[layout]:
        fit = [name for name in CHOICES if chosen.bits in _BITS.get(name, ())]
        raise TargetError(
            f"the layout '{layout}' does not take {chosen.bits}-bit weights",
            remedy=f"it takes {', '.join(map(str, _BITS[layout]))} bits; --layout {' or '.join(fit)} takes {chosen.bits}",
        )
    steps = quantization_steps(chosen, rotations=False)  # the loader has a graph of its own
    return [*steps, Step(RoundScales(), optional=True)] if rounds else steps


TARGET = Target(
    name=FolderOptions.target,
    aliases=("sglang", "transformers"),
    summary="a model folder for vLLM, SGLang and transformers (compressed-tensors, awq, gptq or fp8)",
    device="cpu",
    dtypes=("fp32", "bf16", "fp16"),
    exports_anywhere=True,
    keeps_dtype=True,
    kv_caches=(),
    quant={
        name: QuantSupport(bits=(method.bits,), group_sizes=(method.own_group_size or 0,))
        if method.fixed
        else QuantSupport(bits=(2, 3, 4, 8), group_sizes=(0, 32, 64, 128), note=_NOTE)
        for name, method in METHODS.items()
        if method.layouts != ()
    },
    legal=EveryOperator(),
    recipe=_recipe,
    export=export_hf,
    options=FolderOptions,
)
