"""FP8 in blocks as DeepSeek-V3 and Qwen3 are published: `quant_method` "fp8" with `weight_block_size` [128, 128].

Source: huggingface.co/deepseek-ai/DeepSeek-V3 (README_WEIGHTS.md) and transformers' FineGrainedFP8Config. Of a linear M
with weight [N, K]:

    M.weight float8_e4m3fn [N, K]; M.weight_scale_inv float32 (or bf16) [ceil(N / 128), ceil(K / 128)], by which the codes
    of a block are multiplied

Inputs are rounded to FP8 by the largest magnitude of each 128 neighbours of a token (`activation_scheme` "dynamic").
"""

METHOD = "fp8"
PARTS = ("weight", "weight_scale_inv")
