"""attention(q, k, v)      ->  cached_attention(q, k, v, key cache, value cache, past lengths)
recurrent layers        ->  the same over a state of each row (see passes/kv_cache/states.py)

A decoder that takes the whole sequence becomes one that takes new tokens and a linear KV cache, one
graph for prefill, chunked prefill and decode. The inputs are those that ONNX runtimes feed
(input_ids [B,S], attention_mask [B,T], past_key_values.{i}.key/value [B,Hkv,P,D]), of the mask only
the row sums count: row b holds total[b] tokens, so its new ones start at total[b] - S. A first
prompt may be ragged (right-padded, total[b] <= S = T), then every row starts at 0; both are
past[b] = max(total[b] - S, 0). Padding lies to the right, where causal attention cannot see it, and
is overwritten by the tokens that come later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec
import torch
from torch import Tensor
from torch.export import Dim
from torch.fx import Node

from optc.compiler.ir.contract import Contract, Input, KVCache
from optc.compiler.ir.devices import program_device
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import Pass, PassContext, PassResult
from optc.compiler.rewriting.retrace import Replay, axis_limit, retrace
from optc.compiler.rewriting.tokenwise import cache_misses
from optc.passes.kv_cache.linear import example_caches, linear_caches
from optc.passes.kv_cache.selecting import RowCalls, SelectingReplay, selectable_head
from optc.passes.kv_cache.states import RowStates, example_states, recurrent_calls, row_states

_ATTENTION = torch.ops.optc.attention.default


@dataclass(frozen=True, kw_only=True)
class StaticKVCache(Pass):
    """attention(q, k, v) -> cached_attention(q, k, v, cache), with positions made in the graph.

    Attributes:
        in_place: False returns the grown caches as outputs (`present.{i}.key/value`, ONNX); True
            writes caches of fixed capacity in place (AOTInductor).
        select_logits: of grown caches, multiply the head with some tokens of each row alone: `logits_from_end` [1, K]
            counts back from the last token of each, 1 is the last one, and the logits are [B, K, V]. What lies before
            a row's first new token is that token. Runtimes that know nothing of this input get its default, the last
            token (see exporters/onnx). The selection stands behind the last norm, which stays one call with the sum
            before it.
        states: of a model with recurrent layers, hold their states as well; without it such a model is refused.
    """

    name: ClassVar[str] = "static-kv-cache"
    in_place: bool = False
    select_logits: bool = False
    states: bool = False

    def run(self, program: Program, context: PassContext) -> PassResult:
        calls = program.calls(_ATTENTION)
        sites = len(calls) + len(recurrent_calls(program))
        misses = cache_misses(program, sinks=True, recurrent=self.states, made=context.made)
        if misses:
            return PassResult(program, 0, sites, misses)
        head, reason = selectable_head(program) if self.select_logits else (None, "")
        if self.select_logits and self.in_place:
            head, reason = None, "its caches are written in place"
        notes = (f"the logits are of all tokens: {reason}",) if reason else ()
        return PassResult(_retrace(program, self.in_place, head), sites, sites, notes=notes)


def _retrace(program: Program, in_place: bool, head: Node | None) -> Program:
    """With the logits of all tokens, or of those that the input `logits_from_end` says where a `head` is given."""
    contract = _contract(program, in_place, head is not None)
    rows = None if head is None else RowCalls.of([head])
    layers = 2 * len(program.contract.layers)

    def forward(input_ids: Tensor, attention_mask: Tensor, *rest: Tensor) -> Any:
        held = rest if head is None else rest[:-1]
        caches, states = held[:layers], held[layers:]
        size = input_ids.shape[1]
        # Said at once, as two symbols for one size would be divided by each other, which takes sympy a second.
        assert attention_mask.shape[0] == input_ids.shape[0], "a row of the mask for each row of tokens"
        total = attention_mask.sum(1)
        past = (total - size).clamp(min=0)
        position = past[:, None] + torch.arange(size, device=input_ids.device)
        pairs = iter(zip(caches[::2], caches[1::2], strict=True))
        presents: list[Tensor] = []

        def attend(args: tuple[Any, ...], knobs: dict[str, Any]) -> Tensor:
            q, k, v, _, sinks = args
            keys, values = next(pairs)
            same = {name: knobs[name] for name in ("scale", "window", "softcap")}
            cached = (keys, values, past, attention_mask.shape[1], sinks)
            if in_place:
                out: Tensor = torch.ops.optc.cached_attention_(q, k, v, *cached, **same)
                return out
            out, *grown = torch.ops.optc.cached_attention(q, k, v, *cached, **same)
            presents.extend(grown)
            return out

        def select(hidden: Tensor) -> Tensor:
            places = (total.clamp(max=size)[:, None] - rest[-1]).clamp(min=0)
            return hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[2]))

        recurrent = RowStates(states, past, total, size)
        handlers = {_ATTENTION: attend, **recurrent.handlers}
        replay = Replay(program, handlers) if rows is None else SelectingReplay(program, handlers, rows, select)
        logits = replay.outputs(input_ids, position)[0]
        if in_place:
            recurrent.write()
        return logits if in_place else (logits, *presents, *recurrent.new)

    args, shapes = _examples(program, in_place)
    if head is not None:
        args.append(torch.ones((1, 3), dtype=torch.long, device=program_device(program)))
        shapes.append({1: Dim("rows", min=1)})
    return retrace(program, forward, args, shapes, contract)


def _contract(program: Program, in_place: bool, selecting: bool) -> Contract:
    old = program.contract
    inputs = [
        Input(name="input_ids", role="input_ids", dtype="int64", dims=("batch", "seq")),
        Input(name="attention_mask", role="attention_mask", dtype="int64", dims=("batch", "total")),
    ]
    caches, grown = linear_caches(program, "capacity" if in_place else "past")
    states, moved = row_states(program)
    rows = [Input(name="logits_from_end", role="logits_from_end", dtype="int64", dims=(1, "rows"))] if selecting else []
    return msgspec.structs.replace(
        old,
        inputs=(*inputs, *caches, *states, *rows),
        outputs=old.outputs if in_place else (*old.outputs, *grown, *moved),
        kv_cache=KVCache(kind="linear", in_place=in_place),
    )


def _examples(program: Program, in_place: bool) -> tuple[list[Tensor], list[dict[int, Any]]]:
    """Example inputs, whose dynamic axes all differ in size, and their dynamic shapes."""
    limit = axis_limit(program.user_inputs()[0], program, 1)
    rows = axis_limit(program.user_inputs()[0], program, 0)
    batch, total = 2, min(11, limit or 11)
    seq, past = min(7, total - 1), 13
    b, s = Dim("batch", min=1, max=rows), Dim("seq", min=1, max=limit)
    t = Dim("total", min=1, max=limit)
    p = Dim("capacity", min=1) if in_place else Dim("past", min=0)
    device = program_device(program)
    args = [
        torch.zeros((batch, seq), dtype=torch.long, device=device),
        torch.ones((batch, total), dtype=torch.long, device=device),
    ]
    caches = example_caches(program, batch, past)
    states = example_states(program, batch)
    shapes = [{0: b, 1: s}, {0: b, 1: t}, *({0: b, 2: p} for _ in caches), *({0: b} for _ in states)]
    return [*args, *caches, *states], shapes
