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
_FORMATS_WITHOUT_LAYOUT = ("nf4", "llm-int8")
"""Methods whose weights no layout holds."""
_ONE_METHOD = {"fp8": "fp8-block"}
"""The method whose weights a layout holds, of layouts that hold those of one."""
_ONE_LAYOUT = ("nvfp4", "mxfp4", "w4a8")
"""Methods whose weights compressed-tensors alone holds."""
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
    if chosen is None:
        # A folder that is already quantized may change its layout; export refuses one for plain weights.
        return [] if layout in (CHOICES[0], *_ONE_METHOD) else [Step(RoundScales(), optional=True)]
    if layout in _ONE_METHOD:
        if chosen.method != _ONE_METHOD[layout]:
            raise TargetError(
                f"the layout '{layout}' holds weights of --quant {_ONE_METHOD[layout]} alone",
                remedy=f"use --layout {CHOICES[0]}",
            )
        return quantization_steps(chosen)
    bits = chosen.bits
    if bits is not None and bits not in _BITS[layout]:
        fit = [name for name in CHOICES if bits in _BITS.get(name, ())]
        raise TargetError(
            f"the layout '{layout}' does not take {bits}-bit weights",
            remedy=f"it takes {', '.join(map(str, _BITS[layout]))} bits; --layout {' or '.join(fit)} takes {bits}",
        )
    if chosen.method in (*_ONE_LAYOUT, *_ONE_METHOD.values()) and layout != CHOICES[0]:
        raise TargetError(
            f"the layout '{layout}' has no place for {chosen.method} weights", remedy=f"use --layout {CHOICES[0]}"
        )
    steps = quantization_steps(chosen, rotations=False)  # the loader has a graph of its own
    return steps if layout == CHOICES[0] else [*steps, Step(RoundScales(), optional=True)]


TARGET = Target(
    name=FolderOptions.target,
    aliases=("sglang", "transformers"),
    summary="a model folder for vLLM, SGLang and transformers (compressed-tensors, awq, gptq or fp8)",
    device="cpu",
    dtypes=("fp32", "bf16", "fp16"),
    keeps_dtype=True,
    kv_caches=(),
    quant={
        name: QuantSupport(bits=(method.bits,), group_sizes=(method.own_group_size or 0,))
        if method.fixed
        else QuantSupport(bits=(2, 3, 4, 8), group_sizes=(0, 32, 64, 128), note=_NOTE)
        for name, method in METHODS.items()
        if name not in _FORMATS_WITHOUT_LAYOUT
    },
    legal=EveryOperator(),
    recipe=_recipe,
    export=export_hf,
    options=FolderOptions,
)
