"""op(x, ...)  ->  the ATen operators that it is made of, where the target has no lowering for it

The decompositions are torch's own: those of torch.export, of `torch/_decomp`, and the definitions of composite
operators. They are applied until the target can run what is left, one operator at a time.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from optc.compiler.compat import decomposition
from optc.compiler.diagnostics import OptcError
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import drop_dead
from optc.compiler.rewriting.in_place import without_writing
from optc.compiler.rewriting.inlining import InliningError, inline_call
from optc.compiler.rewriting.passes import Miss, Pass, PassContext, PassResult

_ROUNDS = 12
"""How deep decompositions may lie in each other; an operator that is made of itself ends there."""


@dataclass(frozen=True, kw_only=True)
class Decompose(Pass):
    """op(x, ...) -> the ATen operators that it is made of, where the target has no lowering for it

    Without a target everything becomes what torch calls core ATen.
    """

    name: ClassVar[str] = "decompose"

    def run(self, program: Program, context: PassContext) -> PassResult:
        edited = program.clone()
        obstacle = context.obstacle or _not_core
        misses: dict[str, Miss] = {}
        made: collections.Counter[str] = collections.Counter()
        for _ in range(_ROUNDS):
            calls = [node for node in edited.graph.nodes if _is_aten(node) and node.name not in misses]
            sites = [node for node in calls if obstacle(node) is not None]
            for node in sites:
                name, miss = str(node.target), _decomposed(edited, node)
                if miss is not None:
                    misses[node.name] = miss
                elif getattr(node, "_erased", False):  # else it was written in another form
                    made[name] += 1
            if not sites:
                break
            drop_dead(edited)
        if not made:
            return PassResult(program, 0, len(misses), tuple(misses.values()))
        matched = made.total()
        notes = (f"decomposed: {', '.join(f'{name} ({count})' for name, count in sorted(made.items()))}",)
        return PassResult(edited.changed(), matched, matched + len(misses), tuple(misses.values()), notes)


def _is_aten(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten"


def _not_core(node: Node) -> str | None:
    """Without a target: whether an operator is none of core ATen."""
    return None if torch.Tag.core in node.target.tags else "it is not core ATen"


def _decomposed(program: Program, node: Node) -> Miss | None:
    """Put what a call is made of in its place, or say why it stays."""
    if node.target._schema.is_mutable:  # definitions write into what they have made
        written = str(node.target)
        without_writing(program, node)
        return Miss(node.name, f"{written} writes in place") if node.target._schema.is_mutable else None
    function = decomposition(node.target)
    if function is None:
        return Miss(node.name, f"{node.target} has no decomposition")
    try:
        inline_call(program, node, function, composite=False, any_size=True)
    except (InliningError, OptcError, RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return Miss(node.name, f"{node.target} cannot be decomposed: {reason}")
    return None
