"""compressed-tensors folders: pack-, int-, float-, nvfp4-pack- and mxfp4-pack-quantized weights of linears.

Source: github.com/vllm-project/compressed-tensors (README and `compressors/`). Of a linear M with weight [N, K]:

    pack-quantized    M.weight_packed int32 [N, ceil(K * bits / 32)], signed codes plus 2^(bits-1), lowest bits first;
                      M.weight_scale [N, G]; M.weight_shape int64 [2]; asymmetric: M.weight_zero_point int32
                      [ceil(N * bits / 32), G], packed alike along N; with `input_activations` of type float, per token,
                      inputs in fp8 (W4A8)
    int-quantized     M.weight int8 [N, K], M.weight_scale [N, 1]
    float-quantized   M.weight float8_e4m3fn [N, K], M.weight_scale [N, 1], or [1] for the whole weight
    nvfp4-pack-quantized   M.weight_packed uint8 [N, K/2], column 2i in the low nibble; M.weight_scale float8_e4m3fn
                      [N, K/16]; M.weight_global_scale float32 [1], by which the blocks' scales are divided; with rounded
                      inputs M.input_global_scale float32 [1] likewise
    mxfp4-pack-quantized   M.weight_packed as there; M.weight_scale uint8 [N, K/32], exponents plus 127

With `transform_config`, of a linear M whose input is multiplied by a Hadamard matrix of n channels: M.hadamard_n_input.weight
[n, n], its entries 1 and -1 in the order of Sylvester, which loaders divide by sqrt(n). vLLM computes it by a kernel of its
own (`HadamardTransform`, `hadacore_transform`), in the layer's type.

With `kv_cache_scheme`, of an attention A: A.k_scale and A.v_scale [1], or [Hkv, 1, 1] by the strategy "attn_head".
"""

from __future__ import annotations

from typing import Literal

PACKED, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
FLOAT4, MX_FLOAT4 = "nvfp4-pack-quantized", "mxfp4-pack-quantized"
METHOD = "compressed-tensors"
DENSE = "dense"  # nothing but keys and values is quantized
KEY_VALUE_PARTS = ("k_scale", "v_scale")
STRATEGIES: dict[str, Literal["layer", "head"]] = {"tensor": "layer", "attn_head": "head"}
"""`kv_cache_scheme.strategy` -> granularity."""
TRANSFORM, TRANSFORM_PART = "hadamard_{}", "{}_input.weight"
"""What a folder calls a rotation of inputs by its block, and (of that name) its matrix beside a linear's tensors."""
W4A8_GROUP = 128
"""The one group size of 4-bit integers that vLLM multiplies with fp8 inputs (`CompressedTensorsW4A8Fp8`, H100 and later)."""
