"""linear(x, W)  ->  linear(x, dequantize(codes, scale, zero)), codes by rounding to nearest."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch.fx import Node

from optc.compiler.contract import WeightQuantization
from optc.compiler.dataflow import aten, readers
from optc.compiler.diagnostics import InputError
from optc.compiler.linears import LINEARS, Linear, chooses_experts, head_linear, linear_site, linear_sites
from optc.compiler.program import Program
from optc.compiler.quantize import check_bits, check_group_size, default_group_size, quantize_groups
from optc.compiler.rewriting import Match, Miss, Pass, PassContext, PassResult, Rule, apply_rules
from optc.compiler.surgery import add_weight, insert_call, replace_call
from optc.compiler.weights import prune_contract, record_weight


@dataclass(frozen=True, kw_only=True)
class QuantizeRtn(Pass):
    """linear(x, W)  ->  linear(x, optc.dequantize(codes, scale, zero, bits=, group_size=))

    Weights whose every reader is a linear are quantized, stacked experts one by one. Left alone: the
    linear that makes the logits (its errors reach the output undamped), the routers of experts (a
    changed choice is no small error), weights that an embedding reads too.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: neighbours along K that share a scale; 0 is a whole row; None takes the largest of
            128, 64 and 32 that divides the K of every quantized linear.
        symmetric: no zero point.
        ignore: patterns (`*.down_proj.*`) of weight names to leave alone.
        head: quantize the linear that makes the logits too. One that is tied with the embedding gets
            codes of its own; the embedding keeps its tensor.
    """

    name: ClassVar[str] = "quantize-rtn"
    lossy: ClassVar[bool] = True

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = True
    ignore: tuple[str, ...] = ()
    head: bool = False

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.group_size is not None:
            check_group_size(self.group_size, [])

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Quantize a clone of `program`.

        Raises:
            InputError: the group size does not divide a K (names the weight), or a weight is not finite.
        """
        sites = list(linear_sites(program))
        head = head_linear(program)
        rule = _RoundToNearest(self, head.name if head and not self.head else "")
        chosen = [site for site in sites if isinstance(rule.match(program, site.node), Match)]
        columns, names = [site.columns for site in chosen], [_weight_name(program, site) for site in chosen]
        notes = self._unused_patterns(program, sites)
        if self.group_size is not None:
            check_group_size(self.group_size, columns, names)
            rule.group_size = self.group_size
        elif chosen:
            rule.group_size = default_group_size(columns, names)
            notes.append(f"group size {rule.group_size}: the largest of 128, 64, 32 that divides every K")
        result = apply_rules(program, [rule])
        kept = [site for site in sites if site.node.name == rule.head]
        if kept and not any(miss.node == rule.head for miss in result.misses):
            name = _weight_name(program, kept[0])
            notes.append(f"{name} makes the logits and stays as it is (head=True quantizes it)")
        edited = prune_contract(result.program) if result.matched else program
        return dataclasses.replace(result, program=edited, candidates=len(sites), notes=tuple(notes))

    def _unused_patterns(self, program: Program, sites: list[Linear]) -> list[str]:
        names = [_weight_name(program, site) for site in sites if site.placeholder]
        unused = [item for item in self.ignore if not any(fnmatchcase(name, item) for name in names)]
        return [f"ignore pattern '{item}' fits no weight of a linear" for item in unused]


def _weight_name(program: Program, site: Linear) -> str:
    name = program.weight_of(site.placeholder)
    assert name is not None
    return name


class _RoundToNearest(Rule):
    """One linear. `group_size` is set once the widths of all matched linears are known."""

    def __init__(self, options: QuantizeRtn, head: str) -> None:
        self.options, self.head, self.group_size = options, head, 0
        self._made: dict[str, Node] = {}

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        site = linear_site(program, node)
        if site is None:
            return None
        if site.placeholder is None:
            return Miss(node.name, "its weight is quantized already")
        name = _weight_name(program, site)
        pattern = next((item for item in self.options.ignore if fnmatchcase(name, item)), None)
        if pattern is not None:
            return Miss(node.name, f"{name} is ignored ('{pattern}')")
        others = sorted({str(user.target) for user in _calls(site.placeholder) if user.target not in LINEARS})
        tied = str(aten.embedding.default) in others
        if node.name == self.head:
            reason = f"{name} is tied with the embedding (head=True quantizes a copy)"
            return Miss(node.name, reason) if tied else None
        if others and not (self.options.head and head_linear(program) is node):
            return Miss(node.name, f"{name} is read by {', '.join(others)} too")
        if chooses_experts(program, node):
            return Miss(node.name, f"{name} routes tokens to experts")
        return Match(node, {"site": site, "name": name})

    def rewrite(self, program: Program, match: Match) -> None:
        site: Linear = match.found["site"]
        name = match.found["name"] if site.index is None else f"{match.found['name']}_{site.index}"
        if name not in self._made:
            self._made[name] = self._dequantize(program, site, match.found["name"], name)
        replace_call(program, site.node, aten.linear.default, (site.input, self._made[name], site.bias))

    def _dequantize(self, program: Program, site: Linear, source: str, name: str) -> Node:
        """Add codes, scale and zero of a weight, and the call that makes the weight of them."""
        options = self.options
        weight = program.weight(source)
        weight = weight if site.index is None else weight[site.index]
        weight = weight.t() if site.transposed else weight
        try:
            codes, scale, zero = quantize_groups(weight, options.bits, self.group_size, options.symmetric)
        except InputError as error:
            raise InputError(error.what, where=source, why=error.why, remedy=error.remedy) from error
        sources = program.contract.sources.get(source, (source,))
        entry = WeightQuantization(
            method="rtn",
            bits=options.bits,
            group_size=self.group_size,
            symmetric=options.symmetric,
            source=source,
        )
        parts: list[Node | None] = []
        for suffix, tensor in (("codes", codes), ("scale", scale), ("zero", zero)):
            if tensor is None:
                parts.append(None)
                continue
            # Beside the weight, not below it: a tied weight stays, and a name is a leaf or a branch.
            parts.append(add_weight(program, f"{name}_{suffix}", tensor))
            record_weight(program, f"{name}_{suffix}", sources, entry if suffix == "codes" else None)
        knobs = {"bits": options.bits, "group_size": self.group_size}
        return insert_call(program, site.node, torch.ops.optc.dequantize.default, parts, knobs)


def _calls(placeholder: Node) -> list[Node]:
    """The calls that read a weight, looking through the selection of one expert."""
    return [
        call
        for reader in readers(placeholder)
        for call in (readers(reader) if reader.target is aten.select.int else [reader])
    ]
