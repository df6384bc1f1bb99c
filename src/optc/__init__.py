"""optc: compile and export PyTorch models through gated, executable passes.

    import optc
    optc.compile("examples/fiction-3m", target="onnx-cpu", quant="rtn", output="out/fiction")
    print(optc.load("out/fiction").generate("The old man", max_new_tokens=32).text)

Names are loaded when used, so that `import optc` is quick and an artifact can be run without the
compiler.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from optc import torch_name

if TYPE_CHECKING:
    from optc.api import CompileResult, capture, compile, load
    from optc.commands import bench, evaluate, inspect, quantize, train
    from optc.compiler.diagnostics import OptcError
    from optc.compiler.ir.contract import Contract
    from optc.compiler.ir.program import Program
    from optc.compiler.pipeline.pipeline import Pipeline, PipelineOptions
    from optc.compiler.rewriting.passes import Match, Miss, Pass, PassContext, PassResult, Rule, apply_rules
    from optc.optimizing import optimize

# onnxruntime 1.32 keeps a database in the user's home and sends events, unless it is told not to before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {
    "optc.api": ("CompileResult", "capture", "compile", "load"),
    "optc.commands": ("bench", "evaluate", "inspect", "quantize", "train"),
    "optc.optimizing": ("optimize",),
    "optc.compiler.ir.contract": ("Contract",),
    "optc.compiler.diagnostics": ("OptcError",),
    "optc.compiler.pipeline.pipeline": ("Pipeline", "PipelineOptions"),
    "optc.compiler.ir.program": ("Program",),
    "optc.compiler.rewriting.passes": (
        "Match",
        "Miss",
        "Pass",
        "PassContext",
        "PassResult",
        "Rule",
        "apply_rules",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CompileResult",
    "Contract",
    "Match",
    "Miss",
    "OptcError",
    "Pass",
    "PassContext",
    "PassResult",
    "Pipeline",
    "PipelineOptions",
    "Program",
    "Rule",
    "apply_rules",
    "bench",
    "capture",
    "compile",
    "evaluate",
    "inspect",
    "load",
    "optimize",
    "quantize",
    "train",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("optc.compiler.version").version()
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'optc' has no attribute '{name}'")
    return getattr(importlib.import_module(home), name)


torch_name.announce()
