"""`optc quantize`."""

from __future__ import annotations

from typing import Any

import click

from optc.cli.common import json_option
from optc.cli.compile import run_compile
from optc.cli.options import GroupedCommand
from optc.cli.request_flags import merge_recipe, request_flags, request_of, require
from optc.compiler.diagnostics import UsageError
from optc.targets.registry import find_target

TARGET = "vllm"
SECTIONS = ("what", "quantization", "calibration", "gate", "run")
"""Of a request; a checkpoint has no KV cache."""


@click.command(cls=GroupedCommand)
@click.argument("model", required=False)
@request_flags(SECTIONS, target=TARGET)
@json_option
def quantize(as_json: bool, **flags: Any) -> None:
    """Quantize MODEL (a Hugging Face folder) to a checkpoint that vLLM, SGLang and transformers load.

    The same as optc compile --target vllm: the passes are run, gated and recorded in the same way.

    \b
    optc quantize examples/fiction-3m --quant gptq -o out/fiction-gptq
    optc quantize examples/fiction-3m --quant awq --layout awq --asymmetric -o out/fiction-awq
    """
    merged = merge_recipe(flags)
    model = require(merged, "model", "optc quantize MODEL --quant gptq -o OUT")
    wanted = merged.get("target")
    if wanted is not None and find_target(require(merged, "target", "optc compile --target")).name != TARGET:
        raise UsageError(
            f"the recipe is for target '{wanted.value}'",
            why=f"optc quantize writes for '{TARGET}'",
            remedy="use optc compile, or leave the target out",
        )
    if "quant" not in merged and "passes" not in merged:
        raise UsageError("no quant given", remedy="--quant rtn, gptq or awq (see optc targets)")
    run_compile(model, TARGET, lambda: request_of(merged, TARGET), as_json, "quantizing")
