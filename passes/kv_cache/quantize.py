"""attention(q, k, v)  ->  attention(q, dequantize(quantize(k)), dequantize(quantize(v)))"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.dataflow import value_of
from optc.compiler.analysis.position_bias import keys_hold_positions
from optc.compiler.ir.program import Program
from optc.compiler.ops.dialect.quantization import FORMATS
from optc.compiler.rewriting.budget import Budget
from optc.compiler.rewriting.key_values import round_key_values, rounded
from optc.compiler.rewriting.passes import Miss, Pass, PassContext, PassResult
from optc.passes.quantization.arithmetic.budgets import FP8_KEYS_VALUES, INT8_KEYS_VALUES
from optc.passes.quantization.arithmetic.ranges import calibration_tokens, largest_magnitudes
from optc.passes.quantization.arithmetic.stream import Stream

ATTENTION = torch.ops.optc.attention.default
_KEPT = {"layer": (), "head": (1,), "channel": (1, 3)}
"""Axes of [B, Hkv, S, D] along which scales differ."""


@dataclass(frozen=True, kw_only=True)
class QuantizeKVCache(Pass):
    """attention(q, k, v)  ->  attention(q, dequantize_activation(quantize(k)), dequantize_activation(quantize(v)))

    Keys (after the rotary embedding) and values are rounded to 8 bits with scales from the calibration text, so
    that a cache may hold codes. What is larger than anything seen there is clipped. Runs before a KV cache is added;
    a target that stores codes takes them from here, any other computes with the rounded numbers.

    Attributes:
        format: "int8" or "fp8" (E4M3).
        granularity: one scale per layer, per key/value head, or per channel of each head; one set for keys, one for
            values. Keys have channels that stand out, so "channel" is the closest.
    """

    name: ClassVar[str] = "quantize-kv-cache"
    lossy: ClassVar[bool] = True
    calibrated: ClassVar[bool] = True

    format: Literal["int8", "fp8"] = "int8"
    granularity: Literal["layer", "head", "channel"] = "head"

    def budget(self, before: Program) -> Budget:
        return FP8_KEYS_VALUES if self.format == "fp8" else INT8_KEYS_VALUES

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Round keys and values in a clone of `program`.

        Raises:
            InputError: no calibration tokens, or keys or values that are not finite (the layer is named).
        """
        calls = program.calls(ATTENTION)
        misses = tuple(Miss(call.name, reason) for call in calls if (reason := _obstacle(program, call)))
        if len(misses) == len(calls):
            return PassResult(program, 0, len(calls), misses)
        left = {miss.node for miss in misses}
        todo = [call for call in calls if call.name not in left]
        scales = self._scales(program, todo, calibration_tokens(self.name, context), context)
        edited = program.clone()
        nodes = {node.name: node for node in edited.graph.nodes}
        for number, (call, pair) in enumerate(zip(todo, scales, strict=True)):
            round_key_values(edited, nodes[call.name], f"kv_cache.{number}", pair, self.format)
        return PassResult(edited.changed(), len(todo), len(calls), misses)

    def _scales(
        self, program: Program, calls: Sequence[Node], tokens: Tensor, context: PassContext
    ) -> list[tuple[Tensor, ...]]:
        """Scales of keys and of values per layer, of a shape that broadcasts to [B, Hkv, S, D]."""
        stream, top = Stream(program, tokens), FORMATS[self.format][1]
        found = []
        with torch.no_grad():
            for number, call in enumerate(calls):
                if context.progress:
                    context.progress(number, len(calls), f"attention {number}")
                pair = []
                for part, node in zip(("keys", "values"), call.args[1:3], strict=True):
                    stream.advance(node)
                    where = f"{part} of attention layer {number}"
                    largest = largest_magnitudes(stream, node, where, _KEPT[self.granularity])
                    scale = torch.where(largest > 0, largest / top, 1.0)
                    pair.append(scale.reshape(self._shape(value_of(node))))
                found.append(tuple(pair))
        return found

    def _shape(self, value: Tensor) -> tuple[int, ...]:
        heads, width = int(value.shape[1]), int(value.shape[3])
        return {"layer": (1,), "head": (heads, 1, 1), "channel": (heads, 1, width)}[self.granularity]


def _obstacle(program: Program, call: Node) -> str | None:
    """Why the keys and values of an attention are not to be rounded, or None."""
    if rounded(call):
        return "its keys and values are already quantized"
    if keys_hold_positions(program, call):
        return "its keys hold positions (a bias that grows along the keys), which codes of 8 bits do not"
    return None
