"""GPTQ folders: codes packed along K, zero points along N.

Source: github.com/AutoGPTQ/AutoGPTQ (`qlinear_cuda_old.py`) and github.com/ModelCloud/GPTQModel. Of a linear M with
weight [N, K]: M.qweight int32 [K * bits / 32, N], M.qzeros int32 [K / g, N * bits / 32], M.scales float16 [K / g, N],
M.g_idx int32 [K], the group of each k. `checkpoint_format` "gptq" keeps zero points minus one, "gptq_v2" as they are.
"""

from __future__ import annotations

METHOD = "gptq"
V1, V2 = "gptq", "gptq_v2"
