"""cached_attention over dequantized keys and values  ->  cached_attention_codes over caches of 8-bit codes"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec
import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.dataflow import value_of
from optc.compiler.ir.contract import CACHE_ROLES, Contract
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.key_values import rounded
from optc.compiler.rewriting.passes import Miss, Pass, PassContext, PassResult
from optc.compiler.rewriting.retrace import Replay, retrace
from optc.passes.kv_cache.linear import cached_examples

_optc = torch.ops.optc
CACHED = _optc.cached_attention.default
DEQUANTIZE = _optc.dequantize_activation.default


@dataclass(frozen=True, kw_only=True)
class StoreKVCodes(Pass):
    """cached_attention(q, dequantize(k), dequantize(v), caches)  ->  cached_attention_codes(q, k, v, caches of codes)

    After `quantize-kv-cache` and `static-kv-cache`: the caches, inputs and outputs of the program, become codes of
    8 bits, a quarter of float32's memory. The numbers stay the same. All layers or none: a runtime has one type of
    cache.
    """

    name: ClassVar[str] = "store-kv-codes"

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Re-trace with caches of codes."""
        calls = program.calls(CACHED)
        misses = tuple(Miss(call.name, reason) for call in calls if (reason := _obstacle(call)))
        types = {value_of(call.args[i].args[0]).dtype for call in calls for i in (1, 2)} if not misses else set()
        if len(types) != 1:
            return PassResult(program, 0, len(calls), misses)
        return PassResult(_retrace(program, types.pop()), len(calls), len(calls))


def rounds_keys_and_values(program: Program) -> bool:
    """Whether any cache of a program could hold codes: an attention reads rounded keys or values."""
    return any(rounded(call) for call in program.calls(CACHED))


def _obstacle(call: Node) -> str | None:
    """Why a cache cannot hold codes, or None."""
    if any(item.target is not DEQUANTIZE for item in call.args[1:3]):
        return "its keys and values are not quantized: see quantize-kv-cache"
    return "attention sinks need a cache of floats" if call.args[7] is not None else None


def _retrace(program: Program, dtype: torch.dtype) -> Program:
    contract = _contract(program.contract, dtype)

    def forward(*inputs: Tensor) -> Any:
        codes: dict[int, tuple[Tensor, Tensor]] = {}
        held: list[Tensor] = []  # an id is only good while its tensor lives

        def dequantize(args: tuple[Any, ...], knobs: dict[str, Any]) -> Tensor:
            made: Tensor = DEQUANTIZE(*args, **knobs)
            codes[id(made)] = args
            held.append(made)
            return made

        def attend(args: tuple[Any, ...], knobs: dict[str, Any]) -> Any:
            q, k, v, key_cache, value_cache, past, total, _ = args
            (k, k_scale), (v, v_scale) = codes[id(k)], codes[id(v)]
            rest = (key_cache, value_cache, past, total, k_scale, v_scale)
            return _optc.cached_attention_codes(q, k, v, *rest, **knobs)

        outputs = Replay(program, {DEQUANTIZE: dequantize, CACHED: attend}).outputs(*inputs)
        return tuple(outputs)

    args, shapes = cached_examples(program, dtype)
    return retrace(program, forward, args, shapes, contract)


def _contract(contract: Contract, dtype: torch.dtype) -> Contract:
    name = str(dtype).removeprefix("torch.")
    inputs = [
        msgspec.structs.replace(spec, dtype=name) if spec.role in CACHE_ROLES else spec for spec in contract.inputs
    ]
    return msgspec.structs.replace(contract, inputs=tuple(inputs))
