"""cached_attention, rotary, dequantize + linear  ->  operators that TensorRT's ONNX parser has layers for

    cached_attention(q, k, v, caches, past, T)  ->  masked_attention(q, tensor_scatter(caches ...), keep)
    rotary(x, position, inv_freq)               ->  rotary_cached(x, position, cos, sin), tables as weights
    linear(x, dequantize(codes, scale))         ->  x @ dequantize_linear(...), symmetric codes only

The mask `keep` is spelled out in ATen and is shared by the layers of one window: TensorRT's parser takes Attention
with `is_causal` and lengths for another mask (upper left), and drops the lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from optc.compiler.analysis.dataflow import value_of
from optc.compiler.diagnostics import TargetError
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import add_weight, insert_call, replace_call, replace_node
from optc.compiler.ops.attention_arguments import CHUNKS_REFUSED
from optc.compiler.rewriting.passes import Match, Miss, Pass, PassContext, PassResult, Rule, apply_rules
from optc.compiler.rewriting.weights import prune_contract
from optc.passes.legalization.ort_linears import DequantizedProduct

_aten, _optc = torch.ops.aten, torch.ops.optc
CACHED = _optc.cached_attention.default
ROTARY = _optc.rotary.default


@dataclass(frozen=True, kw_only=True)
class LegalizeTrt(Pass):
    """cached_attention, rotary, dequantize + linear -> operators that TensorRT's ONNX parser has layers for"""

    name: ClassVar[str] = "legalize-trt"

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Rewrite a clone of `program`.

        Raises:
            TargetError: a weight with zero points, or of other than 4 or 8 bits; names it.
        """
        capacity = program.contract.kv_cache.capacity
        result = apply_rules(program, [_Attention(capacity), _Rotary(capacity), _Symmetric()])
        if not result.matched:
            return result
        return PassResult(prune_contract(result.program), result.matched, result.candidates, result.misses)


class _Attention(Rule):
    """cached_attention -> masked_attention over scattered caches"""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._masks: dict[tuple[Node, int], Node] = {}

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        if node.target is not CACHED:
            return None
        if not self.capacity or node.args[6] != self.capacity:
            return Miss(node.name, "its cache has no fixed capacity: see fixed-kv-cache")
        if node.args[7] is not None:
            return Miss(node.name, "attention sinks are not lowered")
        if node.kwargs["window"] < 0:
            return Miss(node.name, CHUNKS_REFUSED)
        return Match(node)

    def rewrite(self, program: Program, match: Match) -> None:
        node = match.node
        q, k, v, k_cache, v_cache, past = node.args[:6]
        keep = self._mask(program, node, q, past, int(node.kwargs["window"]))
        caches = [
            insert_call(program, node, _optc.tensor_scatter.default, (cache, new, past))
            for cache, new in ((k_cache, k), (v_cache, v))
        ]
        knobs = {name: float(node.kwargs[name]) for name in ("scale", "softcap")}
        out = insert_call(program, node, _optc.masked_attention.default, (q, *caches, keep), knobs)
        parts = (out, *caches)
        for user in [user for user in node.users if user.op == "call_function"]:
            replace_node(program, user, parts[int(user.args[1])])

    def _mask(self, program: Program, node: Node, q: Node, past: Node, window: int) -> Node:
        """keep [B,1,S,T] for queries at past[b] + i and keys 0 .. T-1, made in front of the first layer."""
        key = (past, window)
        if key not in self._masks:

            def call(target: Any, *args: Any, **knobs: Any) -> Node:
                return insert_call(program, node, target, args, knobs)

            like: dict[str, Any] = {
                "dtype": torch.int32,
                "device": value_of(past).device,
                "pin_memory": False,
            }
            size = call(_aten.sym_size.int, q, 2)
            start = call(_aten.unsqueeze.default, past, 1)
            query = call(_aten.add.Tensor, start, call(_aten.arange.default, size, **like))
            query = call(_aten.unsqueeze.default, call(_aten.unsqueeze.default, query, 1), -1)
            keys = call(_aten.arange.default, self.capacity, **like)
            keep = call(_aten.le.Tensor, keys, query)
            if window > 0:
                near = call(_aten.gt.Tensor, keys, call(_aten.sub.Tensor, query, window))
                keep = call(_aten.logical_and.default, keep, near)
            self._masks[key] = keep
        return self._masks[key]


class _Rotary(Rule):
    """rotary -> rotary_cached, with cos and sin of every position of a cache as weights"""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._made: dict[tuple[str, float, torch.dtype], tuple[Node, ...]] = {}

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        if node.target is not ROTARY:
            return None
        if not self.capacity:
            return Miss(node.name, "no fixed number of positions: see fixed-kv-cache")
        if program.weight_of(node.args[2]) is None:
            return Miss(node.name, "its frequencies are computed")
        return Match(node)

    def rewrite(self, program: Program, match: Match) -> None:
        node = match.node
        arguments = (*node.args[:2], *self._tables(program, node))
        knobs = {"interleaved": bool(node.kwargs["interleaved"])}
        replace_call(program, node, _optc.rotary_cached.default, arguments, knobs)

    def _tables(self, program: Program, rotary: Node) -> tuple[Node, ...]:
        """cos and sin [T,R], made once per source of frequencies, scaling and type."""
        name = program.weight_of(rotary.args[2])
        assert name is not None
        scaling, dtype = float(rotary.kwargs["scaling"]), value_of(rotary).dtype
        key = (name, scaling, dtype)
        if key not in self._made:
            frequencies = program.weight(name).float()
            angle = torch.arange(self.capacity, device=frequencies.device).float()[:, None] * frequencies
            number = sum(other == name for other, *_ in self._made) or ""
            self._made[key] = tuple(
                add_weight(program, f"{name}_{kind}{number}_cache", (table * scaling).to(dtype))
                for kind, table in (("cos", torch.cos(angle)), ("sin", torch.sin(angle)))
            )
        return self._made[key]


class _Symmetric(DequantizedProduct):
    """DequantizedProduct of weights without zero points: TensorRT's parser refuses int4 ones."""

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        found = super().match(program, node)
        if isinstance(found, Match):
            weight = found.found["dequantize"]
            if weight.args[2] is not None:
                raise TargetError(
                    "TensorRT does not take weights with zero points",
                    where=program.weight_of(weight.args[0]),
                    remedy="quantize with --symmetric (the default), or choose --target onnx-cpu or inductor-cpu",
                )
            if int(weight.kwargs["bits"]) not in (4, 8):
                raise TargetError(
                    f"TensorRT does not take {weight.kwargs['bits']}-bit weights",
                    where=program.weight_of(weight.args[0]),
                    remedy="quantize to 4 or 8 bits, or choose --target onnx-cpu or inductor-cpu",
                )
        return found
