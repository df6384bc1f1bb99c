"""linear(x, W1), linear(x, W2), ...  ->  split(linear(x, [W1; W2; ...]))"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec
import torch
from torch.fx import Node

from optc.compiler.analysis.dataflow import COPIES, MOVES, aten, peel, sole_user, value_of
from optc.compiler.analysis.linears import Linear, linear_site
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import add_weight, insert_call, replace_node
from optc.compiler.rewriting.passes import Match, Miss, Pass, PassContext, PassResult, Rule, apply_rules
from optc.compiler.rewriting.weights import prune_contract, record_weight

_DEQUANTIZE = {torch.ops.optc.dequantize.default: 3, torch.ops.optc.dequantize_float.default: 2}
"""Calls that make a weight of codes, row by row, and the number of their arguments."""
_EXPERT = "its weight is one of several experts: merged, the results of all would live at once"


@dataclass(frozen=True, kw_only=True)
class MergeProjections(Pass):
    """linear(x, W1), linear(x, W2), ...  ->  split_with_sizes(linear(x, cat(W1, W2, ...)), sizes)

    Query, key and value projections, gate and up: linears of one input become one, which reads the
    input once and keeps a machine busier at batch 1. Weights may be quantized, where they agree in
    bits, group size and symmetry. `matched` counts the merged linears that result.
    """

    name: ClassVar[str] = "merge-projections"

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Merge in a clone of `program`."""
        result = apply_rules(program, [_SameInput()])
        edited = prune_contract(result.program) if result.matched else program
        return dataclasses.replace(result, program=edited)


class _SameInput(Rule):
    """The first of several linears that read one input."""

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        site = linear_site(program, node)
        if site is None:
            return None
        siblings = _siblings(program, site)
        if len(siblings) < 2:
            return None
        reason = _obstacle(program, site)
        if reason:
            return Miss(node.name, reason)
        kind = _kind(program, site)
        alike = [item for item in siblings if not _obstacle(program, item) and _kind(program, item) == kind]
        if len(alike) < 2:
            return Miss(node.name, "the other linears of its input differ in type or quantization")
        if len({_sources(program, _names(program, item)) for item in alike}) < len(alike):
            return Miss(node.name, _EXPERT)
        return Match(node, {"sites": alike})

    def rewrite(self, program: Program, match: Match) -> None:
        sites: list[Linear] = match.found["sites"]
        first = sites[0].node
        rows = [int(value_of(site.node).shape[-1]) for site in sites]
        arguments = (sites[0].input, _merge_weights(program, sites), _merge_biases(program, sites, rows))
        merged = insert_call(program, first, aten.linear.default, arguments)
        parts = insert_call(program, first, aten.split_with_sizes.default, (merged, rows, -1))
        pieces = [insert_call(program, first, operator.getitem, (parts, i)) for i in range(len(sites))]
        for site, piece in zip(sites, pieces, strict=True):
            _allow_copies(site.node)
            replace_node(program, site.node, piece)


def _allow_copies(node: Node) -> None:
    """A piece is a strided slice; a view of it, or a view of a view, may need a copy where one of the whole did not."""
    for user in node.users:
        if user.op != "call_function" or user.target not in MOVES | COPIES:
            continue
        if user.target is aten.view.default:
            user.target = aten.reshape.default
        _allow_copies(user)


def _siblings(program: Program, site: Linear) -> list[Linear]:
    """The linears that read the same values as `site`, in graph order."""
    root = peel(site.input)
    found, pending = [], [root]
    while pending:
        for user in pending.pop().users:
            other = linear_site(program, user)
            if other is not None and peel(other.input) is root:
                found.append(other)
            elif other is None and user.op == "call_function" and peel(user) is root:
                pending.append(user)
    return sorted(found, key=lambda item: item.node)


def _parts(site: Linear) -> tuple[Node, ...]:
    """The weight, or codes, scale and zero (where there is one) of a quantized weight."""
    if site.weight.target not in _DEQUANTIZE:
        return (site.weight,)
    return tuple(item for item in site.weight.args if isinstance(item, Node))


def _names(program: Program, site: Linear) -> list[str]:
    names = [program.weight_of(part) for part in _parts(site)]
    return [name for name in names if name is not None]


def _obstacle(program: Program, site: Linear) -> str | None:
    """Why this linear can be merged with no other, or None."""
    parts, names = _parts(site), _names(program, site)
    if site.index is not None:
        return _EXPERT
    if site.transposed:
        return "its weight is stored [K, N]"
    if len(names) < len(parts):
        return "its weight is computed"
    if len({value_of(part).shape[0] for part in parts}) > 1:
        return "it has one scale for all of its rows"
    if sole_user(site.weight) is None or any(sole_user(part) is None for part in parts):
        return f"{names[0]} is read elsewhere too"
    if site.bias is not None and program.weight_of(site.bias) is None:
        return "its bias is computed"
    return None


def _kind(program: Program, site: Linear) -> tuple[Any, ...]:
    """What linears must have in common to be one."""
    entry = program.contract.quantization.get(_names(program, site)[0])
    method = entry.method if entry else ""
    types = tuple(value_of(part).dtype for part in _parts(site))
    return (method, types, site.columns, tuple(sorted(site.weight.kwargs.items())))


def _merge_weights(program: Program, sites: Sequence[Linear]) -> Node:
    """The weight of the merged linear: a placeholder, or a dequantization of merged codes."""
    table = [_names(program, site) for site in sites]
    merged = [_stack(program, names) for names in zip(*table, strict=True)]
    weight = sites[0].weight
    if weight.target not in _DEQUANTIZE:
        return merged[0]
    entries = [program.contract.quantization.get(names[0]) for names in table]
    present = [entry for entry in entries if entry is not None]
    name = program.weight_of(merged[0])
    if len(present) == len(sites) and name is not None:
        entry = msgspec.structs.replace(present[0], source=join_names([item.source for item in present]))
        record_weight(program, name, program.contract.sources[name], entry)
    arguments = [*merged, *[None] * (_DEQUANTIZE[weight.target] - len(merged))]
    return insert_call(program, sites[0].node, weight.target, arguments, dict(weight.kwargs))


def _merge_biases(program: Program, sites: Sequence[Linear], rows: Sequence[int]) -> Node | None:
    """One bias for all, with zeros for those that have none; None when none has."""
    names = [program.weight_of(site.bias) for site in sites]
    present = [program.weight(name) for name in names if name is not None]
    if not present:
        return None
    tensors = [
        present[0].new_zeros(count) if name is None else program.weight(name)
        for name, count in zip(names, rows, strict=True)
    ]
    joined = join_names([_names(program, site)[0] for site in sites])
    sources = _sources(program, [name for name in names if name is not None])
    return _add(program, f"{joined.rpartition('.')[0]}.bias", tensors, sources)


def _stack(program: Program, names: Sequence[str]) -> Node:
    tensors = [program.weight(name) for name in names]
    return _add(program, join_names(names), tensors, _sources(program, names))


def _add(program: Program, name: str, tensors: Sequence[torch.Tensor], sources: tuple[str, ...]) -> Node:
    record_weight(program, name, sources)
    return add_weight(program, name, torch.cat([tensor.detach() for tensor in tensors]))


def _sources(program: Program, names: Sequence[str]) -> tuple[str, ...]:
    table = program.contract.sources
    return tuple(dict.fromkeys(source for name in names for source in table.get(name, (name,))))


def join_names(names: Sequence[str]) -> str:
    """One name for several weights: what they share around what differs, joined by `+`.

    `a.q_proj.weight`, `a.k_proj.weight` -> `a.q_proj+k_proj.weight`.
    """
    rows = [name.split(".") for name in names]
    shortest = min(len(row) for row in rows)
    head = next((i for i in range(shortest) if len({row[i] for row in rows}) > 1), shortest - 1)
    room = shortest - head - 1
    tail = next((i for i in range(room) if len({row[-1 - i] for row in rows}) > 1), room)
    middle = "+".join(".".join(row[head : len(row) - tail]) for row in rows)
    return ".".join([*rows[0][:head], middle, *rows[0][len(rows[0]) - tail :]])
