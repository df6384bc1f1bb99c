"""Options of the target trt."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from optc.compiler.target.options import MaxSeqLen, TargetOptions


class TrtOptions(TargetOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of the target trt."""

    target: ClassVar[str] = "trt"

    max_seq_len: MaxSeqLen | None = None
    max_batch: Annotated[int, Meta(ge=1, le=1 << 20, description="Sequences of one call.")] = 4
    arch: (
        Annotated[
            str,
            Meta(description="TensorRT for RTX: sm80,sm89,... or portable.", extra={"default": "portable"}),
        ]
        | None
    ) = None
    trt_ops: Annotated[
        Literal["auto", "fused", "basic"],
        Meta(description="Operators: fused, basic (for TensorRT 8.6 to 10.13) or auto."),
    ] = "auto"
    trt_runtime: Annotated[
        Literal["auto", "tensorrt", "rtx", "none"],
        Meta(description="TensorRT that builds the plan; none: build later, on the device."),
    ] = "auto"
