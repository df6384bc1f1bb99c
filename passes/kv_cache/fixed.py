"""attention(q, k, v)  ->  cached_attention(q, k, v, key cache, value cache, past lengths), caches of fixed capacity

As static-kv-cache, for engines that bind buffers of one size: inputs are input_ids int32 [B,S], positions int32 [B],
the number of tokens that each row holds already, and past_key_values.{i}.key/value [B,Hkv,T,D] with T the capacity;
outputs are logits float32 [B,S,V] and present.{i}.key/value [B,Hkv,T,D]. Token i of row b is at positions[b] + i,
which must stay below T. A ragged prompt is padded on the right; what the padding writes lies behind the row's tokens,
where causal attention does not look, and is overwritten by those that come later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec
import torch
from torch import Tensor
from torch.export import Dim

from optc.compiler.diagnostics import TargetError
from optc.compiler.ir.contract import Contract, Input, KVCache
from optc.compiler.ir.devices import program_device
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import Pass, PassContext, PassResult
from optc.compiler.rewriting.retrace import Replay, axis_limit, retrace
from optc.compiler.rewriting.tokenwise import cache_misses
from optc.compiler.target.target import check_context
from optc.passes.kv_cache.linear import example_caches, linear_caches

_ATTENTION = torch.ops.optc.attention.default
LARGEST_DEFAULT = 2048


@dataclass(frozen=True, kw_only=True)
class FixedKVCache(Pass):
    """attention(q, k, v) -> cached_attention(q, k, v, cache), caches of fixed capacity, positions from past lengths.

    Attributes:
        capacity: tokens of a cache; None takes the model's context, at most 2048.
    """

    name: ClassVar[str] = "fixed-kv-cache"
    capacity: int | None = None

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Re-trace with the new inputs.

        Raises:
            TargetError: a capacity beyond the model's context.
        """
        calls = program.calls(_ATTENTION)
        capacity = cache_capacity(self.capacity, program.contract.model.context_length)
        misses = cache_misses(program, sinks=False, made=context.made)
        if misses:
            return PassResult(program, 0, len(calls), misses)
        return PassResult(_retrace(program, capacity), len(calls), len(calls))


def cache_capacity(asked: int | None, context_length: int) -> int:
    """Tokens of a cache: what was asked for, else the model's context, at most 2048.

    Raises:
        TargetError: more than the model's context, or fewer than 2 tokens.
    """
    if asked is None:
        return min(context_length or LARGEST_DEFAULT, LARGEST_DEFAULT)
    if asked < 2:
        raise TargetError(
            f"a KV cache of {asked} tokens is too small to generate with", remedy="--max-seq-len 2 or more"
        )
    check_context(asked, context_length)
    return asked


def _retrace(program: Program, capacity: int) -> Program:
    contract = _contract(program, capacity)

    def forward(input_ids: Tensor, positions: Tensor, *caches: Tensor) -> Any:
        places = torch.arange(input_ids.shape[1], dtype=torch.int32, device=input_ids.device)
        position = positions[:, None] + places
        pairs = iter(zip(caches[::2], caches[1::2], strict=True))
        presents: list[Tensor] = []

        def attend(args: tuple[Any, ...], knobs: dict[str, Any]) -> Tensor:
            q, k, v, _, sinks = args
            same = {name: knobs[name] for name in ("scale", "window", "softcap")}
            rest = (*next(pairs), positions, capacity, sinks)
            out, *written = torch.ops.optc.cached_attention(q, k, v, *rest, **same)
            presents.extend(written)
            return out

        logits = Replay(program, {_ATTENTION: attend}).outputs(input_ids, position)[0]
        return (logits.float(), *presents)

    return retrace(program, forward, *_examples(program, capacity), contract)


def _contract(program: Program, capacity: int) -> Contract:
    old = program.contract
    inputs = [
        Input(name="input_ids", role="input_ids", dtype="int32", dims=("batch", "tokens")),
        Input(name="positions", role="past_lengths", dtype="int32", dims=("batch",)),
    ]
    caches, written = linear_caches(program, capacity)
    return msgspec.structs.replace(
        old,
        inputs=(*inputs, *caches),
        outputs=(*old.outputs, *written),
        kv_cache=KVCache(kind="linear", capacity=capacity),
    )


def _examples(program: Program, capacity: int) -> tuple[list[Tensor], list[dict[int, Any]]]:
    """Example inputs, whose dynamic axes all differ in size, and their dynamic shapes."""
    rows = axis_limit(program.user_inputs()[0], program, 0)
    batch, tokens = Dim("batch", min=1, max=rows), Dim("tokens", min=1, max=capacity)
    size = min(7, capacity - 1)
    device = program_device(program)
    args = [torch.zeros(shape, dtype=torch.int32, device=device) for shape in ((3, size), (3,))]
    caches = example_caches(program, 3, capacity)
    return [*args, *caches], [{0: batch, 1: tokens}, {0: batch}, *({0: batch} for _ in caches)]
