"""The targets by name and alias. A target module is imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from optc.compiler.diagnostics import unknown_name
from optc.compiler.target.target import Target

TARGETS = {
    "onnx-cpu": "optc.targets.onnx_cpu",
    "inductor-cpu": "optc.targets.inductor_cpu",
    "executorch": "optc.targets.executorch",
    "vllm": "optc.targets.vllm",
    "trtllm": "optc.targets.trtllm",
    "trt": "optc.targets.trt",
}
ALIASES = {
    "edge": "onnx-cpu",
    "onnx": "onnx-cpu",
    "inductor": "inductor-cpu",
    "pte": "executorch",
    "sglang": "vllm",
    "transformers": "vllm",
    "tensorrt-llm": "trtllm",
    "tensorrt": "trt",
    "rtx": "trt",
}


def find_target(name: str) -> Target:
    """The target of this name or alias; hyphen and underscore are the same.

    Raises:
        UsageError: unknown, with the nearest name.
    """
    plain = name.replace("_", "-")
    plain = ALIASES.get(plain, plain)
    if plain not in TARGETS:
        raise unknown_name("target", name, [*TARGETS, *ALIASES])
    target = importlib.import_module(TARGETS[plain]).TARGET
    assert isinstance(target, Target)
    return target


def all_targets() -> Iterator[Target]:
    """Every target, in registry order."""
    return (find_target(name) for name in TARGETS)


def installed_targets() -> Iterator[Target]:
    """The targets whose packages are installed."""
    for name in TARGETS:
        try:
            yield find_target(name)
        except ModuleNotFoundError:
            continue
