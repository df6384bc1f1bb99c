"""cached_attention, dequantize + linear, add + rms_norm  ->  ONNX Runtime's packed operators

Rewrites onto kernels that ONNX Runtime has (compiler/ops/packed/onnxruntime.py, packed_products.py):

    cached_attention(rotary(q), rotary(k), v, caches)  ->  group_query_attention(qkv, caches)
    cached_attention_codes(...)                          ->  group_query_attention_codes(...), int8 caches
    rms_norm(x + y)                                      ->  skip_rms_norm(x, y)
    quantized linears and embeddings                     ->  see passes/legalization/ort_linears.py
    products with inputs in static codes                 ->  see passes/legalization/ort_static.py
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from optc.compiler.analysis.dataflow import is_tensor, peel, value_of
from optc.compiler.analysis.head_layout import call_of, flat_heads, merged_heads, packed_source
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import add_weight, insert_call, replace_call, replace_node
from optc.compiler.rewriting.passes import Match, Miss, Pass, PassContext, PassResult, Rule, apply_rules
from optc.compiler.rewriting.weights import prune_contract
from optc.passes.legalization.ort_linears import (
    CodebookProduct,
    DequantizedProduct,
    IntegerProduct,
)
from optc.passes.legalization.ort_nbits import GatherNBits, MatMulNBits, PackedWeights
from optc.passes.legalization.ort_static import StaticProduct

_aten, _optc = torch.ops.aten, torch.ops.optc
CACHED = _optc.cached_attention.default
CACHED_CODES = _optc.cached_attention_codes.default
ROTARY = _optc.rotary.default
_TURNS = (_aten.cos.default, _aten.sin.default)
_MAX_POSITIONS = 1 << 18  # rows of cos and sin tables; with more, angles are computed


@dataclass(frozen=True, kw_only=True)
class LegalizeOrt(Pass):
    """cached_attention, dequantize + linear, add + rms_norm -> ONNX Runtime's packed operators

    Attributes:
        unsigned: keep the int8 weights of W8A8 unsigned: exact on every x86, but half as fast where the CPU has
            VNNI. Signed ones need VNNI, or ARM.
        qdq: standard DequantizeLinear and MatMul in place of MatMulNBits, for other engines and for inspection.
            ONNX Runtime fuses blocks of 16 to 256 back when it loads the model, at an accuracy level of its own
            (session option `session.qdq_matmulnbits_accuracy_level`, 4).
    """

    name: ClassVar[str] = "legalize-ort"
    unsigned: bool = False
    qdq: bool = False

    def run(self, program: Program, context: PassContext) -> PassResult:
        packed = PackedWeights()
        rules = [
            _Attention(program.contract.model.context_length),
            StaticProduct(),
            IntegerProduct(self.unsigned),
            DequantizedProduct() if self.qdq else MatMulNBits(packed),
            GatherNBits(packed),
            CodebookProduct(),
            _SkipNorm(),
        ]
        result = apply_rules(program, rules)
        if not result.matched:
            return result
        return PassResult(prune_contract(result.program), result.matched, result.candidates, result.misses)


# -- attention --------------------------------------------------------------------------------


class _Attention(Rule):
    """cached_attention -> group_query_attention, with the rotary embedding and a packed q/k/v inside."""

    def __init__(self, positions: int) -> None:
        self.positions = positions
        self._lengths: dict[tuple[Node, str], Node] = {}
        self._made: dict[tuple[Node, float, torch.dtype], tuple[Node, ...]] = {}

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        if node.target not in (CACHED, CACHED_CODES):
            return None
        key_size, value_size = (int(value_of(item).shape[3]) for item in node.args[1:3])
        if key_size != value_size:
            return Miss(node.name, "head sizes of keys and values differ: GroupQueryAttention has one")
        if key_size % 8:
            return Miss(node.name, f"GroupQueryAttention takes head sizes that are multiples of 8, not {key_size}")
        if node.kwargs["window"] < 0:
            return Miss(node.name, "GroupQueryAttention knows no chunks: attention is spelled out")
        if node.target is CACHED_CODES:
            reason = _codes_obstacle(program, node)
            return Miss(node.name, reason) if reason else Match(node)
        if node.args[7] is not None:
            return Miss(node.name, "GroupQueryAttention is given no sinks: attention is spelled out")
        return Match(node)

    def rewrite(self, program: Program, match: Match) -> None:
        node = match.node
        q, k, v, past_key, past_value, past, total = node.args[:7]
        coded = node.target is CACHED_CODES
        if coded:  # the kernel rounds by itself
            k, v = k.args[0], v.args[0]
        kernel = {"num_heads": int(value_of(q).shape[1]), "kv_num_heads": int(value_of(k).shape[1])}
        tables, q, k, interleaved = self._rotary(program, node, q, k, past)
        streams = self._streams(program, node, q, k, v)
        lengths = self._last_places(program, node, streams[0], past)
        window = int(node.kwargs["window"]) or -1
        kernel |= {name: node.kwargs[name] for name in ("scale", "softcap")}
        kernel |= {"local_window_size": window, "rotary_interleaved": interleaved}
        args = (*streams, past_key, past_value, lengths, total, *tables)
        if coded:
            size = (kernel["kv_num_heads"], int(value_of(past_key).shape[3]))
            args = (*args, *(self._flat_scale(program, scale, *size) for scale in node.args[7:9]))
        attend = _optc.group_query_attention_codes if coded else _optc.group_query_attention
        call = insert_call(program, node, attend.default, args, kernel)
        self._connect(program, node, call)

    def _flat_scale(self, program: Program, scale: Node, heads: int, width: int) -> Node:
        """A scale as the kernel has it: [1], or [Hkv*D] with one per channel of each head."""
        name = program.weight_of(scale)
        assert name is not None
        value = program.weight(name)
        flat = value.reshape(1) if value.numel() == 1 else value.expand(heads, 1, width).reshape(-1)
        return add_weight(program, f"{name}_flat", flat.contiguous())

    def _last_places(self, program: Program, node: Node, query: Node, past: Node) -> Node:
        """past + S - 1 as int32 [B] for a query [B,S,C], made in front of the first layer for all of them.

        Where past is max(total - S, 0) it is total - 1, which costs two calls of a step less; a row of fewer than S tokens
        then says so, and what the kernel makes of its padding nobody reads.
        """
        key = (past, str(value_of(query).shape[1]))
        if key not in self._lengths:
            total = _total(past, value_of(query).shape[1])
            if total is None:
                size = insert_call(program, node, _aten.sym_size.int, (query, 1))
                total = insert_call(program, node, _aten.add.Tensor, (past, size))
            last = insert_call(program, node, _aten.sub.Tensor, (total, 1))
            self._lengths[key] = insert_call(program, node, _aten.to.dtype, (last, torch.int32))
        return self._lengths[key]

    def _rotary(
        self, program: Program, node: Node, q: Node, k: Node, past: Any
    ) -> tuple[tuple[Any, ...], Node, Node, bool]:
        """Tables for the kernel's rotary embedding, and q and k before it; no tables: it stays outside."""
        first, second = call_of(peel(q), ROTARY), call_of(peel(k), ROTARY)
        outside = (None, None), q, k, False
        if first is None or second is None or first.args[1:] != second.args[1:] or first.kwargs != second.kwargs:
            return outside
        if value_of(q).shape[3] % 16 or value_of(first.args[2]).shape[0] % 8:
            return outside  # limits of the CPU kernel
        if not 0 < self.positions <= _MAX_POSITIONS:
            return outside
        if not _counts_up_from(first.args[1], past):
            return outside
        return self._tables(program, node, first), first.args[0], second.args[0], bool(first.kwargs["interleaved"])

    def _tables(self, program: Program, node: Node, rotary: Node) -> tuple[Node, ...]:
        """cos and sin [positions, R], computed in front of `node` once per source of frequencies, scaling and type.

        They depend on weights alone, so that ONNX Runtime computes them once, when it loads the model: as weights they
        would be a tenth of a small file.
        """
        scaling, dtype = float(rotary.kwargs["scaling"]), value_of(rotary).dtype
        key = (rotary.args[2], scaling, dtype)
        if key not in self._made:
            frequencies = value_of(rotary.args[2])
            options = {"dtype": torch.float32, "device": frequencies.device}
            place = insert_call(program, node, _aten.arange.default, (self.positions,), options)
            column = insert_call(program, node, _aten.unsqueeze.default, (place, 1))
            angle = insert_call(program, node, _aten.mul.Tensor, (column, rotary.args[2]))
            self._made[key] = tuple(self._table(program, node, target, angle, scaling, dtype) for target in _TURNS)
        return self._made[key]

    def _table(
        self, program: Program, node: Node, target: Any, angle: Node, scaling: float, dtype: torch.dtype
    ) -> Node:
        table = insert_call(program, node, target, (angle,))
        if scaling != 1.0:
            table = insert_call(program, node, _aten.mul.Tensor, (table, scaling))
        return table if dtype is torch.float32 else insert_call(program, node, _aten.to.dtype, (table, dtype))

    def _streams(self, program: Program, node: Node, q: Node, k: Node, v: Node) -> tuple[Any, Any, Any]:
        flat = [flat_heads(program, node, x) for x in (q, k, v)]
        split = packed_source(flat)
        return (split, None, None) if split is not None else (flat[0], flat[1], flat[2])

    def _connect(self, program: Program, node: Node, call: Node) -> None:
        """Let the readers of out [B,H,S,D] and of the caches read the kernel's outputs."""
        outputs = [user for user in list(node.users) if user.op == "call_function"]
        for user in outputs:
            index = int(user.args[1])
            part = insert_call(program, user, user.target, (call, index))
            if index:
                replace_node(program, user, part)
                continue
            heads = int(value_of(user).shape[1])
            for reader in list(user.users):
                merged = merged_heads(reader, user)
                if merged is not None:
                    replace_node(program, merged, part)
            if user.users:
                shaped = insert_call(program, user, _aten.unflatten.int, (part, -1, [heads, -1]))
                replace_call(program, user, _aten.transpose.int, (shaped, 1, 2))


def _codes_obstacle(program: Program, node: Node) -> str | None:
    """Why GroupQueryAttention cannot keep these codes, or None."""
    for new, scale in zip(node.args[1:3], node.args[7:9], strict=True):
        if value_of(new).dtype is not torch.int8:
            return "caches of ONNX Runtime's CPU provider hold int8 codes, not fp8"
        made = call_of(new, _optc.quantize.default)
        if made is None or made.args[1] is not scale or program.weight_of(scale) is None:
            return "its codes are not made with the scales of its cache"
    return None


def _total(past: Node, size: Any) -> Node | None:
    """The total lengths [B] of which `past` is max(total - size, 0), as static-kv-cache makes it."""
    clamp = call_of(past, _aten.clamp.default)
    if clamp is None or clamp.args[1:] != (0,):
        return None
    less = call_of(clamp.args[0], _aten.sub.Tensor)
    if less is None or less.kwargs or not isinstance(less.args[1], Node):
        return None
    total, taken = less.args
    return total if is_tensor(total) and str(taken.meta["val"]) == str(size) else None


def _counts_up_from(position: object, past: Any) -> bool:
    """Whether position is past[:, None] + arange(S), as static-kv-cache makes it."""
    add = call_of(position, _aten.add.Tensor)
    if add is None:
        return False
    left, right = call_of(add.args[0], _aten.unsqueeze.default), call_of(add.args[1], _aten.arange.default)
    return left is not None and right is not None and left.args == (past, 1)


# -- norms ----------------------------------------------------------------------------------


class _SkipNorm(Rule):
    """rms_norm(x + y) -> skip_rms_norm(x, y), whose second output is the sum"""

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        if node.target is not _aten.rms_norm.default or len(node.args) < 4 or None in node.args[2:4]:
            return None
        add = call_of(peel(node.args[0]), _aten.add.Tensor)
        if add is None or add.kwargs or not all(is_tensor(part) for part in add.args):
            return None
        if program.weight_of(node.args[2]) is None:
            return None  # computed behind the sum, perhaps
        shapes = {str(value_of(part).shape) for part in add.args}
        types = {value_of(part).dtype for part in (node, node.args[2], *add.args)}
        return Match(node, {"add": add}) if len(shapes) == len(types) == 1 and value_of(add).dim() == 3 else None

    def rewrite(self, program: Program, match: Match) -> None:
        node, add = match.node, match.found["add"]
        call = insert_call(program, add, _optc.skip_rms_norm.default, (*add.args, node.args[2]), {"eps": node.args[3]})
        normed, total = (insert_call(program, add, operator.getitem, (call, i)) for i in (0, 1))
        replace_node(program, node, normed)
        replace_node(program, add, total)
