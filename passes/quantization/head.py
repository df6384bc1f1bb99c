"""embedding(W, ids), linear(x, W)  ->  embedding(dequantize(codes, scale, zero), ids), linear(x, the same)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypedDict

import torch
from torch.fx import Node

from optc.compiler.analysis.dataflow import readers
from optc.compiler.analysis.linears import Linear, linear_site
from optc.compiler.analysis.name_patterns import fits
from optc.compiler.analysis.weight_parts import EMBEDDING, is_token_lookup, logits_linear
from optc.compiler.formats.group_sizes import check_group_size
from optc.compiler.formats.integer import check_finite_weight
from optc.compiler.ir.contract import WeightQuantization
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import drop_dead, replace_call
from optc.compiler.pipeline.quantization_summary import linear_record
from optc.compiler.rewriting.budget import Budget
from optc.compiler.rewriting.passes import Miss, Pass, PassContext, PassResult
from optc.compiler.rewriting.quantization_record import LinearRecord
from optc.compiler.rewriting.weights import prune_contract
from optc.passes.quantization.arithmetic.budgets import head_budget
from optc.passes.quantization.arithmetic.grid import full_range, search
from optc.passes.quantization.arithmetic.groups import weight_rows
from optc.passes.quantization.arithmetic.selection import (
    dequantized,
    dequantized_before,
    read_instead,
    weight_name,
)

DEQUANTIZE = torch.ops.optc.dequantize
GROUP_SIZES = (128, 64, 32, 16)
"""Those that are tried in turn."""


class _Form(TypedDict):
    bits: int
    group_size: int
    symmetric: bool


@dataclass(frozen=True, kw_only=True)
class QuantizeHead(Pass):
    """embedding(W, ids), linear(x, W)  ->  both of optc.dequantize(codes, scale, zero, bits=, group_size=)

    The two weights of a language model that other passes leave alone: the table that tokens are looked up in, and the
    linear that makes the logits. Where they are one tensor, there is one set of codes, and both read it. Codes are
    rounded to the nearest, of 4 bits on the range of least error; scales are float16 numbers where float16 can hold
    them.

    Attributes:
        bits: of a code.
        group_size: neighbours along K that share a scale, at most: where it does not divide K, the largest of 128, 64,
            32 and 16 below it that does.
        symmetric: no zero point.
        signed: of 4 bits, see `QuantizeRtn`.
        ignore: patterns (`lm_head.*`) of weight names to leave alone.
    """

    name: ClassVar[str] = "quantize-head"
    lossy: ClassVar[bool] = True

    bits: Literal[4, 8] = 8
    group_size: int = GROUP_SIZES[0]
    symmetric: bool = True
    signed: bool = False
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_group_size(self.group_size, [])

    def budget(self, before: Program) -> Budget:
        return head_budget(self.bits)

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Quantize a clone of `program`.

        Raises:
            InputError: a weight is not finite; names it.
        """
        sites = _sites(program)
        reasons = {site.node: self._obstacle(program, site, {item.node for item in sites}) for site in sites}
        misses = tuple(Miss(node.name, reason) for node, reason in reasons.items() if reason)
        chosen = [site for site in sites if not reasons[site.node]]
        if not chosen:
            return PassResult(program, 0, len(sites), misses)
        edited, taken = program.clone(), {site.node.name for site in chosen}
        with torch.no_grad():
            made = [self._quantize(edited, site) for site in _sites(edited) if site.node.name in taken]
        drop_dead(edited)
        edited = prune_contract(edited.changed())
        records = tuple(record for record in made if record is not None)
        return PassResult(edited, len(chosen), len(sites), misses, linears=records)

    def size_for(self, columns: int) -> int | None:
        """The group size of a weight [N, columns]; None when no group divides it."""
        sizes = (self.group_size, *(size for size in GROUP_SIZES if size < self.group_size))
        return next((size for size in sizes if not size or columns % size == 0), None)

    def _obstacle(self, program: Program, site: Linear, sites: set[Node]) -> str | None:
        if site.placeholder is None:
            return "its weight is already quantized"
        name = weight_name(program, site)
        pattern = next((item for item in self.ignore if fits(name, item)), None)
        if pattern is not None:
            return f"{name} is ignored ('{pattern}')"
        if f"{name}_codes" in program.exported.state_dict:
            return f"another reader of {name} has codes of its own"
        others = sorted({str(reader.target) for reader in readers(site.placeholder) if reader not in sites})
        if others:
            return f"{name} is read by {', '.join(others)} too"
        if self.size_for(site.columns) is None:
            return f"no group of {', '.join(map(str, GROUP_SIZES))} divides the {site.columns} columns of {name}"
        return None

    def _quantize(self, program: Program, site: Linear) -> LinearRecord | None:
        """Put codes in place of one reader's weight; their record, None where an earlier reader has made them."""
        weight, record = dequantized_before(program, site), None
        if weight is None:
            weight, record = self._round(program, site)
        if site.node.target is EMBEDDING:
            replace_call(program, site.node, EMBEDDING, (weight, *site.node.args[1:]), dict(site.node.kwargs))
        else:
            read_instead(program, site, weight)
        return record

    def _round(self, program: Program, site: Linear) -> tuple[Node, LinearRecord]:
        source, size = weight_name(program, site), self.size_for(site.columns)
        assert size is not None
        rows = weight_rows(program, site)
        check_finite_weight(*rows.aminmax(), where=source)
        if self.bits == 4:
            grid = search(rows, self.bits, size, self.symmetric, signed=self.signed)
        else:
            grid = full_range(rows, self.bits, size, self.symmetric)
        codes = grid.stored_codes(rows)
        zero = None if self.symmetric else grid.zero.to(torch.uint8)
        scale = grid.scale.to(rows.dtype)
        form = _Form(bits=self.bits, group_size=size, symmetric=self.symmetric)
        node = dequantized(program, site, codes, scale, zero, WeightQuantization(method="rtn", source=source, **form))
        values = DEQUANTIZE(codes, scale, zero, bits=self.bits, group_size=size)
        return node, linear_record(source, rows, values, scale, method="rtn", **form)


def _sites(program: Program) -> list[Linear]:
    """The lookups of the input's tokens and the linear that makes the logits, in graph order."""
    head = logits_linear(program)
    found = [_lookup(program, node) or _head(program, node, head) for node in program.graph.nodes]
    return [site for site in found if site is not None]


def _head(program: Program, node: Node, head: Node | None) -> Linear | None:
    return linear_site(program, node) if node is head else None


def _lookup(program: Program, node: Node) -> Linear | None:
    """A lookup of tokens as quantization sees it: like a linear of the table [V, K], whose input are the tokens."""
    if not is_token_lookup(program, node):
        return None
    table, tokens = node.args[:2]
    held = table if program.weight_of(table) is not None else None
    return Linear(node, tokens, table, None, False, held)
