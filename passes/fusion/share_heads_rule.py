"""The rule of `ShareHeads`, which imports sympy: see passes/fusion/attention_rule.py."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from optc.compiler.analysis.aliases import Storage
from optc.compiler.analysis.attention_calls import SDPA
from optc.compiler.analysis.attention_pattern import sdpa_site
from optc.compiler.analysis.attention_repeats import before_repeat
from optc.compiler.analysis.dataflow import aten, value_of
from optc.compiler.analysis.masks.elements import UnprovenError
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import insert_call, replace_call
from optc.compiler.rewriting.copies import allow_copies
from optc.compiler.rewriting.passes import Match, Miss, Rule


class SharedHeadsRule(Rule):
    """A call whose mask is the same for all heads."""

    def prepare(self, program: Program) -> None:
        self._storage = Storage(program.graph)

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        if node.target is not SDPA:
            return None
        try:
            site = sdpa_site(node)
        except UnprovenError as error:
            return Miss(node.name, str(error))
        if len(site.q.axes) != 4:
            return None
        keys, values = (before_repeat(self._storage, item, node) for item in (site.k, site.v))
        if keys.node is site.k.node or keys.shape[1] != values.shape[1]:
            return None
        mask = site.terms[0].node if site.terms else None
        if site.is_causal or (mask is not None and (value_of(mask).dim() != 4 or value_of(mask).shape[1] != 1)):
            return Miss(node.name, "its mask differs between heads, or is made by the call")
        return Match(node, {"scale": site.scale, "keys": keys.node, "values": values.node, "mask": mask})

    def rewrite(self, program: Program, match: Match) -> None:
        node = match.node
        q: Any = node.args[0]
        keys, values, mask = (match.found[name] for name in ("keys", "values", "mask"))
        heads, kv_heads = int(value_of(q).shape[1]), int(value_of(keys).shape[1])
        groups = heads // kv_heads

        def call(target: Any, *args: Any) -> Node:
            return insert_call(program, node, target, args)

        def extent(axis: int) -> Any:
            known = value_of(q).shape[axis]
            return known if isinstance(known, int) else call(aten.sym_size.int, q, axis)

        batch, size = extent(0), extent(2)
        rows = call(aten.reshape.default, q, [batch, kv_heads, -1, extent(3)])
        if mask is not None and value_of(mask).shape[2] != 1:
            several = call(aten.unsqueeze.default, mask, 2)
            several = call(aten.expand.default, several, [-1, -1, groups, -1, -1])
            mask = call(aten.flatten.using_ints, several, 2, 3)
        knobs = {"scale": match.found["scale"]}
        out = insert_call(program, node, SDPA, (rows, keys, values, mask), knobs)
        width = int(value_of(values).shape[3])
        new = replace_call(program, node, aten.reshape.default, (out, [batch, heads, size, width]), {})
        self._storage.replaced(node, new)
        allow_copies(program, new)
