"""ModelOpt folders, NVIDIA's layout for TensorRT-LLM: W4A16_AWQ, W8A16, FP8 and NVFP4 linears, fp8 KV caches.

Source: github.com/NVIDIA/Model-Optimizer (`modelopt/torch/export/quant_utils.py`, `quantization/qtensor/`). Settings
stand in hf_quant_config.json, or under `quantization_config` in config.json. Of a linear M with weight [N, K]:

    W4A16_AWQ   M.weight uint8 [N/2, K], row 2i in the low nibble, 2i+1 in the high, signed; M.weight_scale float32
                [N, K/g]; M.pre_quant_scale [K] multiplies the input, where linears of one norm have it in the norm
    W8A16       M.weight int8 [N, K]; M.weight_scale float32 [N]
    FP8         M.weight float8_e4m3fn [N, K]; M.weight_scale, M.input_scale float32 []
    NVFP4       M.weight uint8 [N, K/2], column 2i in the low nibble; M.weight_scale float8_e4m3fn [N, K/16];
                M.weight_scale_2, M.input_scale float32 []

    fp8 KV cache of a layer L    L.k_proj.k_scale, L.v_proj.v_scale float32 []
"""

from __future__ import annotations

from optc.compiler.formats.layouts.key_values import KeyValueScheme

METHOD = "modelopt"
FILE = "hf_quant_config.json"
AWQ, INT8, FP8, NVFP4 = "W4A16_AWQ", "W8A16", "FP8", "NVFP4"
ALGORITHMS = (AWQ, INT8, FP8, NVFP4)
CACHE_FP8 = "FP8"
KEY_VALUES = KeyValueScheme("fp8", "layer")
KEY_VALUE_PARTS = ("k_proj.k_scale", "v_proj.v_scale")
GROUP_SIZES = (64, 128)
"""Of W4A16_AWQ: those that TensorRT-LLM's kernels take."""
