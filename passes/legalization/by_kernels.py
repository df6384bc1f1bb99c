"""Legalization for a device that runs ATen and has kernels of its own.

what a rule makes of it        where a kernel takes the result
the call as it is              where a kernel takes it
the op's form in plain ATen    elsewhere; a call without one stays, and is refused when legality is checked
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.fx import Node

import optc.compiler.kernels  # noqa: F401  (registers them)
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import drop_dead
from optc.compiler.kernels.kernel import Device, find_kernel
from optc.compiler.ops.library import OpSpec, find
from optc.compiler.rewriting.common_subexpressions import share_expressions
from optc.compiler.rewriting.inlining import inline_call
from optc.compiler.rewriting.passes import Match, Miss, PassResult, Rule
from optc.compiler.rewriting.weights import prune_contract


def legalize(program: Program, device: Device, rules: Sequence[Rule]) -> PassResult:
    """Bring a program into ATen and the ops that a device has kernels for.

    Args:
        rules: from canonical forms to packed ops that kernels exist for. A rule asks the kernel itself whether it
            takes what it would make.
    """
    edited = program.clone()
    sites = _spelled_out(edited, device)
    misses = _apply(edited, rules)
    calls = _spelled_out(edited, device)
    if not sites:
        return PassResult(program, 0, 0)
    left = sum(spec.makes_weight for _, spec in calls)
    for node, spec in calls:
        _inline(edited, node, spec)
    share_expressions(edited)  # positions and masks are the same in every layer
    drop_dead(edited)
    notes = (f"{left} weights are dequantized before each use",) if left else ()
    return PassResult(prune_contract(edited).changed(), len(sites), len(sites), tuple(misses), notes)


def _spelled_out(program: Program, device: Device) -> list[tuple[Node, OpSpec]]:
    """The calls that no kernel takes and that have a form in plain ATen, in graph order."""
    found = ((node, find(node.target)) for node in program.graph.nodes)
    return [
        (node, spec)
        for node, spec in found
        if spec is not None and spec.aten is not None and not _has_kernel(node, device)
    ]


def _has_kernel(node: Node, device: Device) -> bool:
    kernel = find_kernel(node.target, device)
    return kernel is not None and kernel.obstacle(node) is None


def _apply(program: Program, rules: Sequence[Rule]) -> list[Miss]:
    """Rewrite what the rules match; the rest is returned, with reasons."""
    misses = []
    for rule in rules:
        for node in list(program.graph.nodes):
            found = rule.match(program, node)
            if isinstance(found, Match):
                rule.rewrite(program, found)
            elif found is not None:
                misses.append(found)
    drop_dead(program)
    return misses


def _inline(program: Program, node: Node, spec: OpSpec) -> None:
    """Spell out a call, or each of its results where it is read."""
    form = spec.aten
    assert form is not None
    if len(spec.op._schema.returns) == 1:
        inline_call(program, node, form)
        return
    for user in list(node.users):
        assert user.target is operator.getitem
        index = user.args[1]
        assert isinstance(index, int)
        user.args, user.kwargs = node.args, node.kwargs
        inline_call(program, user, _result(form, index))
    program.graph.erase_node(node)


def _result(form: Callable[..., Any], index: int) -> Callable[..., Tensor]:
    def result(*args: Any, **kwargs: Any) -> Tensor:
        part = form(*args, **kwargs)[index]
        assert isinstance(part, Tensor)
        return part

    return result
