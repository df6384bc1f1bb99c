"""Files beside a TensorRT graph: the runner, the check of a device, and the build by trtexec."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path
from typing import Any

from optc.compiler.diagnostics import os_errors

RUNNER, CHECK, SCRIPT = "run_trt.py", "check.py", "build.sh"
_SOURCES = {RUNNER: "run_trt.py", CHECK: "check_device.py"}
_HEAD = """#!/bin/sh
# Builds model.plan from model.onnx with trtexec, where its Python package is not installed:
#   sh build.sh [more options of trtexec]
# trtexec does not write engine.json: programs of your own read the plan, run_trt.py wants build_plan.py's.
set -eu
cd "$(dirname "$0")"
trtexec=$(command -v trtexec || echo /usr/src/tensorrt/bin/trtexec)
if [ ! -x "$trtexec" ]; then
  echo "error: trtexec is neither on the PATH nor in /usr/src/tensorrt/bin" >&2
  exit 4
fi
"""


def write_companions(directory: Path, engine: dict[str, Any]) -> list[str]:
    """Write run_trt.py, check.py and build.sh into an artifact's folder; returns their names.

    Args:
        engine: the object of engine.json.

    Raises:
        ResourceError, InputError: the disk is full or not writable.
    """
    with os_errors("writing the scripts of the plan", str(directory)):
        for name, source in _SOURCES.items():
            with resources.as_file(resources.files("optc.runtime.carried") / source) as path:
                shutil.copyfile(path, directory / name)
        script = directory / SCRIPT
        script.write_text(build_script(engine))
        script.chmod(0o755)
    return [*_SOURCES, SCRIPT]


def build_script(engine: dict[str, Any]) -> str:
    """build.sh: trtexec with the profiles and types of the graph.

    What the installed trtexec knows is read off its help. One that lets TensorRT choose types is allowed the graph's,
    a newer one is told to keep them. One that builds a single profile gets the widest.
    """
    rows = engine["profiles"]
    widest = max(range(len(rows)), key=lambda index: int(rows[index]["tokens"][2]))
    each = " ".join(f"--profile={index} {_shapes(engine, index)}" for index in range(len(rows)))
    return f"""{_HEAD}help=$("$trtexec" --help 2>&1 || true)
types='{_weak(engine)}'
profiles='{_shapes(engine, widest)}'
case $help in *--stronglyTyped*) types=--stronglyTyped ;; esac
case $help in *--useProfile*) profiles='{each}' ;; esac
# shellcheck disable=SC2086
exec "$trtexec" --onnx=model.onnx --saveEngine=model.plan --skipInference $types $profiles "$@"
"""


def _weak(engine: dict[str, Any]) -> str:
    """What a TensorRT that chooses types itself may choose."""
    flags = {"fp16": ["--fp16"], "bf16": ["--bf16"], "fp32": []}[engine["dtype"]]
    if engine["network"]["dequantize"]:
        flags.append("--int8")
    return " ".join(flags)


def _shapes(engine: dict[str, Any], index: int) -> str:
    """--minShapes=..., --optShapes=... and --maxShapes=... of one profile, over every input."""
    row = engine["profiles"][index]
    options = []
    for end, option in enumerate(("minShapes", "optShapes", "maxShapes")):
        sizes = {axis: row[axis][end] for axis in ("batch", "tokens")}
        shapes = [
            f"{name}:" + "x".join(str(sizes.get(size, size)) for size in spec["dims"])
            for name, spec in engine["inputs"].items()
        ]
        options.append(f"--{option}={','.join(shapes)}")
    return " ".join(options)
