"""The dialect for one sequence at a time, in operators that XNNPACK takes.

Shapes: S new tokens (dynamic, one sequence), C capacity, H query heads, Hkv key/value heads, D head size. Where a
size depends on S, reshapes name it -1: XNNPACK infers one size and takes no symbols.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed, which XNNPACK's partitioner reads
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.dataflow import value_of
from optc.compiler.ir.program import Program
from optc.exporters.executorch.legal import DIALECT

aten = torch.ops.aten
ROTARY, LINEAR = torch.ops.optc.rotary.default, torch.ops.optc.linear_dynamic.default
_decomposed = torch.ops.quantized_decomposed


Tables = dict[str, Tensor]
"""Constants by buffer name: of rotary embeddings, and zero points of weights."""


class Forms:
    """Answers calls of the dialect while a program is replayed under torch.export.

    Masks and rotary tables are made once and shared by all layers.

    Args:
        program: whose calls are answered. position: int64 [S], the places of the new tokens. capacity: C.
        tables: what `constant_tables` made, as buffers of the module under export.
    """

    def __init__(self, program: Program, position: Tensor, capacity: int, tables: Tables) -> None:
        self._position, self._capacity, self._tables = position, capacity, tables
        self._masks: dict[int, Tensor] = {}
        self._rows: dict[str, tuple[Tensor, Tensor]] = {}
        self._rotary_calls = iter([_rotary_key(program, node) for node in program.calls(ROTARY)])

    def handlers(self) -> dict[Any, Any]:
        """Operator -> what answers it, for `Replay`."""
        table = {
            torch.ops.optc.cached_attention_.default: self._attention,
            ROTARY: self._rotary,
            LINEAR: self._linear,
            aten.gelu.default: _gelu,
            aten.view.default: _reshape,
            aten.reshape.default: _reshape,
            aten._unsafe_view.default: _reshape,
        }
        assert table.keys() >= DIALECT.keys(), "an op that is called legal has no form"
        return table

    def _attention(self, args: tuple[Any, ...], knobs: dict[str, Any]) -> Tensor:
        """New keys and values go to their places in the caches [1,Hkv,C,D]; queries see all that lie before them."""
        q, k, v, key_cache, value_cache = args[:5]
        key_cache.index_copy_(2, self._position, k)
        value_cache.index_copy_(2, self._position, v)
        keys, values = key_cache.view(key_cache.shape[1:]), value_cache.view(value_cache.shape[1:])
        heads, shared = q.shape[1], keys.shape[0]
        rows = _contiguous(q).view(shared, -1, q.shape[3])
        scores = torch.bmm(rows * knobs["scale"], keys.transpose(1, 2))
        if knobs["softcap"]:
            scores = torch.tanh(scores * (1.0 / knobs["softcap"])) * knobs["softcap"]
        scores = scores.view(heads, -1, self._capacity) + self._mask(int(knobs["window"]))
        weights = torch.softmax(scores, -1).view(shared, -1, self._capacity)
        return torch.bmm(weights, values).view(1, heads, -1, values.shape[2])

    def _mask(self, window: int) -> Tensor:
        """[S,C]: 0 where a new token sees a place of the cache, the lowest number elsewhere."""
        if window not in self._masks:
            place, query = torch.arange(self._capacity), self._position[:, None]
            keep = place <= query
            if window > 0:
                keep = keep & (place > query - window)
            zeros = torch.zeros_like(keep, dtype=torch.float32)
            self._masks[window] = zeros.masked_fill(keep.logical_not(), torch.finfo(torch.float32).min)
        return self._masks[window]

    def _rotary(self, args: tuple[Any, ...], knobs: dict[str, Any]) -> Tensor:
        """x * cos + (x turned by a quarter) * sin, the turn as a product with a constant matrix.

        Slices of tensors with a dynamic size are not XNNPACK's. Features that are not rotated have cos 1 and sin 0.
        """
        key = next(self._rotary_calls)
        if key not in self._rows:
            pick = torch.nn.functional.embedding
            cos, sin = (pick(self._position, self._tables[f"{key}_{part}"]) for part in ("cos", "sin"))
            self._rows[key] = cos, sin
        cos, sin = self._rows[key]
        return args[0] * cos + torch.nn.functional.linear(args[0], self._tables[f"{key}_turn"]) * sin

    def _linear(self, args: tuple[Any, ...], knobs: dict[str, Any]) -> Tensor:
        """The forms that XNNPACK's partitioner takes for rounded activations and weights of 4 or 8 bits."""
        x, codes, scale, bias = args
        bounds = (-128, 127, torch.int8)
        steps, zero = _decomposed.choose_qparams_per_token_asymmetric(x, torch.int8)
        rounded = _decomposed.quantize_per_token(x, steps, zero, *bounds)
        rounded = _decomposed.dequantize_per_token(rounded, steps, zero, *bounds, torch.float32)
        middle = self._tables[_zeros_name(scale.shape)]
        if knobs["group_size"]:
            weight = _decomposed.dequantize_per_channel_group(
                codes, scale, middle, -8, 7, torch.int8, int(knobs["group_size"]), torch.float32
            )
        else:
            weight = _decomposed.dequantize_per_channel(codes, scale, middle, 0, *bounds)
        return torch.nn.functional.linear(rounded, weight, bias)


def constant_tables(program: Program, capacity: int) -> Tables:
    """What the forms need beside the program's weights."""
    shapes = {tuple(value_of(node.args[2]).shape) for node in program.calls(LINEAR)}
    zeros = {_zeros_name(shape): torch.zeros(shape, dtype=torch.long) for shape in shapes}
    return rotary_tables(program, capacity) | zeros


def _zeros_name(shape: Any) -> str:
    return "zero_points_" + "_".join(str(int(size)) for size in shape)


def rotary_tables(program: Program, capacity: int) -> Tables:
    """For every kind of rotary embedding: cos and sin [C,D], and the matrix [D,D] of the turn."""
    tables: Tables = {}
    for node in program.calls(ROTARY):
        key = _rotary_key(program, node)
        if f"{key}_cos" in tables:
            continue
        name = program.weight_of(node.args[2])
        assert name is not None, "rotary frequencies are a weight"
        inv_freq, width = program.weight(name).float(), int(value_of(node).shape[3])
        first, second = _pairs(inv_freq.shape[0], bool(node.kwargs["interleaved"]))
        turn = torch.zeros(width, width)
        turn[first, second], turn[second, first] = -1.0, 1.0
        cos, sin = torch.ones(capacity, width), torch.zeros(capacity, width)
        angle = torch.arange(capacity).float()[:, None] * inv_freq
        for table, values in ((cos, torch.cos(angle)), (sin, torch.sin(angle))):
            table[:, first] = table[:, second] = values * float(node.kwargs["scaling"])
        tables |= {f"{key}_cos": cos, f"{key}_sin": sin, f"{key}_turn": turn}
    return tables


def _rotary_key(program: Program, node: Node) -> str:
    """A buffer name for what the constants of a call depend on."""
    facts = (program.weight_of(node.args[2]), int(value_of(node).shape[3]), *node.kwargs.values())
    return "rotary_" + re.sub(r"\W", "_", "_".join(map(str, facts)))


def _pairs(count: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The two features of each rotated pair: (2i, 2i+1), or (i, i + count)."""
    index = torch.arange(count)
    return (2 * index, 2 * index + 1) if interleaved else (index, index + count)


def _contiguous(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _gelu(args: tuple[Any, ...], knobs: dict[str, Any]) -> Tensor:
    """GELU by tanh (Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415) spelled out.

    XNNPACK's delegate takes `gelu(approximate="tanh")` and computes the exact one, 5e-4 off.
    """
    (x,) = args
    if knobs.get("approximate", "none") != "tanh":
        return torch.nn.functional.gelu(x)
    inner = (x + x * x * x * 0.044715) * math.sqrt(2.0 / math.pi)
    return x * (torch.tanh(inner) + 1.0) * 0.5


def _reshape(args: tuple[Any, ...], _: dict[str, Any]) -> Tensor:
    """The same reshape with the one symbolic size as -1, where all others are known."""
    x, sizes = args
    shape = list(torch.empty_like(x, device="meta").reshape(sizes).shape) if -1 in sizes else list(sizes)
    symbolic = [index for index, size in enumerate(shape) if not isinstance(size, int)]
    if len(symbolic) == 1:
        shape[symbolic[0]] = -1
    return x.reshape(shape)
