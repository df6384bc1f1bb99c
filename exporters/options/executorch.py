"""Options of the target executorch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from optc.compiler.target.options import MaxSeqLen, TargetOptions


class ExecutorchOptions(TargetOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of the target executorch."""

    target: ClassVar[str] = "executorch"

    max_seq_len: MaxSeqLen | None = None
    head_bits: (
        Annotated[
            Literal[8, 32],
            Meta(
                description="Bits of the embedding and the head, with a scale for each row; 32 leaves them in floating point. "
                "A table that the model ties is stored for each of the two.",
                extra={"default": "8 with --quant, else 32"},
            ),
        ]
        | None
    ) = None
