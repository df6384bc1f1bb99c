"""nvidia-modelopt's own exports of tiny models: the same names, shapes, types and settings, and the same numbers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import bounds
import pytest
import torch
from hf_folders import config, logits, source, tensors
from modelopt_folders import dense, made, modules, write
from modelopt_oracle import IDS, theirs
from torch import Tensor

from optc.compiler.capture import capture_pretrained

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("modelopt") is None, reason="needs nvidia-modelopt (extra test-oracles)"
    ),
]
CASES = [("llama", "FP8"), ("qwen2", "NVFP4"), ("llama", "W8A16"), ("qwen2", "W4A16_AWQ")]


def _types(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors(folder).items()}


def _settings(folder: Path) -> tuple[Any, Any]:
    """What both config files say, but who wrote them."""
    own = json.loads((folder / "hf_quant_config.json").read_text())
    inner = {key: value for key, value in config(folder)["quantization_config"].items() if key != "producer"}
    return own["quantization"], inner


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize(("family", "algorithm"), CASES)
def test_our_export_has_their_names_shapes_types_and_settings(tmp_path: Path, family: str, algorithm: str) -> None:
    write(made(family, algorithm), source(family), tmp_path)
    folder = theirs(family, algorithm).folder
    assert _types(tmp_path) == _types(folder)
    assert _settings(tmp_path) == _settings(folder)


@pytest.mark.parametrize(("family", "algorithm"), CASES)
def test_their_folder_comes_through_byte_for_byte(tmp_path: Path, family: str, algorithm: str) -> None:
    """Captured, run and written again: every tensor as it was, and their model's logits and weights."""
    export = theirs(family, algorithm)
    program, _ = capture_pretrained(export.folder)
    write(program, export.folder, tmp_path)
    before, after = tensors(export.folder), tensors(tmp_path)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[name].dtype, after[name].shape), name
        assert torch.equal(_bytes(tensor), _bytes(after[name])), name
    assert _settings(tmp_path) == _settings(export.folder)
    if export.logits is not None and algorithm == "FP8":
        expected, rounding = bounds.of_codes(program, IDS.tolist())
        bounds.check(list(export.logits), expected, rounding)
    elif export.logits is not None:
        assert float((logits(program, IDS) - export.logits).abs().max()) <= 1e-4
    for name, weight in export.weights.items():
        mine = dense(modules(tmp_path)[name], algorithm).float()
        assert torch.allclose(mine, weight, rtol=1e-6, atol=1e-9), name
    assert len(export.weights) == (0 if algorithm == "NVFP4" else 14)


@pytest.mark.parametrize("algorithm", ["FP8", "NVFP4", "W8A16", "W4A16_AWQ"])
def test_their_packing_of_our_values_by_our_scales_gives_our_bytes(tmp_path: Path, algorithm: str) -> None:
    from modelopt.torch.export.quant_utils import to_quantized_weight

    formats = {"FP8": "fp8", "NVFP4": "nvfp4", "W8A16": "int8_wo", "W4A16_AWQ": "int4_awq"}
    blocks = {"NVFP4": 16, "W4A16_AWQ": 64}
    write(made("llama", algorithm), source("llama"), tmp_path)
    for parts in modules(tmp_path).values():
        if "weight_scale" not in parts:
            continue
        values = dense(parts, algorithm).float()
        packed = to_quantized_weight(
            values,
            parts["weight_scale"],
            formats[algorithm],
            parts.get("weight_scale_2"),
            blocks.get(algorithm),
        )
        mine = parts["weight"]
        if algorithm == "NVFP4":  # minus zero has a code of its own, and no value
            packed, mine = (_plain_zeros(item) for item in (packed, mine))
        assert torch.equal(_bytes(packed), _bytes(mine))


def _plain_zeros(packed: Tensor) -> Tensor:
    low, high = packed & 15, packed >> 4
    return torch.where(low == 8, 0, low) | (torch.where(high == 8, 0, high) << 4)


def test_their_nvfp4_of_activations_is_ours() -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 1, 5)[:, None]
    scale = x.abs().max() / (6 * 448)
    packed, blocks, _ = NVFP4QTensor.quantize(x.clone(), 16, weights_scaling_factor_2=scale)
    codes, block_scale = torch.ops.optc.quantize_nvfp4(x, scale.reshape(1))
    assert torch.equal(_bytes(blocks), _bytes(block_scale))
    assert torch.equal(packed._quantized_data, codes[:, 0::2] | (codes[:, 1::2] << 4))
    values = packed.dequantize(dtype=torch.float32, scale=blocks, double_scale=scale, block_sizes={-1: 16})
    mine = torch.ops.optc.dequantize_nvfp4(codes, block_scale, scale.reshape(1), dtype=torch.float32)
    assert torch.equal(values, mine)
