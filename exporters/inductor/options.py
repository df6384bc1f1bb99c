"""Options of the targets that run in Inductor."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from optc.compiler.target.options import MaxSeqLen, TargetOptions


class InductorOptions(TargetOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of the target inductor-cpu."""

    max_seq_len: MaxSeqLen | None = None
    accuracy_level: Annotated[
        int,
        Meta(ge=0, le=4, description="Quantized kernels: 4 rounds activations to int8 (fast), 0 does not."),
    ] = 4
