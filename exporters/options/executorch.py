"""Options of the target executorch."""

from __future__ import annotations

from typing import ClassVar

from optc.compiler.target.options import MaxSeqLen, TargetOptions


class ExecutorchOptions(TargetOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of the target executorch."""

    target: ClassVar[str] = "executorch"

    max_seq_len: MaxSeqLen | None = None
