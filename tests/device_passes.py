"""Lists of passes that the tests of devices run, each list in order."""

from __future__ import annotations

from optc.compiler.rewriting.passes import Pass
from optc.passes.fusion.attention import FuseAttention
from optc.passes.fusion.decode import FuseDecode
from optc.passes.fusion.norm import FuseNorm
from optc.passes.fusion.projections import MergeProjections
from optc.passes.fusion.rotary import FuseRotary
from optc.passes.kv_cache.codes import StoreKVCodes
from optc.passes.kv_cache.fixed import FixedKVCache
from optc.passes.kv_cache.paged import PageKVCache
from optc.passes.kv_cache.quantize import QuantizeKVCache
from optc.passes.kv_cache.static import StaticKVCache
from optc.passes.legalization.cuda import LegalizeCuda
from optc.passes.legalization.executorch import LegalizeExecutorch
from optc.passes.legalization.inductor import LegalizeInductor
from optc.passes.legalization.ort import LegalizeOrt
from optc.passes.legalization.round_activations import RoundActivations
from optc.passes.legalization.trt import LegalizeTrt
from optc.passes.legalization.xnnpack import PackXnnpack
from optc.passes.quantization.activations import QuantizeActivations
from optc.passes.quantization.auto import QuantizeAuto
from optc.passes.quantization.clip import QuantizeClip
from optc.passes.quantization.fp8 import QuantizeFp8
from optc.passes.quantization.gptq import QuantizeGptq
from optc.passes.quantization.inputs import QuantizeInputs
from optc.passes.quantization.llm_int8 import QuantizeLlmInt8
from optc.passes.quantization.nf4 import QuantizeNf4
from optc.passes.quantization.nvfp4 import QuantizeNvfp4
from optc.passes.quantization.rotate_inputs import RotateInputs
from optc.passes.quantization.rotate_residual import RotateResidual
from optc.passes.quantization.rotate_values import RotateValues
from optc.passes.quantization.round_scales import RoundScales
from optc.passes.quantization.rtn import QuantizeRtn
from optc.passes.quantization.scale_awq import ScaleAwq
from optc.passes.quantization.scale_smoothquant import ScaleSmoothQuant
from optc.passes.quantization.tune_scales import TuneScales

PASSES: dict[str, tuple[Pass, ...]] = {
    "fusion": (FuseAttention(), FuseRotary(), FuseNorm(), MergeProjections()),
    "paged": (PageKVCache(),),
    "gptq": (QuantizeGptq(group_size=32), RoundScales(strict=False)),
    "best": (QuantizeGptq(group_size=32, sweeps=2, follow=0.5), TuneScales(epochs=1)),
    "awq": (FuseNorm(), ScaleAwq(group_size=32), QuantizeClip(group_size=32)),
    "auto": (QuantizeAuto(group_size=32),),
    "smoothquant": (
        FuseNorm(),
        ScaleSmoothQuant(),
        RotateInputs(least_gain=0.0),
        QuantizeRtn(bits=8, group_size=0),
        QuantizeActivations(format="int8"),
    ),
    "rotations": (RotateResidual(), RotateValues()),
    "fp8": (QuantizeFp8(), QuantizeInputs(format="fp8"), QuantizeKVCache(format="fp8", granularity="layer")),
    "nf4 double": (QuantizeNf4(double_quant=True),),
    "nvfp4": (QuantizeNvfp4(), QuantizeInputs(format="nvfp4")),
    "llm-int8": (QuantizeLlmInt8(),),
    "kv codes": (QuantizeKVCache(), StaticKVCache(), StoreKVCodes()),
    "onnx": (
        QuantizeRtn(group_size=32),
        FuseRotary(),
        FuseNorm(),
        StaticKVCache(select_logits=True),
        LegalizeOrt(),
    ),
    "inductor": (QuantizeRtn(group_size=32), StaticKVCache(in_place=True), LegalizeInductor(), RoundActivations()),
    "cuda": (
        FuseNorm(),
        FuseRotary(),
        QuantizeRtn(group_size=32),
        PageKVCache(select_logits=True),
        MergeProjections(),
        FuseDecode(),
        LegalizeCuda(),
    ),
    "trt": (FuseRotary(), FuseNorm(), QuantizeRtn(group_size=32), FixedKVCache(capacity=32), LegalizeTrt()),
    "executorch": (
        FuseRotary(),
        FuseNorm(),
        QuantizeRtn(group_size=32),
        StaticKVCache(in_place=True),
        LegalizeExecutorch(),
        PackXnnpack(),
    ),
}
