"""One small call of every op of the dialect."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optc.compiler.ops.packed.cuda import pack_integer
from optc.compiler.ops.packed.inductor_cpu import pack_rows, pack_tiles

B, H, HKV, S, T, D, K, N = 2, 4, 2, 3, 5, 8, 32, 16
KNOBS = {"scale": 0.3, "window": 0, "softcap": 0.0}
CONTRIB = {
    "num_heads": H,
    "kv_num_heads": HKV,
    "scale": 0.3,
    "local_window_size": -1,
    "softcap": 0.0,
    "rotary_interleaved": False,
}


def _f(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _u(top: int, *shape: int) -> Tensor:
    return torch.randint(0, top, shape, generator=torch.Generator().manual_seed(top), dtype=torch.uint8)


def _i8(*shape: int) -> Tensor:
    return (_u(255, *shape).int() - 127).to(torch.int8)


PAST = torch.full((B,), T)
QKV = (_f(B, H, S, D), _f(B, HKV, S, D), _f(B, HKV, S, D))
CACHES = (_f(B, HKV, T, D), _f(B, HKV, T, D))
ROOM = (_f(B, HKV, T + S, D), _f(B, HKV, T + S, D))
TURN = (_f(T + S, D // 2), _f(T + S, D // 2))
FLAT = (_f(B, S, H * D), _f(B, S, HKV * D), _f(B, S, HKV * D))
LENGTHS = torch.full((B,), T + S - 1, dtype=torch.int32)
CODES = (_i8(B, HKV, S, D), _i8(B, HKV, S, D), _i8(B, HKV, T, D), _i8(B, HKV, T, D))
SCALE = torch.rand(N, 2) + 0.1
POSITION = torch.arange(S).expand(B, S).contiguous()
PAGED = (
    _f(4, H, D),
    _f(4, HKV, D),
    _f(4, HKV, D),
    _f(4, 4, HKV, D),
    _f(4, 4, HKV, D),
    torch.tensor([8, 9, 10, 4]),
    torch.tensor([[2], [1]], dtype=torch.int32),
    torch.tensor([3, 1], dtype=torch.int32),
    torch.tensor([0, 3, 4], dtype=torch.int32),
)
STEP = (
    torch.tensor([1, 2]),
    torch.tensor([3, 0]),
    torch.tensor([11, -1]),
    torch.tensor([4, 0], dtype=torch.int32),
    torch.tensor([[2, 1], [0, 0]], dtype=torch.int32),
)
HEADS = torch.tensor([[5, 6], [3, 1], [9, 3], [2, 2]])
"""Of rounds: tokens, positions, limits, drafted."""
ROUND = (HEADS, torch.tensor([[7, 8], [9, 1]]), torch.tensor([[2, 1, 3], [0, 4, 5]], dtype=torch.int32))
RECURRENT = (_f(B, S, H, D), _f(B, S, H, D) / 4, _f(B, S, H, D), -_f(B, S, H).abs(), torch.rand(B, S, H))

CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "attention": ((*QKV, torch.ones(B, S, dtype=torch.long), _f(H)), {"causal": True, **KNOBS}),
    "cached_attention": ((*QKV, *CACHES, PAST, T + S, None), KNOBS),
    "cached_attention_": ((*QKV, *ROOM, PAST, T + S, None), KNOBS),
    "cached_attention_codes": (
        (QKV[0], *CODES, PAST, T + S, torch.full((1,), 0.02), torch.full((1,), 0.02)),
        KNOBS,
    ),
    "linear_attention": (RECURRENT, {}),
    "cached_linear_attention": ((*RECURRENT, _f(B, H, D, D)), {}),
    "causal_conv1d": ((_f(B, K, S), _f(K, 3), _f(K)), {}),
    "greedy_step_": ((_f(2, 8), *STEP), {"block_size": 4}),
    "advance_step_": ((torch.tensor([7, -1]), *STEP), {"block_size": 4}),
    "lay_out_drafts_": (
        (*ROUND, *torch.full((3, 6), 7), torch.full((7,), 7, dtype=torch.int32)),
        {"block_size": 4},
    ),
    "accept_drafts_": (
        (
            torch.tensor([7, 2, 3, 4, 5, 6]),
            *ROUND,
            torch.full((2,), 7),
            *torch.full((2, 1, 2), 7),
            torch.full((1, 2), 7, dtype=torch.int32),
        ),
        {"block_size": 4, "made": 1},
    ),
    "choose_draft_": ((_f(2, 8), torch.arange(8) * 3, torch.full((2, 2), -1)), {"place": 1}),
    "paged_attention_": (PAGED, KNOBS),
    "paged_tree_attention_": ((*PAGED, torch.tensor([1, 3, 5, -1])), KNOBS),
    "rotary_paged_attention_": (
        (*PAGED, torch.tensor([0, 1, 2, 0]), _f(D // 4), _f(D), _f(D)),
        {"scaling": 1.0, "interleaved": False, "eps": 1e-6, **KNOBS},
    ),
    "argmax": ((_f(B, N),), {}),
    "sample_": (
        (
            _f(B, N),
            torch.ones(B),
            torch.full((B,), 3, dtype=torch.int32),
            torch.full((B,), 0.9),
            torch.full((B,), 0.1),
            torch.full((B,), 1.1),
            torch.full((B,), 0.1),
            torch.full((B,), 0.2),
            torch.zeros(B, N, dtype=torch.bool),
            torch.zeros(B, N, dtype=torch.int32),
            torch.arange(B),
            torch.arange(B),
        ),
        {},
    ),
    "rotary": ((QKV[0], POSITION, _f(D // 2)), {"scaling": 1.0, "interleaved": True}),
    "rotate_blocks": ((_f(2, K), _f(8, 8)), {}),
    "quantize": ((_f(2, K), torch.tensor([0.02])), {"format": "int8"}),
    "quantize_dynamic": ((_f(2, K),), {"format": "fp8"}),
    "quantize_nvfp4": ((_f(2, K), torch.tensor([0.01])), {}),
    "dequantize": ((_u(16, N, K), SCALE, _u(16, N, 2)), {"bits": 4, "group_size": 16}),
    "dequantize_float": ((_f(N, K).to(torch.float8_e4m3fn), SCALE), {"group_size": 16}),
    "dequantize_codebook": ((_u(16, N, K), SCALE, _f(16)), {"bits": 4, "group_size": 16}),
    "dequantize_nvfp4": (
        (_u(16, N, K), SCALE.to(torch.float8_e4m3fn), torch.tensor([0.1])),
        {"dtype": torch.float32},
    ),
    "dequantize_mxfp4": ((_u(16, N, K), _u(8, N, K // 32) + 120), {"dtype": torch.float32}),
    "dequantize_activation": ((_i8(2, K), SCALE[:2, :1]), {"dtype": torch.float32}),
    "quantize_tensor": ((_f(2, K),), {"scale": 0.02, "zero": 100}),
    "dequantize_tensor": ((_u(255, 2, K),), {"scale": 0.02, "zero": 100, "dtype": torch.float32}),
    "dequantize_bias": ((_i8(N).int() * 1000, SCALE[:, :1]), {"input_scale": 0.02}),
    "dequantize_channels": ((_i8(N, 3, 2), SCALE[:, 0]), {"axis": 0}),
    "linear_few": ((_f(2, K), _f(N, K), _f(N)), {}),
    "linear_nbits": (
        (_f(2, K), pack_tiles(_u(16, N, K), 4, 16), pack_rows(SCALE), None, _f(N), None),
        {"bits": 4, "group_size": 16, "activation_group": -1, "K": K, "N": N},
    ),
    "fused_linear": (
        (_f(2, K), *pack_integer(_u(16, N, K), SCALE, _u(15, N, 2), 4), _f(K), None, _f(N), _f(2, N // 2)),
        {"norm": "rms", "eps": 1e-6, "activation": "silu", "gated": True, "format": "int4", "group_size": 16},
    ),
    "packed_embedding": (
        (*pack_integer(_u(16, N, K), SCALE, _u(15, N, 2), 4), torch.tensor([[1, 0, 2]])),
        {"format": "int4", "group_size": 16},
    ),
    "choose_experts": ((_f(2, 5),), {"slots": 2, "normalized": True}),
    "fused_experts": (
        (_f(2, K), _f(3, 2 * N, K), _f(3, K, N), torch.tensor([[0, 2], [1, 0]]), _f(2, 2), _f(2, K)),
        {"activation": "silu", "gated": True},
    ),
    "fused_norm": ((_f(2, K), _f(K), _f(K), _f(2, K)), {"norm": "layer", "eps": 1e-6, "factor": 0.5}),
    "select_rows": ((_f(5, K), torch.tensor([[4, 0, 4]])), {"factor": 0.5}),
    "group_query_attention": ((*FLAT, *CACHES, LENGTHS, T + S, *TURN), CONTRIB),
    "group_query_attention_codes": (
        (*FLAT, *CODES[2:], LENGTHS, T + S, *TURN, torch.full((1,), 0.02), torch.full((1,), 0.02)),
        CONTRIB,
    ),
    "matmul_nbits": (
        (_f(2, K), _u(255, N, 2, 8), SCALE, None, _f(N)),
        {"K": K, "N": N, "bits": 4, "block_size": 16, "accuracy_level": 0},
    ),
    "gather_nbits": (
        (torch.tensor([[1, 0, 2]]), _u(255, N, 2, 8), SCALE, None),
        {"K": K, "bits": 4, "block_size": 16},
    ),
    "skip_rms_norm": ((_f(2, K), _f(2, K), _f(K)), {"eps": 1e-6}),
    "dequantize_linear": (
        (_u(255, K * N // 2), _f(2, N), None),
        {"K": K, "N": N, "bits": 4, "signed": True, "block_size": 16},
    ),
    "quantize_tokens": ((_f(2, K),), {}),
    "matmul_integer": ((_u(255, 2, K), _i8(K, N), SCALE[:2, :1], SCALE[:, 0], _f(N)), {}),
    "matmul_bnb4": (
        (_f(2, K), _u(255, N * K // 2), SCALE.flatten(), _f(16)),
        {"K": K, "N": N, "block_size": 16},
    ),
    "tensor_scatter": ((ROOM[0], QKV[1], PAST), {}),
    "masked_attention": (
        (QKV[0], *CACHES, torch.ones(B, 1, S, T, dtype=torch.bool)),
        {"scale": 0.3, "softcap": 0.0},
    ),
    "rotary_cached": ((QKV[0], POSITION, *TURN), {"interleaved": False}),
    "linear_dynamic": ((_f(2, K), _i8(N, K), SCALE, _f(N)), {"bits": 8, "group_size": 16}),
}


def tensors_of(name: str) -> list[Tensor]:
    return [item.clone() for item in CALLS[name][0] if isinstance(item, Tensor)]
