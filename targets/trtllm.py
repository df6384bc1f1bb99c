"""trtllm: a Hugging Face model folder in ModelOpt's layout, which TensorRT-LLM's `trtllm-serve` loads."""

from __future__ import annotations

from optc.compiler.formats.layouts.modelopt import GROUP_SIZES
from optc.compiler.target.options import CompileOptions
from optc.compiler.target.target import QuantSupport, Step, Target
from optc.exporters.hf import ServeOptions, export_trtllm
from optc.passes.kv_cache.quantize import QuantizeKVCache
from optc.passes.quantization.fp8 import QuantizeFp8
from optc.passes.quantization.inputs import QuantizeInputs
from optc.targets.every_operator import EveryOperator
from optc.targets.methods import WEIGHT_ONLY, quantization_steps


def recipe(kind: str, options: CompileOptions) -> list[Step]:
    """[quantize] -> [round keys and values].

    fp8 has one scale per weight, shared by linears of one input, and a calibrated one per input: what TensorRT-LLM
    computes with. It would rescale q, k and v with scales of their own to the largest of them when it loads them.
    """
    chosen = options.quantization
    steps = quantization_steps(chosen)
    if chosen is not None and chosen.method == "fp8":
        steps = [
            Step(QuantizeFp8(granularity="input", ignore=chosen.ignore)),
            Step(QuantizeInputs(format="fp8")),
        ]
    if options.of(ServeOptions).kv_cache_dtype == "fp8":
        steps.append(Step(QuantizeKVCache(format="fp8", granularity="layer")))
    return steps


_AWQ = QuantSupport(bits=(4,), group_sizes=GROUP_SIZES, symmetric=(True,), note="written as W4A16_AWQ")
_INTEGERS_ONLY_AS_WEIGHTS = (
    "TensorRT-LLM's loader has no int8 activations: SmoothQuant was removed together with its engine backend"
)

TARGET = Target(
    name=ServeOptions.target,
    aliases=("tensorrt-llm",),
    summary="a model folder for trtllm-serve (ModelOpt's layout), with serving options",
    device="cpu",
    dtypes=("bf16", "fp16"),
    keeps_dtype=True,
    kv_caches=(),
    quant={
        "fp8": QuantSupport(
            bits=(8,),
            group_sizes=(0,),
            symmetric=(True,),
            note="one calibrated scale per input; written as FP8",
        ),
        "int8": QuantSupport(bits=(8,), group_sizes=(0,), symmetric=(True,), note="written as W8A16"),
        "nvfp4": QuantSupport(
            bits=(4,), group_sizes=(16,), symmetric=(True,), note="runs on Blackwell; written as NVFP4"
        ),
        **dict.fromkeys(WEIGHT_ONLY, _AWQ),
    },
    legal=EveryOperator(),
    recipe=recipe,
    export=export_trtllm,
    options=ServeOptions,
    lacks={
        "smoothquant": _INTEGERS_ONLY_AS_WEIGHTS,
        "llm-int8": _INTEGERS_ONLY_AS_WEIGHTS,
        "nf4": "TensorRT-LLM's loader has no codebooks",
        "auto": "the folder is written with one algorithm for all linears",
        "asymmetric": "its schemes have no zero points, and the loader has no GPTQ layout",
        "bits": "the loader has 4-bit weights in groups (W4A16_AWQ), and 8-bit ones as --quant int8 (W8A16) or fp8",
        "group-size": "TensorRT-LLM's W4A16 kernels take groups of 64 and 128",
        "dtype": "TensorRT-LLM computes in 16 bits",
    },
)
