"""What AOTInductor can run: every ATen operator, sizes, and the ops that the C++ library has a kernel for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from optc.compiler.target.target import Predicate

OP_LIBRARY_OPS = ("paged_attention_", "linear_nbits")
"""Ops of the dialect with a kernel in `csrc/`."""


class _AtenAndLibrary(Mapping[Any, Predicate | None]):
    """Operators by namespace: a table of all of ATen would only repeat torch's."""

    def __contains__(self, target: object) -> bool:
        if isinstance(target, torch._ops.OpOverload):
            name = target._schema.name
            return name.split("::")[0] in ("aten", "prims") or name in self._library()
        return getattr(target, "__module__", None) in ("_operator", "math", "torch")  # arithmetic on sizes

    def __getitem__(self, target: Any) -> Predicate | None:
        if target not in self:
            raise KeyError(target)
        return None

    def _library(self) -> list[str]:
        return [f"optc::{name}" for name in OP_LIBRARY_OPS]

    def __iter__(self) -> Iterator[Any]:
        return iter(getattr(torch.ops.optc, name).default for name in OP_LIBRARY_OPS)

    def __len__(self) -> int:
        return len(OP_LIBRARY_OPS)


LEGAL: Mapping[Any, Predicate | None] = _AtenAndLibrary()
