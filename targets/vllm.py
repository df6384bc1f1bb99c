"""vllm: a Hugging Face model folder that vLLM, SGLang and transformers load."""

from __future__ import annotations

from optc.compiler.diagnostics import TargetError
from optc.compiler.formats.layouts.registry import CHOICES
from optc.compiler.target.options import CompileOptions
from optc.compiler.target.target import QuantSupport, Step, Target
from optc.exporters.hf import FolderOptions, export_hf
from optc.passes.quantization.round_scales import RoundScales
from optc.targets.every_operator import EveryOperator
from optc.targets.methods import METHODS, quantization_steps

_BITS = {"compressed-tensors": (4, 8), "awq": (4,), "gptq": (2, 3, 4, 8)}
"""Bits of weight-only quantization that loaders run, by layout."""
_FORMATS_WITHOUT_LAYOUT = ("nf4", "llm-int8")
"""Methods whose weights no layout holds."""
_NOTE = "; ".join(f"{name}: {', '.join(map(str, bits))} bits" for name, bits in _BITS.items())


def _recipe(kind: str, options: CompileOptions) -> list[Step]:
    layout = options.of(FolderOptions).layout or CHOICES[0]
    chosen = options.quantization
    if chosen is None:
        # A folder that is already quantized may change its layout; export refuses one for plain weights.
        return [] if layout == CHOICES[0] else [Step(RoundScales(), optional=True)]
    bits = chosen.bits
    if bits is not None and bits not in _BITS[layout]:
        fit = [name for name in CHOICES if bits in _BITS[name]]
        raise TargetError(
            f"the layout '{layout}' does not take {bits}-bit weights",
            remedy=f"it takes {', '.join(map(str, _BITS[layout]))} bits; --layout {' or '.join(fit)} takes {bits}",
        )
    steps = quantization_steps(chosen, rotations=False)  # the loader has a graph of its own
    return steps if layout == CHOICES[0] else [*steps, Step(RoundScales(), optional=True)]


TARGET = Target(
    name=FolderOptions.target,
    aliases=("sglang", "transformers"),
    summary="a model folder for vLLM, SGLang and transformers (compressed-tensors, awq or gptq)",
    device="cpu",
    dtypes=("fp32", "bf16", "fp16"),
    keeps_dtype=True,
    kv_caches=(),
    quant={
        name: QuantSupport(bits=(method.bits,), group_sizes=(0,))
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
