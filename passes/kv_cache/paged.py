"""attention(q, k, v)  ->  paged_attention_(q, k, v, key pool, value pool, slots, block tables, ...)

A decoder over [B, S] becomes one over a flattened token axis [N]: the new tokens of R requests laid
end to end, each with its position, its slot in the pool and, per request, a block table (Kwon et
al. 2023, https://arxiv.org/abs/2309.06180). Prefill, chunked prefill and decode mix freely in one
call. Each layer has one pool for keys and one for values: a stacked pool of dynamic block count is
miscompiled by AOTInductor (pytorch issue 198068).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec
import torch
from torch import Tensor
from torch.export import Dim
from torch.fx import Node

from optc.compiler.diagnostics import UsageError
from optc.compiler.ir.contract import Contract, Input, InputRole, KVCache
from optc.compiler.ir.devices import program_device
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import Pass, PassContext, PassResult
from optc.compiler.rewriting.retrace import Replay, retrace
from optc.compiler.rewriting.tokenwise import cache_misses
from optc.compiler.rewriting.weights import prune_contract
from optc.passes.kv_cache.selecting import RowCalls, SelectingReplay, by_row, selectable_head

_ATTENTION = torch.ops.optc.attention.default


@dataclass(frozen=True, kw_only=True)
class PageKVCache(Pass):
    """attention(q, k, v) -> paged_attention_(...) over pools that are written in place.

    Attributes:
        block_size: tokens per block of the pool.
        select_logits: multiply the head with the rows that `logits_indices` names alone (in any order): the logits are
            [rows, V] instead of [tokens, V]. A norm in front of the head that nothing else reads is of these rows too,
            and stays the head's neighbour for other passes.
        tree: new tokens of a request may be a tree: the input `tree` says which of them each one sees.
    """

    name: ClassVar[str] = "page-kv-cache"
    block_size: int = 16
    select_logits: bool = False
    tree: bool = False

    def run(self, program: Program, context: PassContext) -> PassResult:
        if self.block_size < 1:
            raise UsageError(f"block size {self.block_size} is not positive", remedy="use 16, the default")
        calls = program.calls(_ATTENTION)
        misses = cache_misses(program, sinks=False, states=True, made=context.made)
        if misses:
            return PassResult(program, 0, len(calls), misses)
        head, reason = selectable_head(program) if self.select_logits else (None, "")
        notes = (f"the logits are of all tokens: {reason}",) if reason else ()
        paged = prune_contract(_retrace(program, self.block_size, head, tree=self.tree))
        return PassResult(paged, len(calls), len(calls), notes=notes)


def _retrace(program: Program, block_size: int, head: Node | None, *, tree: bool) -> Program:
    """With the logits of all tokens, or of those that the input `logits_indices` names where a `head` is given."""
    contract = _contract(program, block_size, selecting=head is not None, tree=tree)
    rows = None if head is None else RowCalls.of(by_row(head))
    count, selecting, tables_count = len(program.contract.inputs) - 2, int(head is not None), 3 + tree
    op = torch.ops.optc.paged_tree_attention_ if tree else torch.ops.optc.paged_attention_

    def forward(input_ids: Tensor, position_ids: Tensor, slot_mapping: Tensor, *rest: Tensor) -> Any:
        tables, rest = rest[:tables_count], rest[tables_count:]
        wanted, rest = rest[:selecting], rest[selecting:]
        states, pools = rest[:count], rest[count:]
        pairs = iter(zip(pools[::2], pools[1::2], strict=True))

        def attend(args: tuple[Any, ...], knobs: dict[str, Any]) -> Tensor:
            q, k, v = (part[0].transpose(0, 1).contiguous() for part in args[:3])
            same = {name: knobs[name] for name in ("scale", "window", "softcap")}
            out: Tensor = op(q, k, v, *next(pairs), slot_mapping, *tables, **same)
            return out.transpose(0, 1)[None]

        handlers = {_ATTENTION: attend}
        replay = (
            Replay(program, handlers)
            if rows is None
            else SelectingReplay(program, handlers, rows, lambda hidden: hidden.index_select(-2, *wanted))
        )
        found = [item[0] for item in replay.outputs(*(item[None] for item in (input_ids, position_ids, *states)))]
        return found[0] if len(found) == 1 else tuple(found)

    args, shapes = paged_examples(contract, program_device(program))
    return retrace(program, forward, args, shapes, contract)


def _contract(program: Program, block_size: int, *, selecting: bool, tree: bool) -> Contract:
    old = program.contract
    assert old.outputs[0].role == "logits", "a decoder returns its logits"
    key: Any = program.calls(_ATTENTION)[0].args[1]
    dtype = str(key.meta["val"].dtype).removeprefix("torch.")

    def table(role: InputRole, kind: str, *dims: str) -> Input:
        return Input(name=role, role=role, dtype=kind, dims=dims)

    inputs = [
        table("input_ids", "int64", "tokens"),
        table("position_ids", "int64", "tokens"),
        table("slot_mapping", "int64", "tokens"),
        table("block_tables", "int32", "requests", "max_blocks"),
        table("context_lens", "int32", "requests"),
        table("cu_seqlens", "int32", "requests_plus_1"),
        *([table("tree", "int64", "tokens")] if tree else []),
        *([table("logits_indices", "int64", "rows")] if selecting else []),
        *(msgspec.structs.replace(spec, dims=("tokens", spec.dims[2])) for spec in old.inputs[2:]),  # of draft models
    ]
    for i, layer in enumerate(old.layers):
        key_dims = ("num_blocks", block_size, layer.num_kv_heads, layer.head_dim)
        value_dims = (*key_dims[:3], layer.value_dim)
        inputs.append(Input(name=f"past_key_values.{i}.key", role="key_cache", dtype=dtype, dims=key_dims))
        inputs.append(Input(name=f"past_key_values.{i}.value", role="value_cache", dtype=dtype, dims=value_dims))
    cache = KVCache(kind="paged", in_place=True, block_size=block_size)
    return msgspec.structs.replace(old, inputs=tuple(inputs), kv_cache=cache)


def paged_examples(contract: Contract, device: torch.device) -> tuple[list[Tensor], list[dict[int, Any]]]:
    """Example inputs of a paged program, whose dynamic axes all differ in size, and their dynamic shapes."""
    sizes = {"tokens": 7, "requests": 3, "max_blocks": 5, "requests_plus_1": 4, "num_blocks": 11, "rows": 6}
    dims: dict[str, Any] = {name: Dim(name, min=1) for name in sizes if name != "requests_plus_1"}
    dims["requests_plus_1"] = dims["requests"] + 1
    args, shapes = [], []
    for spec in contract.inputs:
        shape = [size if isinstance(size, int) else sizes[size] for size in spec.dims]
        args.append(torch.zeros(shape, dtype=getattr(torch, spec.dtype), device=device))
        shapes.append({axis: dims[size] for axis, size in enumerate(spec.dims) if isinstance(size, str)})
    return args, shapes
