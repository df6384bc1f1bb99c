"""rms_norm(x, w)  ->  x * rsqrt(linear(x * x, 1/K) + eps) * w

XNNPACK averages images only, so that an ordinary norm would cut each layer in pieces, and every piece is handed over
on its own. As a product with a row of 1/K the mean stays inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.dataflow import value_of
from optc.compiler.ir.devices import program_device
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import add_weight, drop_dead
from optc.compiler.rewriting.inlining import inline_call
from optc.compiler.rewriting.passes import Miss, Pass, PassContext, PassResult

_NORM = torch.ops.aten.rms_norm.default


@dataclass(frozen=True, kw_only=True)
class LegalizeExecutorch(Pass):
    """rms_norm(x, w) -> x * rsqrt(linear(x * x, 1/K) + eps) * w"""

    name: ClassVar[str] = "legalize-executorch"

    def run(self, program: Program, context: PassContext) -> PassResult:
        edited = program.clone()
        rows: dict[int, Node] = {}
        misses, sites = [], edited.calls(_NORM)
        for node in sites:
            shape: Any = node.args[1]
            if len(shape) != 1:
                misses.append(Miss(node.name, f"it runs over {len(shape)} axes, not one"))
                continue
            size = int(shape[0])
            if size not in rows:
                kind = value_of(node).dtype
                rows[size] = add_weight(
                    edited,
                    f"mean_of_{size}",
                    torch.full((1, size), 1.0 / size, dtype=kind, device=program_device(program)),
                )
            inline_call(edited, node, _norm, rows[size])
        matched = len(sites) - len(misses)
        if not matched:
            return PassResult(program, 0, len(sites), tuple(misses))
        drop_dead(edited)
        return PassResult(edited.changed(), matched, len(sites), tuple(misses))


def _norm(row: Tensor, x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    mean = torch.nn.functional.linear(x * x, row)
    scale = torch.rsqrt(mean + (torch.finfo(x.dtype).eps if eps is None else eps))
    return x * scale if weight is None else x * scale * weight
