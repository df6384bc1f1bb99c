"""The passes by name. A pass lives in the file of its name in snake case."""

from __future__ import annotations

import importlib
import inspect

from optc.compiler.diagnostics import unknown_name
from optc.compiler.rewriting import Pass

NAMES = (
    "fuse-attention",
    "fuse-rotary",
    "fuse-norm",
    "merge-projections",
    "static-kv-cache",
    "fixed-kv-cache",
    "page-kv-cache",
    "quantize-rtn",
    "quantize-clip",
    "quantize-gptq",
    "quantize-auto",
    "tune-scales",
    "scale-awq",
    "scale-smoothquant",
    "rotate-inputs",
    "quantize-activations",
    "quantize-llm-int8",
    "quantize-fp8",
    "quantize-nf4",
    "quantize-nvfp4",
    "quantize-inputs",
    "quantize-kv-cache",
    "store-kv-codes",
    "round-scales",
    "legalize-ort",
    "legalize-inductor",
    "legalize-executorch",
    "pack-xnnpack",
    "legalize-trt",
    "round-activations",
)


def find_pass(name: str) -> type[Pass]:
    """The pass class of this name; hyphen and underscore are the same.

    Raises:
        UsageError: unknown, with the nearest name.
    """
    plain = name.replace("_", "-")
    if plain not in NAMES:
        raise unknown_name("pass", name, NAMES)
    module = importlib.import_module(f"optc.passes.{plain.replace('-', '_')}")
    for _, found in inspect.getmembers(module, inspect.isclass):
        if issubclass(found, Pass) and getattr(found, "name", None) == plain:
            return found
    raise AssertionError(f"passes/{plain.replace('-', '_')}.py holds no pass named {plain}")
