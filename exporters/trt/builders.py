"""Which TensorRT builds a plan, and which operators it is given."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import re
from dataclasses import dataclass
from typing import Literal, cast

from optc.compiler.diagnostics import TargetError
from optc.exporters.options.trt import TrtOptions
from optc.exporters.trt.build_plan import FIRST_VERSIONS, PACKAGES, version_of

Runtime = Literal["tensorrt", "rtx", "none"]
PORTABLE = "portable"
RTX_ARCHITECTURES = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""What TensorRT for RTX 1.7 compiles for."""
_INSTALL = 'pip install "optc[trt]" (TensorRT for RTX, which builds without a GPU)'
_WITHOUT = "or --trt-runtime none: the folder with model.onnx and build_plan.py, to build the plan on the device"


@dataclass(frozen=True)
class Choice:
    """What an export writes.

    Attributes:
        ops: op set, "fused" or "basic".
        runtime: the builder; "none" builds nothing.
        architectures: compute capabilities of TensorRT for RTX, () for a portable plan.
    """

    ops: str
    runtime: Runtime
    architectures: tuple[str, ...] = ()


def choose(options: TrtOptions) -> Choice:
    """The builder and the op set for options; nothing is built.

    `auto` takes standard TensorRT where it and a GPU are present, else TensorRT for RTX. The op set follows the
    builder: `basic` for standard TensorRT before 10.15, else `fused`.

    Raises:
        TargetError: no builder is installed, it cannot run here, or it does not take the op set or an architecture.
    """
    ops: str = options.trt_ops
    runtime: str = options.trt_runtime
    architectures = _architectures(options.arch)
    if runtime == "auto":
        runtime = _first_runtime(ops)
    elif runtime != "none" and not _installed(runtime):
        raise TargetError(f"{_title(runtime)} is not installed", remedy=f"{_remedy(runtime)}, {_WITHOUT}")
    if runtime == "tensorrt" and not _has_gpu():
        raise TargetError(
            "standard TensorRT builds on the GPU that runs the plan, and there is none here",
            remedy=f"--trt-runtime rtx, {_WITHOUT}",
        )
    if ops == "auto":
        ops = "basic" if runtime == "tensorrt" and _version() < FIRST_VERSIONS["fused"] else "fused"
    if runtime == "tensorrt" and _version() < FIRST_VERSIONS[ops]:
        raise TargetError(
            f"TensorRT {'.'.join(map(str, _version()))} does not parse the op set '{ops}'",
            remedy="use --trt-ops basic, or TensorRT 10.15 or newer",
        )
    if architectures and runtime != "rtx":
        raise TargetError(
            "--arch is for TensorRT for RTX",
            why="standard TensorRT builds for the GPU that is present" if runtime == "tensorrt" else "no plan is built",
            remedy="leave --arch out",
        )
    return Choice(ops, cast(Runtime, runtime), architectures)


def _first_runtime(ops: str) -> str:
    """The builder of `auto`."""
    if _installed("tensorrt") and _has_gpu() and (ops != "fused" or _version() >= FIRST_VERSIONS["fused"]):
        return "tensorrt"
    if ops == "basic":
        raise TargetError(
            "--trt-ops basic is for standard TensorRT, which is not usable here",
            why="it needs the package tensorrt and an NVIDIA GPU",
            remedy="--trt-runtime none, and build_plan.py on the device; or --trt-runtime rtx",
        )
    if _installed("rtx"):
        return "rtx"
    raise TargetError("no installed TensorRT can build a plan here", remedy=f"{_INSTALL}, {_WITHOUT}")


def _architectures(text: str | None) -> tuple[str, ...]:
    """sm80,sm89 as names; () for portable.

    Raises:
        TargetError: one that TensorRT for RTX does not compile for.
    """
    if text is None or text == PORTABLE:
        return ()
    names = tuple(dict.fromkeys(re.sub(r"[ _.]", "", item.lower()) for item in text.split(",") if item))
    for name in names:
        if name not in RTX_ARCHITECTURES:
            near = {"sm90": "an H100 or H200", "sm100": "a B200", "sm87": "a Jetson Orin"}.get(name, "such a GPU")
            raise TargetError(
                f"TensorRT for RTX does not support the architecture {name}",
                why=f"{near} needs standard TensorRT" if name.startswith("sm") else None,
                remedy=f"it takes {', '.join(RTX_ARCHITECTURES)} and {PORTABLE}; for others --trt-runtime none, and "
                "build_plan.py on the device",
            )
    return names


def _installed(runtime: str) -> bool:
    return any(importlib.util.find_spec(name) is not None for name in PACKAGES[runtime])


def _title(runtime: str) -> str:
    return {"tensorrt": "standard TensorRT", "rtx": "TensorRT for RTX"}[runtime]


def _remedy(runtime: str) -> str:
    return _INSTALL if runtime == "rtx" else "install NVIDIA's package tensorrt on the device"


def _version() -> tuple[int, int]:
    return version_of(importlib.import_module("tensorrt"))


def _has_gpu() -> bool:
    """Whether the CUDA driver is there and sees a device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
