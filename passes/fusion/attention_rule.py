"""The rule of `FuseAttention`. Masks are proved with sympy, which takes its time to import: a recipe names the pass alone."""

from __future__ import annotations

from typing import Any

import sympy as sp
import torch
from torch.fx import Node

from optc.compiler.analysis.aliases import Storage
from optc.compiler.analysis.attention_calls import SDPA, SOFTMAXES
from optc.compiler.analysis.attention_pattern import (
    Site,
    SoftmaxReader,
    bypass_dropout,
    sdpa_site,
)
from optc.compiler.analysis.attention_products import Operand
from optc.compiler.analysis.attention_repeats import before_repeat
from optc.compiler.analysis.dataflow import (
    aten,
    is_tensor,
    scalar,
    value_of,
)
from optc.compiler.analysis.masks.elements import BATCH, HEAD, KEY, QUERY, UnprovenError, operator_name, shape_of
from optc.compiler.analysis.masks.proof import MASKED, MaskProver, Padding, ProvedMask, Term
from optc.compiler.analysis.position_bias import is_per_key, slopes
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import insert_call, replace_call
from optc.compiler.rewriting.copies import allow_copies
from optc.compiler.rewriting.passes import Match, Miss, Rule
from optc.passes.fusion.position_bias import KeyBias, KeyFeatures, position_input

_ATTENTION = torch.ops.optc.attention.default


class AttentionRule(Rule):
    """SDPA, and softmax between two products."""

    def prepare(self, program: Program) -> None:
        self._storage = Storage(program.graph)
        self._prover = MaskProver(program, self._storage)
        self._reader = SoftmaxReader(self._prover, self._storage)
        self._features = KeyFeatures()
        self._made: dict[tuple[Any, ...], Node] = {}
        self._batches = {shape_of(node)[0] for node in program.user_inputs() if shape_of(node)}

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        try:
            site = self._site(node)
            if site is None:
                return None
            keys, values = self._check(site)
            masks, bias = self._biases(program, site, _heads(keys))
            mask = self._mask(site, masks)
            if bias is not None and bias.values is None and not mask.causal:
                raise UnprovenError("a bias that grows along the keys takes causal attention")
            for padding in mask.padding:
                self._check_unwritten(padding.leaf.node, site.result)
        except UnprovenError as error:
            return Miss(node.name, str(error))
        found = {"site": site, "keys": keys, "values": values, "mask": mask, "bias": bias}
        return Match(site.result, found)

    def _biases(self, program: Program, site: Site, kv_heads: int) -> tuple[list[Term], KeyBias | None]:
        """The masks among what is added to the scores, and the bias of keys that is left.

        Raises:
            UnprovenError: something is neither.
        """
        masks, lines, found = [], list(site.biases), list[KeyBias]()
        for term in site.terms:
            if term.kind != "add" or self._is_mask(site, term):
                masks.append(term)
            elif is_per_key(term.node):
                lines.append(term)
            elif (parts := self._masked_bias(site, term, kv_heads)) is not None:
                masks.append(parts[0])
                found.append(KeyBias(torch.full((_heads(site.q),), term.factor / site.scale), parts[1]))
            else:
                masks.append(term)  # its proof says why it is none
        for term in lines:
            self._check_unwritten(term.node, term.reader)
            if not is_per_key(term.node):
                raise UnprovenError(f"{term.node.name} adds to the scores what differs between queries")
            position_input(program)
            steps = slopes(program, term.node, _heads(site.q))
            found.append(KeyBias(steps * (term.factor / site.scale)))
        if len(found) > 1 or (found and site.softcap):
            raise UnprovenError("its scores get several biases of keys, or one beside a softcap")
        return masks, found[0] if found else None

    def _masked_bias(self, site: Site, term: Term, kv_heads: int) -> tuple[Term, Node] | None:
        """The mask, and a bias of keys [B, Hkv, 1, T], that a term is when the one is filled into the other, else None."""
        if value_of(term.node).dim() != 4:
            return None
        filled = before_repeat(self._storage, Operand(term.node, (0, 1, 2, 3)), site.result).node
        if operator_name(filled) != "masked_fill":
            return None
        wide, mask, number = filled.args
        assert isinstance(wide, Node)
        assert isinstance(mask, Node)
        lowest = scalar(number)
        source = wide.args[0] if wide.target is aten.expand.default else None
        if lowest is None or lowest * term.factor > MASKED or not is_tensor(source):
            return None
        assert isinstance(source, Node)
        shape = shape_of(source)
        if len(shape) != 4 or shape[1:3] != (kv_heads, 1) or shape_of(mask)[-3:-2] not in ((), (1,)):
            return None
        self._check_unwritten(source, filled)
        return Term(mask, "drop", filled), source

    def _mask(self, site: Site, terms: list[Term]) -> ProvedMask:
        """What all of them mask; scores that are multiplied by 0 must be masked by the others.

        Raises:
            UnprovenError: it cannot be proved.
        """
        mask = self._prover.prove(
            [term for term in terms if term.kind != "multiply"], _extents(site), is_causal=site.is_causal
        )
        for term in (term for term in terms if term.kind == "multiply"):
            try:
                both = self._prover.prove(terms, _extents(site), is_causal=site.is_causal)
            except UnprovenError as error:
                what = f"{term.reader.name} scales by {term.node.name}, which is neither one number nor a mask"
                raise UnprovenError(what) from error
            if both != mask:
                raise UnprovenError(f"{term.node.name} multiplies scores by 0 that are not masked")
        return mask

    def _is_mask(self, site: Site, term: Term) -> bool:
        try:
            self._prover.prove([term], _extents(site))
        except UnprovenError:
            return False
        return True

    def _site(self, node: Node) -> Site | None:
        if node.target is SDPA:
            return sdpa_site(node)
        return self._reader.site(node) if node.target in SOFTMAXES else None

    def rewrite(self, program: Program, match: Match) -> None:
        site: Site = match.found["site"]
        mask: ProvedMask = match.found["mask"]
        operands = (site.q, match.found["keys"], match.found["values"])
        q, k, v = (_in_order(program, item, site.result) for item in operands)
        padding = self._key_padding(program, mask, site.result)
        knobs: dict[str, Any] = {
            "scale": site.scale,
            "causal": mask.causal,
            "window": mask.window,
            "softcap": site.softcap,
        }
        width = value_of(v).shape[3]
        if match.found["bias"] is not None:
            q, k, v = self._features.widen(program, (q, k, v), match.found["bias"], site.result)
        arguments: tuple[Any, ...] = (q, k, v, padding, None)
        if site.weights is not None:
            bypass_dropout(site.weights)
        last: list[tuple[Any, ...]] = []
        if value_of(v).shape[3] != width:
            last.append((aten.slice.Tensor, 3, 0, width))
        if len(site.q.axes) == 3:
            last.append((aten.squeeze.dim, 1))
        if site.merged:
            last.append((aten.flatten.using_ints, 0, 1))
        if site.result_axes != tuple(range(len(site.result_axes))):
            last.append((aten.permute.default, list(site.result_axes)))
        target: Any = _ATTENTION
        for after, *options in last:
            arguments, knobs = (insert_call(program, site.result, target, arguments, knobs), *options), {}
            target = after
        new = replace_call(program, site.result, target, arguments, knobs)
        self._storage.replaced(site.result, new)
        allow_copies(program, new)

    def _check(self, site: Site) -> tuple[Operand, Operand]:
        """Refuse operands that `optc.attention` does not take; keys and values, not repeated, otherwise."""
        q, k, v = site.q.shape, site.k.shape, site.v.shape
        rank = len(q)
        if rank not in (3, 4) or len(k) != rank or len(v) != rank:
            raise UnprovenError(f"{site.q.node.name} has {rank} axes, not [B, H, S, D]")
        if rank == 3 and q[0] not in self._batches:
            raise UnprovenError(f"the first axis of {site.q.node.name}, {q[0]}, is not the batch axis of an input")
        result = shape_of(site.result)
        fits = q[0] == k[0] == v[0] and q[-1] == k[-1] and k[-2] == v[-2]
        wanted = tuple((*q[:-1], v[-1])[axis] for axis in site.result_axes)
        if site.merged:
            result = (q[0], q[1], *result[1:]) if sp.expand(q[0] * q[1] - result[0]) == 0 else ()
        if not fits or result != wanted:
            raise UnprovenError(f"its operands {q}, {k} and {v} have shapes that do not match or are broadcast")
        heads, kv_heads, v_heads = (q[1], k[1], v[1]) if rank == 4 else (sp.Integer(1),) * 3
        if not all(size.is_Integer for size in (heads, kv_heads, v_heads, q[-1], v[-1])):
            raise UnprovenError("the number of heads or their size is not fixed")
        grouped = heads == kv_heads or kv_heads == 1 or (site.gqa and heads % kv_heads == 0)
        if not grouped or kv_heads != v_heads:
            raise UnprovenError(f"{heads} query heads do not share {kv_heads} key and {v_heads} value heads")
        dtypes = {value_of(item).dtype for item in (site.q.node, site.k.node, site.v.node, site.result)}
        if len(dtypes) != 1:
            raise UnprovenError(f"its operands are of several types: {', '.join(sorted(map(str, dtypes)))}")
        for item in (site.q, site.k):
            self._check_unwritten(item.node, site.result, site.product)
        return self._shared_heads(site)

    def _shared_heads(self, site: Site) -> tuple[Operand, Operand]:
        """Keys and values before they were repeated for every query head, when both were, alike."""
        keys, values = (before_repeat(self._storage, item, site.result) for item in (site.k, site.v))
        return (keys, values) if keys.shape[1] == values.shape[1] else (site.k, site.v)

    def _key_padding(self, program: Program, mask: ProvedMask, before: Node) -> Node | None:
        """bool [B, T]: the keys of each row that count, or None when all do."""
        planes = [self._plane(program, item) for item in mask.padding]
        whole = planes[0] if planes else None
        for plane in planes[1:]:
            whole = insert_call(program, before, aten.logical_and.default, (whole, plane))
        return whole

    def _plane(self, program: Program, padding: Padding) -> Node:
        """One part of the padding as bool [B, T], made right behind its source and once for all layers."""
        node, (row, key) = padding.leaf.node, padding.leaf.axes
        steps: list[tuple[Any, ...]] = [
            (aten.select.int, axis, 0) for axis in reversed(range(value_of(node).dim())) if axis not in (row, key)
        ]
        steps += [(aten.unsqueeze.default, 0)] if row is None else []
        steps += [(aten.to.dtype, torch.bool)] if value_of(node).dtype != torch.bool else []
        steps += [] if padding.keep else [(aten.logical_not.default,)]
        for target, *options in steps:
            call = (node, target, *options)
            if call not in self._made:
                place = node.next
                while place.op == "placeholder":
                    place = place.next
                self._made[call] = insert_call(program, place, target, (node, *options))
            node = self._made[call]
        return node

    def _check_unwritten(self, node: Node, reader: Node, since: Node | None = None) -> None:
        written = self._storage.overwritten(node, reader, since)
        if written is not None:
            raise UnprovenError(f"{written.name} overwrites {node.name} before {reader.name}")


def _heads(operand: Operand) -> int:
    """Of [B, H, S, D]; [B, S, D] is one."""
    return int(operand.shape[1]) if len(operand.axes) == 4 else 1


def _extents(site: Site) -> dict[Any, Any]:
    batch, *heads, queries, _ = site.q.shape
    return {BATCH: batch, **dict(zip((HEAD,), heads, strict=False)), QUERY: queries, KEY: site.k.shape[-2]}


def _in_order(program: Program, operand: Operand, before: Node) -> Node:
    """The operand as [B, H, positions, features]."""
    node = operand.node
    if not operand.plain:
        node = insert_call(program, before, aten.permute.default, (node, list(operand.axes)))
    return node if len(operand.axes) == 4 else insert_call(program, before, aten.unsqueeze.default, (node, 1))
