"""What goes into an ExecuTorch program: ATen, and the ops of the dialect that have a form here.

Which ATen operators the runtime has a kernel for is seen only after lowering, when most of them are XNNPACK's: the
exporter asks the installed runtime then (see `lower.py`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from optc.compiler.diagnostics import TargetError
from optc.compiler.ops.attention_arguments import CHUNKS_REFUSED
from optc.compiler.target.target import Predicate

_optc = torch.ops.optc


def _plain_attention(node: torch.fx.Node) -> str | None:
    if node.args[7] is not None:
        return "attention sinks are not lowered"
    return CHUNKS_REFUSED if node.kwargs["window"] < 0 else None


DIALECT: dict[Any, Predicate | None] = {
    _optc.cached_attention_.default: _plain_attention,
    _optc.rotary.default: None,
    _optc.linear_dynamic.default: None,
}
"""Ops of the dialect that `forms.Forms` answers, which it asserts, and what it does not take of them."""


class _AtenAndForms(Mapping[Any, Predicate | None]):
    """Operators by namespace: a table of all of ATen would only repeat torch's."""

    def __contains__(self, target: object) -> bool:
        if isinstance(target, torch._ops.OpOverload):
            return target in DIALECT or target._schema.name.split("::")[0] in ("aten", "prims")
        return getattr(target, "__module__", None) in ("_operator", "math", "torch")  # arithmetic on sizes

    def __getitem__(self, target: Any) -> Predicate | None:
        if target not in self:
            raise KeyError(target)
        return DIALECT.get(target)

    def __iter__(self) -> Iterator[Any]:
        return iter(DIALECT)

    def __len__(self) -> int:
        return len(DIALECT)


LEGAL: Mapping[Any, Predicate | None] = _AtenAndForms()


def require_executorch() -> None:
    """Raise a TargetError where the package is not installed, before any work is spent."""
    if importlib.util.find_spec("executorch") is None:
        raise TargetError("ExecuTorch is not installed", remedy='pip install "optc[executorch]"')
