"""trt: a TensorRT plan, with the ONNX graph that it is built of."""

from __future__ import annotations

from pathlib import Path

from optc.compiler.diagnostics import TargetError
from optc.compiler.program import Program
from optc.compiler.target import CompileOptions, ExportRequest, ExportResult, QuantSupport, Step, Target
from optc.exporters.trt import LEGAL, choose, export_trt
from optc.passes.fixed_kv_cache import FixedKVCache
from optc.passes.fuse_attention import FuseAttention
from optc.passes.fuse_norm import FuseNorm
from optc.passes.fuse_rotary import FuseRotary
from optc.passes.legalize_trt import LegalizeTrt
from optc.passes.quantize.methods import WEIGHT_ONLY, quantization_steps, stored_scales

_RUNTIME = Path(__file__).resolve().parent.parent / "runtime"
_SCRIPTS = ("run_trt.py", "build.sh")


def _recipe(kind: str, options: CompileOptions) -> list[Step]:
    if kind != "decoder":
        raise TargetError(
            f"the target trt takes decoders, not a model of kind '{kind}'", remedy="choose --target onnx-cpu"
        )
    choose(options)
    return [
        Step(FuseAttention(), optional=True),
        Step(FuseRotary(), optional=True),
        Step(FuseNorm(), optional=True),
        *quantization_steps(options),
        *stored_scales(options),
        Step(FixedKVCache(capacity=options.max_seq_len)),
        Step(LegalizeTrt()),
    ]


def _export(program: Program, request: ExportRequest) -> ExportResult:
    return export_trt(program, request, [_RUNTIME / name for name in _SCRIPTS if (_RUNTIME / name).exists()])


_INT4 = QuantSupport(bits=(4, 8), group_sizes=(32, 64, 128), symmetric=(True,))

TARGET = Target(
    name="trt",
    aliases=("tensorrt", "rtx"),
    summary="a TensorRT plan and the ONNX graph it is built of (TensorRT for RTX, or standard TensorRT on its GPU)",
    device="cpu",
    dtypes=("fp16", "fp32", "bf16"),
    kv_caches=("static",),
    quant={**dict.fromkeys(WEIGHT_ONLY, _INT4)},
    legal=LEGAL,
    recipe=_recipe,
    export=_export,
    needs_extra="trt",
    takes=("max_seq_len", "max_batch", "arch", "trt_ops", "trt_runtime"),
)
