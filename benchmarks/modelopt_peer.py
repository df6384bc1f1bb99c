"""Models as nvidia-modelopt quantizes them, for rows beside optc's own on one text.

ModelOpt's kernels for blocks of 4-bit floats run on GPUs alone. On a CPU its quantizers round by the tensors that its
exports are written with (`NVFP4QTensor`, `MXFP4QTensor`), through its own door for other kernels; calibration, the
choice of layers and everything else is the configuration's.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BACKEND = "packed-fp4"
_BATCH = 8
"""Calibration sequences at a time."""


def quantized_by_modelopt(folder: Path, config: str, tokens: Tensor, *, weights_alone: bool) -> Any:
    """The model of a folder in float32 after `mtq.quantize`, its weights replaced by what their quantizers give.

    Args:
        config: the name of a configuration in `modelopt.torch.quantization`.
        tokens: [samples, length], what it is calibrated with.
        weights_alone: leave the inputs of linears unrounded, where the configuration rounds them.
    """
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import register_quant_backend
    from transformers import AutoModelForCausalLM

    register_quant_backend(BACKEND, PackedFp4())
    settings = copy.deepcopy(getattr(mtq, config))
    for rule in settings["quant_cfg"]:
        attributes = rule.get("cfg")
        if isinstance(attributes, dict) and _is_fp4(attributes):
            attributes["backend"] = BACKEND
    if weights_alone:
        settings["quant_cfg"].append({"quantizer_name": "*input_quantizer", "enable": False})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def calibrate(item: Any) -> None:
        for batch in tokens.split(_BATCH):
            item(batch)

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = mtq.quantize(model, settings, calibrate)
        mtq.fold_weight(model)
    return model


def _is_fp4(attributes: dict[str, Any]) -> bool:
    return attributes.get("num_bits") in ((2, 1), "e2m1") and bool(attributes.get("block_sizes"))


class PackedFp4:
    """Rounds to blocks of E2M1 numbers and back by a quantizer's format: scales of E8M0, or of E4M3 under a global one.

    ModelOpt's packed tensors take 100 ns a number on a CPU. Their arithmetic is computed here on whole tensors, and held to
    them, bit for bit, at the first tensor of each format and shape.
    """

    def __init__(self) -> None:
        self._held: set[tuple[bool, torch.Size]] = set()
        self._last: tuple[Tensor, Any, Tensor] | None = None

    def __call__(self, values: Tensor, quantizer: Any) -> Tensor:
        amax = None if quantizer.is_mx_format else float(quantizer.amax)
        if self._last is not None and self._last[0] is values and self._last[1] == (quantizer.is_mx_format, amax):
            return self._last[2]  # linears that read one input
        result = _rounded(values, quantizer)
        kind = (quantizer.is_mx_format, values.shape)
        if kind not in self._held:
            if not torch.equal(result, _packed(values.clone(), quantizer)):
                raise SystemExit(f"{kind}: ModelOpt's tensors give other numbers")
            self._held.add(kind)
        self._last = values, (quantizer.is_mx_format, amax), result
        return result


def _rounded(values: Tensor, quantizer: Any) -> Tensor:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    size = quantizer.block_sizes[-1]
    blocks = values.float().unflatten(-1, (-1, size))
    largest = blocks.abs().amax(-1, keepdim=True)
    if quantizer.is_mx_format:
        scale = torch.exp2((largest / 6).log2().clamp(min=-127.0).ceil())
    else:
        whole = NVFP4QTensor.get_weights_scaling_factor_2_from_quantizer(quantizer)
        ratio = largest / (6 * whole)
        ratio = ratio.masked_fill(ratio == 0, 1.0).clamp(2**-9, 448)
        scale = ratio.to(torch.float8_e4m3fn).float() * whole
    scaled = blocks / scale
    sizes = scaled.abs()
    step = torch.where(sizes < 2, 0.5, torch.where(sizes < 4, 1.0, 2.0))
    # Of two equally near numbers NVFP4QTensor takes the even one, MXFP4QTensor the smaller.
    near = (sizes / step - 0.5).ceil() if quantizer.is_mx_format else (sizes / step).round()
    return ((near * step).clamp(max=6).copysign(scaled) * scale).flatten(-2).to(values.dtype)


def _packed(values: Tensor, quantizer: Any) -> Tensor:
    """The same by the tensors that ModelOpt's exports are written with."""
    from modelopt.torch.quantization.qtensor import MXFP4QTensor, NVFP4QTensor

    blocks = quantizer.block_sizes
    if quantizer.is_mx_format:
        packed, scale = MXFP4QTensor.quantize(values, blocks[-1])
        result = packed.dequantize(scale=scale, block_sizes=blocks)
    else:
        whole = NVFP4QTensor.get_weights_scaling_factor_2_from_quantizer(quantizer)
        packed, scale, whole = NVFP4QTensor.quantize(values, blocks[-1], weights_scaling_factor_2=whole)
        result = packed.dequantize(scale=scale, double_scale=whole, block_sizes=blocks)
    return result.reshape(values.shape).to(values.dtype)
