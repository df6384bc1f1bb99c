"""onnx-cuda: ONNX Runtime's CUDA provider and onnxruntime-genai-cuda on one NVIDIA GPU."""

from __future__ import annotations

from optc.compiler.diagnostics import TargetError
from optc.compiler.target.options import CompileOptions
from optc.compiler.target.target import KV_CACHE, QuantSupport, Step, StoredWeights, Target
from optc.exporters.onnx import LEGAL, export_onnx_cuda
from optc.exporters.options.onnx import OnnxCudaOptions
from optc.passes.fusion.attention import FuseAttention, spells_attention
from optc.passes.fusion.norm import FuseNorm
from optc.passes.fusion.projections import MergeProjections
from optc.passes.fusion.rotary import FuseRotary
from optc.passes.kv_cache.static import StaticKVCache
from optc.passes.legalization.ort import LegalizeOrt
from optc.passes.legalization.ort_nbits import stored_layout
from optc.targets.methods import WEIGHT_ONLY, head_steps, quantization_steps

_BITS = (4, 8)


def _recipe(kind: str, options: CompileOptions) -> list[Step]:
    """fuse attention, rotations and norms -> [quantize] -> [quantize-head] -> static caches -> merge -> ONNX Runtime's operators.

    Raises:
        TargetError: the model is no decoder.
    """
    if kind != "decoder":
        raise TargetError(
            f"target 'onnx-cuda' takes decoders, not a model of kind '{kind}'",
            remedy="compile it for onnx-cpu, whose file ONNX Runtime's CUDA provider opens too, or run it with torch.compile",
        )
    return [
        Step(FuseAttention(), optional=True, when=spells_attention),
        Step(FuseRotary(), optional=True),
        Step(FuseNorm(), optional=True),
        *quantization_steps(options.quantization, choices=_BITS),
        *head_steps(options.quantization, options.of(OnnxCudaOptions).head_bits),
        Step(StaticKVCache(select_logits=True), needs=KV_CACHE),
        Step(MergeProjections(), optional=True),
        Step(LegalizeOrt(), optional=True),
    ]


_INTEGERS = QuantSupport(
    bits=_BITS,
    group_sizes=(16, 32, 64, 128),
    note="weights alone: products in the compute type",
)

TARGET = Target(
    name=OnnxCudaOptions.target,
    summary="ONNX Runtime on one NVIDIA GPU; the folder loads in unmodified onnxruntime-genai-cuda",
    device="cuda",
    dtypes=("fp16", "bf16"),
    kv_caches=("static",),
    quant=dict.fromkeys((*WEIGHT_ONLY, "auto"), _INTEGERS),
    legal=LEGAL,
    recipe=_recipe,
    export=export_onnx_cuda,
    stored=StoredWeights(layout=stored_layout),
    options=OnnxCudaOptions,
    lacks={
        "smoothquant": "its CUDA provider multiplies no codes of tokens",
        "llm-int8": "its CUDA provider multiplies no codes of tokens",
        "bits": "MatMulNBits of the CUDA provider takes 4 and 8 bits",
        "dtype": "GroupQueryAttention of the CUDA provider has no fp32",
    },
)
