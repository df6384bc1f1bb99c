"""`optc quantize`."""

from __future__ import annotations

from typing import Any

import click

from optc.cli.compile import run_compile, run_flags
from optc.cli.options import compile_flags, merge_recipe, require
from optc.compiler.diagnostics import UsageError

TARGET = "vllm"
_FOREIGN = ("target", "kv_cache", "max_seq_len", "accuracy_level")
"""Flags of `optc compile` about an engine; a checkpoint has none."""


def _without_foreign(command: Any) -> Any:
    """The flags of `optc compile` but those of engines."""
    command = compile_flags(command)
    command.__click_params__ = [item for item in command.__click_params__ if item.name not in _FOREIGN]
    return command


@click.command()
@click.argument("model", required=False)
@_without_foreign
@run_flags
def quantize(as_json: bool, **flags: Any) -> None:
    """Quantize MODEL (a Hugging Face folder) to a checkpoint that vLLM, SGLang and transformers load.

    The same as optc compile --target vllm: the passes are run, gated and recorded in the same way.

    \b
    optc quantize examples/fiction-3m --quant gptq -o out/fiction-gptq
    optc quantize examples/fiction-3m --quant awq --layout awq --asymmetric -o out/fiction-awq
    """
    merged = merge_recipe(flags)
    require(merged, "model", "optc quantize MODEL --quant gptq -o OUT")
    if not merged.get("passes"):
        require(merged, "quant", "--quant rtn, gptq or awq (see optc targets)")
    from optc.targets import find_target

    wanted = merged.get("target")
    if wanted is not None and find_target(wanted).name != TARGET:
        raise UsageError(
            f"the recipe is for target '{wanted}'", why=f"optc quantize writes for '{TARGET}'",
            remedy="use optc compile, or leave the target out",
        )  # fmt: skip
    run_compile({**merged, "target": TARGET}, as_json, "quantizing")
