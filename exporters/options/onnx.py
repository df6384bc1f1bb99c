"""Options of the targets onnx-cpu and onnx-cuda."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from optc.compiler.target.options import TargetOptions, head_bits


class OnnxOptions(TargetOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of the target onnx-cpu."""

    target: ClassVar[str] = "onnx-cpu"

    accuracy_level: Annotated[
        int,
        Meta(ge=0, le=4, description="Quantized kernels: 4 rounds activations to int8 (fast), 0 does not."),
    ] = 4
    head_bits: Annotated[Literal[4, 8, 32], head_bits(32, "floating point")] | None = None


class OnnxCudaOptions(TargetOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of the target onnx-cuda."""

    target: ClassVar[str] = "onnx-cuda"

    head_bits: Annotated[Literal[4, 8, 16], head_bits(16, "the compute type")] | None = None
