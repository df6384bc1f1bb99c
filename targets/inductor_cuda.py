"""One NVIDIA GPU through torch: the captured program with own kernels, decode steps as CUDA graphs."""

from __future__ import annotations

from optc.compiler.diagnostics import TargetError
from optc.compiler.target.options import CompileOptions
from optc.compiler.target.target import KV_CACHE, QuantSupport, Step, Target
from optc.exporters.inductor.cuda import LEGAL, export_cuda
from optc.exporters.options.inductor import CudaOptions
from optc.passes.fusion.attention import FuseAttention, spells_attention
from optc.passes.fusion.decode import FuseDecode
from optc.passes.fusion.norm import FuseNorm
from optc.passes.fusion.projections import MergeProjections
from optc.passes.fusion.rotary import FuseRotary
from optc.passes.kv_cache.paged import PageKVCache
from optc.passes.legalization.cuda import LegalizeCuda
from optc.targets.exposing import exposing_steps
from optc.targets.methods import WEIGHT_ONLY, head_steps, quantization_steps, rounded_last

BLOCK_SIZE = 64
"""Tokens per block of the KV pool: what attention reads at a time."""
_BITS = (4, 8)


def recipe(kind: str, options: CompileOptions) -> list[Step]:
    """fuse attention, norms and rotations -> [quantize] -> [quantize-head] -> page -> [Medusa heads] -> merge -> fuse-decode -> legalize.

    A graph of torch.compile: fuse attention -> legalize; Inductor fuses the rest.

    Raises:
        TargetError: the model is no decoder; a graph is to be quantized.
    """
    if kind == "graph":
        if options.quantization is not None:
            raise TargetError(
                "target 'inductor-cuda' does not quantize graphs of torch.compile",
                why="its packed products take the flattened tokens of decoders with a paged KV cache",
                remedy="leave quant out; optc.optimize and optc.compile take whole decoders",
            )
        return [Step(FuseAttention(), optional=True, when=spells_attention), Step(LegalizeCuda(), optional=True)]
    if kind != "decoder":
        raise TargetError(
            f"target 'inductor-cuda' takes decoders, not a model of kind '{kind}'",
            remedy="compile it for inductor-cpu or onnx-cpu, or run it with torch.compile",
        )
    return [
        Step(FuseAttention(), optional=True, when=spells_attention),
        Step(FuseNorm(), optional=True),
        Step(FuseRotary(), optional=True),
        *rounded_last(
            [
                *quantization_steps(options.quantization, choices=_BITS),
                *head_steps(options.quantization, options.of(CudaOptions).head_bits, rows_at_8=True),
            ]
        ),
        Step(PageKVCache(block_size=BLOCK_SIZE, select_logits=True), needs=KV_CACHE),
        *exposing_steps(options),
        Step(MergeProjections(), optional=True),
        Step(FuseDecode()),
        Step(LegalizeCuda(), optional=True),
    ]


_INTEGERS = QuantSupport(
    bits=_BITS,
    group_sizes=(0, 32, 64, 128),
    note="weights alone: products in the compute type",
)

TARGET = Target(
    name=CudaOptions.target,
    summary="the program and its weights, for one NVIDIA GPU: own Triton kernels, CUDA graphs per batch size",
    device="cuda",
    dtypes=("bf16", "fp16", "fp32"),
    kv_caches=("paged",),
    quant={
        **dict.fromkeys((*WEIGHT_ONLY, "auto"), _INTEGERS),
        "int8": QuantSupport(bits=(8,), group_sizes=(0,)),
        "fp8": QuantSupport(bits=(8,), group_sizes=(0,), note="products of 8 bits where tokens are many"),
    },
    legal=LEGAL,
    recipe=recipe,
    export=export_cuda,
    options=CudaOptions,
    lacks={
        "smoothquant": "its products take activations of 16 bits, or fp8",
        "llm-int8": "its products take activations of 16 bits, or fp8",
        "bits": "codes of 4 and 8 bits have packed products",
    },
)
