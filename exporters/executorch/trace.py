"""A decoder with a linear cache, as ExecuTorch's own runners call it: forward(tokens [1,S], start [1]) -> logits.

Caches become state of the program, of fixed capacity; a call writes the places from `start` on. Batch is one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from optc.compiler.ir.contract import CACHE_ROLES, Input
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.retrace import Replay
from optc.exporters.executorch.forms import Forms, constant_tables


class _Shell(torch.nn.Module):
    """A program as a submodule, with caches [1,Hkv,C,D] and constants beside it, and the new forward."""

    def __init__(self, program: Program, capacity: int) -> None:
        super().__init__()
        self.inner = program.module()
        self._program, self._capacity = program, capacity
        caches = {
            spec.name.replace(".", "_"): _zeros(spec, capacity)
            for spec in program.contract.inputs
            if spec.role in CACHE_ROLES
        }
        tables = constant_tables(program, capacity)
        for name, tensor in (caches | tables).items():
            self.register_buffer(name, tensor)
        self._caches, self._tables = list(caches), list(tables)

    def forward(self, tokens: Tensor, start: Tensor) -> Tensor:
        size = tokens.shape[1]
        position = start[0] + torch.arange(size)
        tables = {name: getattr(self, name) for name in self._tables}
        forms = Forms(self._program, position, self._capacity, tables)
        mask = (torch.arange(self._capacity) < start[0] + size).long()[None]
        caches = [getattr(self, name) for name in self._caches]
        replay = Replay(self._program, forms.handlers())
        logits: Tensor = replay.outputs(tokens, mask, *caches)[0]
        return logits


def _zeros(spec: Input, capacity: int) -> Tensor:
    _, heads, _, width = spec.dims
    return torch.zeros((1, int(heads), capacity, int(width)), dtype=getattr(torch, spec.dtype))


def trace(program: Program, capacity: int, chunk: int) -> ExportedProgram:
    """The ExportedProgram that ExecuTorch lowers.

    Args:
        program: of kind decoder with a linear cache written in place, in float32.
        capacity: C, most tokens of a sequence. chunk: most tokens of one call.
    """
    shell = _Shell(program, capacity)
    example = (torch.zeros((1, min(7, chunk)), dtype=torch.long), torch.zeros(1, dtype=torch.long))
    shapes: Any = ({1: Dim("tokens", min=1, max=chunk)}, None)
    with torch.no_grad():
        exported = torch.export.export(
            shell,
            example,
            dynamic_shapes=shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    for node in reversed(list(exported.graph.nodes)):
        if "_assert" in str(node.target) and not node.users:
            exported.graph.erase_node(node)
    exported.graph.eliminate_dead_code()
    return exported
