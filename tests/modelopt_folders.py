"""Folders in ModelOpt's layout: made from tiny Programs, read by code of their own, run by transformers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hf_folders import tensors
from stages import captured
from torch import Tensor

from optc.compiler.calibration.sequences import random_calibration
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import Pass, PassContext
from optc.compiler.target.target import ExportRequest, ExportResult
from optc.exporters.hf import ServeOptions, export_trtllm
from optc.passes.kv_cache.quantize import QuantizeKVCache
from optc.passes.quantization.fp8 import QuantizeFp8
from optc.passes.quantization.inputs import QuantizeInputs
from optc.passes.quantization.nvfp4 import QuantizeNvfp4
from optc.passes.quantization.rtn import QuantizeRtn

CONTEXT = PassContext(calibration=random_calibration(128, samples=4, length=32, seed=0))
_KV = QuantizeKVCache(format="fp8", granularity="layer")
RECIPES: dict[str, tuple[Pass, ...]] = {
    "W4A16_AWQ": (QuantizeRtn(group_size=64),),
    "W8A16": (QuantizeRtn(bits=8, group_size=0),),
    "FP8": (QuantizeFp8(granularity="input"), QuantizeInputs(format="fp8"), _KV),
    "NVFP4": (QuantizeNvfp4(), QuantizeInputs(format="nvfp4")),
    "": (_KV,),
}
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@functools.cache
def made(family: str, algorithm: str) -> Program:
    """The Program of a tiny family as the recipe of an algorithm leaves it; read-only."""
    return rewritten(captured(family), RECIPES[algorithm])


def rewritten(program: Program, passes: Sequence[Pass]) -> Program:
    for rewrite in passes:
        program = rewrite.run(program, CONTEXT).program
    return program


def write(program: Program, folder: Path, out: Path, **options: Any) -> ExportResult:
    """Export into a new folder."""
    out.mkdir(exist_ok=True)
    return export_trtllm(program, ExportRequest(directory=out, options=ServeOptions(**options), source=folder))


def dense(parts: dict[str, Tensor], algorithm: str) -> Tensor:
    """The weight [N, K] of a linear, from the layout's description alone; parts by last name."""
    weight, scale = parts["weight"], parts["weight_scale"].double()
    if algorithm == "W8A16":
        return weight.double() * scale[:, None]
    if algorithm == "FP8":
        return weight.double() * scale
    low, high = (weight & 15).long(), (weight >> 4).long()
    if algorithm == "W4A16_AWQ":
        values = torch.zeros(2 * weight.shape[0], weight.shape[1], dtype=torch.float64)
        values[0::2], values[1::2] = (torch.where(half > 7, half - 16, half).double() for half in (low, high))
        return values * scale.repeat_interleave(values.shape[1] // scale.shape[1], 1)
    table = torch.tensor(E2M1 + [-value for value in E2M1], dtype=torch.float64)
    values = torch.zeros(weight.shape[0], 2 * weight.shape[1], dtype=torch.float64)
    values[:, 0::2], values[:, 1::2] = table[low], table[high]
    return values * scale.repeat_interleave(16, 1) * parts["weight_scale_2"].double()


def nvfp4(x: Tensor, scale: float) -> Tensor:
    """x rounded to NVFP4 under a scale, by the nearest of all 15 values."""
    table = torch.tensor(sorted({*E2M1, *(-value for value in E2M1)}))
    blocks = x.reshape(-1, 16)
    ratio = (blocks.abs().amax(1) / (6 * scale)).clamp(2**-9, 448)
    step = ratio.to(torch.float8_e4m3fn).float()[:, None] * scale
    nearest = (blocks[..., None] / step[..., None] - table).abs().argmin(-1)
    return (table[nearest] * step).reshape(x.shape)


def fp8(x: Tensor, scale: float) -> Tensor:
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def modules(folder: Path) -> dict[str, dict[str, Tensor]]:
    """module -> its tensors by last name."""
    out: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors(folder).items():
        module, _, last = name.rpartition(".")
        out.setdefault(module, {})[last] = tensor
    return out


def transformers_logits(folder: Path, original: Path, algorithm: str, ids: Tensor) -> Tensor:
    """What transformers makes of a folder's numbers: weights dequantized, inputs, keys and values rounded by hooks."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32, attn_implementation="eager").eval()
    found = modules(folder)
    scales = {
        name: {key: float(value) for key, value in parts.items() if key in ("k_scale", "v_scale")}
        for name, parts in found.items()
    }
    state = {}
    for name, parts in found.items():
        if "weight" in parts:
            quantized = "weight_scale" in parts
            state[f"{name}.weight"] = dense(parts, algorithm).float() if quantized else parts["weight"]
        if "bias" in parts:
            state[f"{name}.bias"] = parts["bias"]
        rounds = {"FP8": fp8, "NVFP4": nvfp4}.get(algorithm)
        if rounds is not None and "input_scale" in parts:
            scale = float(parts["input_scale"])
            hook = lambda _module, args, rounds=rounds, scale=scale: (rounds(args[0], scale),)  # noqa: E731
            model.get_submodule(name).register_forward_pre_hook(hook)
        if "pre_quant_scale" in parts:
            factor = parts["pre_quant_scale"]
            hook = lambda _module, args, factor=factor: (args[0] * factor,)  # noqa: E731
            model.get_submodule(name).register_forward_pre_hook(hook)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [name for name in missing if name != "lm_head.weight"]
    eager = ALL_ATTENTION_FUNCTIONS.get_interface("eager", None) or _eager(model)

    def rounded(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        prefix = next(name for name, item in model.named_modules() if item is module)
        key = fp8(key, scales[f"{prefix}.k_proj"]["k_scale"])
        value = fp8(value, scales[f"{prefix}.v_proj"]["v_scale"])
        return eager(module, query, key, value, *args, **kwargs)

    if any(scales.values()):
        ALL_ATTENTION_FUNCTIONS.register("optc-test-rounded", rounded)
        model.config._attn_implementation = "optc-test-rounded"
    with torch.no_grad():
        logits: Tensor = model(ids, attention_mask=_mask(ids) if any(scales.values()) else None).logits
    return logits


def _eager(model: Any) -> Any:
    import sys

    return sys.modules[type(model).__module__].eager_attention_forward


def _mask(ids: Tensor) -> Tensor:
    """Causal, as eager attention adds it: transformers makes none for attention that it does not know."""
    size = ids.shape[1]
    return torch.full((size, size), torch.finfo(torch.float32).min).triu(1).expand(ids.shape[0], 1, size, size)
