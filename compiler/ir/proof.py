"""What was measured when a captured program was compared with the model that it was captured from."""

from __future__ import annotations

import msgspec


class CaptureFigures(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One comparison of a program with the model's own forward, over the tokens that are not padding.

    Attributes:
        dtype: what both computed in.
        max_abs_diff: largest absolute difference of the outputs.
        scale: largest magnitude of the model's own outputs.
        relative: L2 norm of the difference over that of the model's own outputs.
        kl: mean KL(model || program) in nats per token. top1: share of equal argmax tokens. Both None without logits.
    """

    dtype: str
    max_abs_diff: float
    scale: float
    relative: float
    kl: float | None = None
    top1: float | None = None


class CaptureProof(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a captured program was held to the model's own forward.

    Attributes:
        proved: whether every comparison was within its tolerance. A program that fails one is not returned at all, so
            False means that nothing was compared: `notes` say why.
        reference: the model's class and its own attention implementation.
        inputs: what both were given: "ragged text, right padded", ...
        tokens: real tokens compared, over all inputs.
        figures: one comparison per dtype.
        notes: what the comparison did not reach, and why.
    """

    proved: bool
    reference: str = ""
    inputs: tuple[str, ...] = ()
    tokens: int = 0
    figures: tuple[CaptureFigures, ...] = ()
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
