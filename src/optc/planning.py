"""What a compile would do, from config and tensor headers alone: no weight is read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from optc.api import CompileSettings, check_request, recipe_steps
from optc.compiler.capture.checkpoint import check_folder
from optc.compiler.capture.pretrained import DTYPES, meta_model
from optc.compiler.diagnostics import InputError
from optc.compiler.quantize import default_group_size
from optc.compiler.target import CompileOptions, Target
from optc.passes.quantize.methods import resolve


def make_plan(model: Path, target: Target, settings: CompileSettings) -> dict[str, Any]:
    """Check the request and predict sizes.

    Returns a JSON-able dict: `passes` in order, `weight_bytes` before and after, `group_size`,
    `kv_cache_bytes_per_token`, `linears`.

    Raises:
        UsageError, TargetError, InputError, CaptureError: as the compile itself would.
    """
    check_request(target, settings.options)
    settings = dataclasses.replace(settings, options=resolve(settings.options))
    info = check_folder(model, trust_remote_code=settings.trust_remote_code)
    skeleton = meta_model(info, trust_remote_code=settings.trust_remote_code)
    decoder = hasattr(skeleton, "generate")
    steps = recipe_steps(target, "decoder" if decoder else "encoder", settings)
    sizes = _sizes(skeleton, settings.options)
    return {
        "model": str(model),
        "target": target.name,
        "dtype": settings.options.dtype,
        "quant": settings.options.quant,
        "passes": [{"name": step.rewrite.name, "optional": step.optional} for step in steps],
        **sizes,
        "kv_cache_bytes_per_token": _cache_bytes(skeleton.config, settings.options) if decoder else 0,
        "note": target.quant[settings.options.quant].note if settings.options.quant else "",
    }


def _linears(skeleton: Any) -> dict[str, tuple[int, int]]:
    """Name -> (N, K) of the linears that a quantization pass takes: all but the output head."""
    head = skeleton.get_output_embeddings() if hasattr(skeleton, "get_output_embeddings") else None
    found = {}
    for name, module in skeleton.named_modules():
        if module is not head and type(module).__name__ in ("Linear", "Conv1D"):
            first, second = (int(size) for size in module.weight.shape)
            found[name] = (first, second) if isinstance(module, torch.nn.Linear) else (second, first)
    return found


def _sizes(skeleton: Any, options: CompileOptions) -> dict[str, Any]:
    width = DTYPES[options.dtype].itemsize
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    linears = _linears(skeleton)
    size, group = parameters * width, None
    if options.quant is not None:
        group = options.group_size
        if group is None:
            group = default_group_size([columns for _, columns in linears.values()])
        odd = next(
            ((name, columns) for name, (_, columns) in linears.items() if group and columns % group), None
        )
        if odd:
            raise InputError(
                f"group size {group} does not divide every linear", where=f"{odd[0]} has {odd[1]} columns",
                remedy="leave --group-size out, or choose a divisor",
            )  # fmt: skip
        for rows, columns in linears.values():
            groups = rows * (columns // group if group else 1)
            zero = 0 if options.symmetric else groups * options.bits_or(4) / 8
            size += int(rows * columns * (options.bits_or(4) / 8 - width) + groups * width + zero)
    return {
        "parameters": parameters,
        "linears": len(linears),
        "group_size": group,
        "source_weight_bytes": parameters * width,
        "weight_bytes": size,
    }


def _cache_bytes(config: Any, options: CompileOptions) -> int:
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 2 * int(config.num_hidden_layers) * kv_heads * head_dim * DTYPES[options.dtype].itemsize
