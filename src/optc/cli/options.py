"""The flags of `optc compile`, shared with `optc plan` and with YAML recipes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from optc.api import CompileSettings
from optc.cli.common import F
from optc.compiler.diagnostics import UsageError
from optc.compiler.pipeline.gate import Budget
from optc.compiler.target.target import CompileOptions
from optc.recipes import read_recipe

_OPTION_KEYS = (
    "dtype",
    "quant",
    "bits",
    "average_bits",
    "group_size",
    "symmetric",
    "kv_cache",
    "max_seq_len",
    "accuracy_level",
    "layout",
    "kv_cache_dtype",
    "max_batch",
    "max_num_tokens",
    "speculative",
    "draft_tokens",
    "arch",
    "trt_ops",
    "trt_runtime",
)
_SETTING_KEYS = (
    "force",
    "allow_noop",
    "seed",
    "trust_remote_code",
    "calibration_samples",
    "calibration_seq_len",
)
_OTHER_KEYS = ("target", "output", "model", "ignore", "passes", "pass_option", "dump_ir", "work_dir", "text", "calibration",
               "max_kl", "min_top1", "max_perplexity_increase")  # fmt: skip
RECIPE_KEYS = (*_OPTION_KEYS, *_SETTING_KEYS, *_OTHER_KEYS)

_FLAGS: tuple[Callable[[F], F], ...] = (
    click.option("--target", help="Where the model shall run; see optc targets."),
    click.option("--quant", help="Quantization method: rtn, gptq, awq, ...; see optc targets."),
    click.option("--dtype", help="Compute type: fp32, bf16 or fp16; default is the target's first."),
    click.option("--bits", type=int, help="Bits per weight.  [default: 4]"),
    click.option("--average-bits", type=float, help="Mean bits per weight for --quant auto.  [default: 4]"),
    click.option("--group-size", type=int, help="Weights per scale. Default: the largest of 128, 64, 32 that divides every linear."),
    click.option("--symmetric/--asymmetric", default=None, help="Without or with zero points.  [default: symmetric]"),
    click.option("--ignore", multiple=True, metavar="PATTERN", help="Leave weights of this name unquantized (repeatable), e.g. '*.down_proj.*'."),
    click.option("--calibration", type=click.Path(path_type=Path), help="Text, .jsonl, .json, .parquet, or a dataset's folder.  [default: built-in]"),
    click.option("--calibration-samples", type=int, help="Calibration sequences.  [default: 128]"),
    click.option("--calibration-seq-len", type=int, help="Tokens of each.  [default: 512]"),
    click.option("--kv-cache", help="static or paged; default is the target's first."),
    click.option("--max-seq-len", type=int, help="Capacity of a static KV cache, in tokens.  [default: the model's context, at most 2048]"),
    click.option("--accuracy-level", type=int, help="Quantized kernels: 4 rounds activations to int8 (fast), 0 does not.  [default: 4]"),
    click.option("--layout", help="Form of quantized weights in a model folder: compressed-tensors, awq or gptq.  [default: compressed-tensors]"),
    click.option("--kv-cache-dtype", help="fp8: keys and values in 8 bits, calibrated (trtllm).  [default: the compute type]"),
    click.option("--max-batch", type=int, help="Sequences of one call (trt; default 4), requests that a server runs together (trtllm)."),
    click.option("--max-num-tokens", type=int, help="Tokens that a server runs together.  [default: the server's]"),
    click.option("--speculative", metavar="ngram|draft:DIR", help="Speculative decoding in the serving options."),
    click.option("--draft-tokens", type=int, help="Tokens drafted in each step.  [default: 4]"),
    click.option("--arch", help="TensorRT for RTX: sm80,sm89,... or portable.  [default: portable]"),
    click.option("--trt-ops", help="TensorRT: fused, basic (for TensorRT 8.6 to 10.13) or auto.  [default: auto]"),
    click.option("--trt-runtime", help="TensorRT that builds the plan: tensorrt, rtx, none (build later, on the device) or auto.  [default: auto]"),
    click.option("--recipe", type=click.Path(path_type=Path, dir_okay=False), help="YAML file of these flags; flags on the command line win."),
    click.option("--passes", help="Comma-separated passes to run instead of the target's recipe."),
    click.option("--pass-option", multiple=True, metavar="NAME.OPTION=VALUE", help="Set an option of a pass (repeatable); see optc passes."),
)  # fmt: skip


def compile_flags(command: F) -> F:
    """Add the shared flags to a command."""
    for flag in reversed(_FLAGS):
        command = flag(command)
    return command


def merge_recipe(flags: dict[str, Any]) -> dict[str, Any]:
    """Flags given on the command line over the recipe's keys; what neither gives is absent."""
    recipe = flags.pop("recipe", None)
    merged = read_recipe(recipe, RECIPE_KEYS) if recipe else {}
    given = {
        key: value
        for key, value in flags.items()
        if not (value is None or value is False or value == ()) or (key == "symmetric" and value is False)
    }
    merged.update(given)
    for key in ("dump_ir", "work_dir", "text", "output", "calibration"):
        if merged.get(key) is not None:
            merged[key] = Path(merged[key])
    if isinstance(merged.get("passes"), str):
        merged["passes"] = [name.strip() for name in merged["passes"].split(",") if name.strip()]
    for key in ("ignore", "pass_option"):
        if isinstance(merged.get(key), str):
            merged[key] = (merged[key],)
    _check_types(merged)
    return merged


def _check_types(merged: dict[str, Any]) -> None:
    kinds = {
        "bits": int,
        "group_size": int,
        "max_seq_len": int,
        "arch": str,
        "trt_ops": str,
        "trt_runtime": str,
        "accuracy_level": int,
        "max_batch": int,
        "max_num_tokens": int,
        "draft_tokens": int,
        "kv_cache_dtype": str,
        "speculative": str,
        "seed": int,
        "calibration_samples": int,
        "calibration_seq_len": int,
        "symmetric": bool,
    }
    for key, kind in kinds.items():
        value = merged.get(key)
        if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise UsageError(f"'{key.replace('_', '-')}' must be of type {kind.__name__}, not {value!r}")
    if merged.get("accuracy_level") not in (None, 0, 1, 2, 3, 4):
        raise UsageError(
            f"accuracy level {merged['accuracy_level']} is unknown", remedy="use 0 (exact) to 4 (int8)"
        )


def to_settings(merged: dict[str, Any], **more: Any) -> CompileSettings:
    """CompileSettings from merged flags.

    Raises:
        UsageError: flags of quantization without a quantization.
    """
    idle = [
        key
        for key in ("bits", "average_bits", "group_size", "symmetric", "ignore")
        if merged.get(key) not in (None, ())
    ]
    if idle and not merged.get("quant") and not merged.get("passes"):
        raise UsageError(
            f"--{idle[0].replace('_', '-')} does nothing without --quant", remedy="add --quant rtn"
        )
    options = {key: merged[key] for key in _OPTION_KEYS if merged.get(key) is not None}
    limits = {"kl": "max_kl", "top1": "min_top1", "perplexity": "max_perplexity_increase"}
    budget = {name: float(merged[key]) for name, key in limits.items() if merged.get(key) is not None}
    settings = {
        key: merged[key]
        for key in (*_SETTING_KEYS, "dump_ir", "work_dir", "text", "calibration")
        if merged.get(key) is not None
    }
    return CompileSettings(
        options=CompileOptions(ignore=tuple(merged.get("ignore") or ()), **options),
        passes=merged.get("passes"),
        pass_options=tuple(merged.get("pass_option") or ()),
        budget=Budget(**budget) if budget else None,
        **settings,
        **more,
    )


def require(merged: dict[str, Any], key: str, example: str) -> Any:
    """A value that must come from a flag or the recipe."""
    if not merged.get(key):
        raise UsageError(f"no {key} given", remedy=example)
    return merged[key]
