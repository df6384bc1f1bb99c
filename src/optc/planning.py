"""What a compile would do, from config and tensor headers alone: no weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from optc.compiler.analysis.module_linears import expert_stacks, linear_shape, model_linears
from optc.compiler.capture.loading import DTYPES, meta_model
from optc.compiler.formats.integer import check_group_size, default_group_size
from optc.compiler.model_folder.checkpoint import check_folder
from optc.compiler.model_folder.quantized import quantized_folder, refuse_quantizing_again
from optc.compiler.target.options import CompileOptions
from optc.compiler.target.target import Step, check_context
from optc.passes.quantization.head import QuantizeHead
from optc.request import Request
from optc.resolving import recipe_steps, resolve, with_group_size


def make_plan(model: Path, request: Request) -> dict[str, Any]:
    """Check the request and predict sizes.

    Returns a JSON-able dict: `passes` in order, `weight_bytes` before and after, `group_size`,
    `kv_cache_bytes_per_token`, `linears`.

    Raises:
        UsageError, TargetError, InputError, CaptureError: as the compile itself would.
    """
    resolved = resolve(request)
    target, options = resolved.target, resolved.options
    info = check_folder(model, trust_remote_code=request.what.trust_remote_code)
    skeleton = meta_model(info, trust_remote_code=request.what.trust_remote_code)
    decoder = hasattr(skeleton, "generate")
    context = int(getattr(skeleton.config, "max_position_embeddings", 0) or 0)
    check_context(getattr(options.own, "max_seq_len", None), context)
    linears = quantizable(skeleton, () if options.quantization is None else options.quantization.ignore)
    resolved = with_group_size(resolved, [columns for _, columns in linears.values()], list(linears))
    options, steps = resolved.options, recipe_steps(resolved, "decoder" if decoder else "encoder")
    sizes = _sizes(skeleton, options)
    sizes["weight_bytes"] += _head_savings(skeleton, steps, _width(options))
    chosen = options.quantization
    held = quantized_folder(info)
    note = target.quant[chosen.method].note if chosen is not None else ""
    if held is not None:
        if chosen is not None:
            refuse_quantizing_again(model)
        shapes = [held.layout.shape(module) for module in held.modules]
        dense = sum(rows * columns for rows, columns in shapes) * _width(options)
        sizes["weight_bytes"] += held.stored_bytes() - dense
        note = f"quantized already ({held.method}): {len(shapes)} linears keep their codes"
    return {
        "model": str(model),
        "target": target.name,
        "dtype": options.dtype,
        "quant": None if chosen is None else chosen.method,
        "passes": [
            {"name": step.rewrite.name, "optional": step.optional}
            for step in steps
            if step.when is None or held is not None  # such steps are for what a quantized folder can hold
        ],
        **sizes,
        "kv_cache_bytes_per_token": _cache_bytes(skeleton.config, options) if decoder else 0,
        "note": note,
    }


def quantizable(skeleton: Any, ignore: Sequence[str] = ()) -> dict[str, tuple[int, int]]:
    """Weight name -> (N, K) of the linears that a quantization pass takes. Stacked experts are linears `name[e]`."""
    found = {f"{name}.weight": linear_shape(module) for name, module in model_linears(skeleton).items()}
    for name, (experts, rows, columns) in expert_stacks(skeleton).items():
        found |= {f"{name}[{index}]": (rows, columns) for index in range(experts)}
    return {
        name: shape
        for name, shape in found.items()
        if not any(fnmatchcase(name.partition("[")[0], pattern) for pattern in ignore)
    }


_SCALE_BYTES = 2  # scales are stored in 16 bits


def _sizes(skeleton: Any, options: CompileOptions) -> dict[str, Any]:
    width = _width(options)
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    chosen = options.quantization
    linears = quantizable(skeleton, () if chosen is None else chosen.ignore)
    size, group = parameters * width, None
    if chosen is not None:
        names, all_columns = list(linears), [columns for _, columns in linears.values()]
        group = chosen.group_size
        if group is None:  # the method has blocks of its own, of about this size
            group = default_group_size(all_columns, names)
        check_group_size(group, all_columns, names)
        bits = chosen.bits or chosen.average_bits or 4
        for rows, columns in linears.values():
            groups = rows * (columns // group if group else 1)
            zero = 0 if chosen.symmetric else groups * bits / 8
            size += int(rows * columns * (bits / 8 - width) + groups * _SCALE_BYTES + zero)
    return {
        "parameters": parameters,
        "linears": len(linears),
        "group_size": group,
        "source_weight_bytes": parameters * width,
        "weight_bytes": size,
    }


def _head_savings(skeleton: Any, steps: Sequence[Step], width: int) -> int:
    """Bytes that a recipe's rounding of embedding and head adds (below zero: saves); a tied weight counts once."""
    rewrite = next((step.rewrite for step in steps if isinstance(step.rewrite, QuantizeHead)), None)
    if rewrite is None or not hasattr(skeleton, "get_input_embeddings"):
        return 0
    modules = (skeleton.get_input_embeddings(), skeleton.get_output_embeddings())
    weights = {id(module.weight): module.weight for module in modules if module is not None}
    ignored = {
        id(parameter)
        for name, parameter in skeleton.named_parameters(remove_duplicate=False)
        if any(fnmatchcase(name, pattern) for pattern in rewrite.ignore)
    }
    size = 0
    for weight in (weight for key, weight in weights.items() if key not in ignored):
        rows, columns = (int(item) for item in weight.shape)
        group = rewrite.size_for(columns)
        if group is not None:
            groups = rows * (columns // (group or columns))
            zero = 0 if rewrite.symmetric else groups * rewrite.bits / 8
            size += int(rows * columns * (rewrite.bits / 8 - width) + groups * _SCALE_BYTES + zero)
    return size


def _cache_bytes(config: Any, options: CompileOptions) -> int:
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    width = 1 if getattr(options.own, "kv_cache_dtype", None) == "fp8" else _width(options)
    return 2 * int(config.num_hidden_layers) * kv_heads * head_dim * width


def _width(options: CompileOptions) -> int:
    """Bytes of a number of the compute type."""
    return DTYPES[options.dtype].itemsize
