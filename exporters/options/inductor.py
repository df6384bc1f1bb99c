"""Options of the targets that run in Inductor."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from optc.compiler.ir.draft_tree import MOST_NODES
from optc.compiler.target.options import DraftedOptions, MaxSeqLen, head_bits


class InductorOptions(DraftedOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of the target inductor-cpu."""

    target: ClassVar[str] = "inductor-cpu"

    max_seq_len: MaxSeqLen | None = None
    accuracy_level: Annotated[
        int,
        Meta(ge=0, le=4, description="Quantized kernels: 4 rounds activations to int8 (fast), 0 does not."),
    ] = 4
    head_bits: Annotated[Literal[4, 8, 32], head_bits(32, "the compute type")] | None = None
    speculative_tree: (
        Annotated[
            int,
            Meta(
                ge=1,
                le=MOST_NODES,
                description="With --medusa: carry a tree of so many guesses of the heads, those that were right most often on "
                "calibration text; they are verified in one step.",
                extra={"default": "none: a chain"},
            ),
        ]
        | None
    ) = None


class CudaOptions(DraftedOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of the target inductor-cuda."""

    target: ClassVar[str] = "inductor-cuda"

    head_bits: Annotated[Literal[4, 8, 16], head_bits(16, "the compute type")] | None = None
