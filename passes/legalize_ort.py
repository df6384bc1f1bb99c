"""cached_attention, dequantize + linear, add + rms_norm  ->  ONNX Runtime's packed operators

Three rewrites, each onto a kernel that ONNX Runtime has (compiler/ops/packed.py):

    cached_attention(rotary(q), rotary(k), v, caches)  ->  group_query_attention(qkv, caches)
    linear(x, dequantize(codes, scale, zero))           ->  matmul_nbits(x, packed, scales, zeros)
    rms_norm(x + y)                                      ->  skip_rms_norm(x, y)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from optc.compiler.dataflow import value_of
from optc.compiler.ops.packed import pack_nbits
from optc.compiler.program import Program
from optc.compiler.rewriting import Match, Miss, Pass, PassContext, PassResult, Rule, apply_rules
from optc.compiler.surgery import add_weight, insert_call, replace_call, replace_node
from optc.compiler.weights import prune_contract, record_weight

_aten, _optc = torch.ops.aten, torch.ops.optc
CACHED = _optc.cached_attention.default
ROTARY = _optc.rotary.default
_RESHAPES = (_aten.view.default, _aten.reshape.default)
_COPIES = (_aten.contiguous.default, _aten.clone.default)


@dataclass(frozen=True, kw_only=True)
class LegalizeOrt(Pass):
    """cached_attention, dequantize + linear, add + rms_norm -> ONNX Runtime's packed operators

    Attributes:
        accuracy_level: of MatMulNBits: 4 rounds activations to int8 (fast), 0 does not.
    """

    name: ClassVar[str] = "legalize-ort"
    accuracy_level: int = 4

    def run(self, program: Program, context: PassContext) -> PassResult:
        positions = program.contract.model.context_length or 4096
        rules = [_Attention(positions), _QuantizedLinear(self.accuracy_level), _SkipNorm()]
        result = apply_rules(program, rules)
        if not result.matched:
            return result
        return PassResult(prune_contract(result.program), result.matched, result.candidates, result.misses)


def _call(node: object, *targets: object) -> Node | None:
    """`node` when it is a call of one of these targets."""
    return node if isinstance(node, Node) and node.op == "call_function" and node.target in targets else None


def _shape(node: Node) -> list[str]:
    return [str(size) for size in value_of(node).shape]


# -- attention --------------------------------------------------------------------------------


class _Attention(Rule):
    """cached_attention -> group_query_attention, with the rotary embedding and a packed q/k/v inside."""

    def __init__(self, positions: int) -> None:
        self.positions = positions

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        if node.target is not CACHED:
            return None
        q, k, v = (argument for argument in node.args[:3] if isinstance(argument, Node))
        if value_of(q).shape[3] != value_of(v).shape[3]:
            return Miss(node.name, "head sizes of keys and values differ: GroupQueryAttention has one")
        if node.args[7] is not None:
            return Miss(node.name, "attention sinks are not lowered")
        return Match(node)

    def rewrite(self, program: Program, match: Match) -> None:
        node = match.node
        q, k, v, past_key, past_value, past, total, _ = node.args
        assert isinstance(q, Node)
        assert isinstance(k, Node)
        assert isinstance(v, Node)
        kernel = {"num_heads": int(value_of(q).shape[1]), "kv_num_heads": int(value_of(k).shape[1])}
        tables, q, k, interleaved = self._rotary(program, q, k, past)
        size = insert_call(program, node, _aten.sym_size.int, (q, 2))
        last = insert_call(program, node, _aten.add.Tensor, (past, size))
        lengths = insert_call(program, node, _aten.sub.Tensor, (last, 1))
        seqlens = insert_call(program, node, _aten.to.dtype, (lengths, torch.int32))
        streams = self._streams(program, node, q, k, v)
        window = int(node.kwargs["window"]) or -1
        kernel |= {"scale": node.kwargs["scale"], "local_window_size": window, "softcap": node.kwargs["softcap"],
                   "rotary_interleaved": interleaved} # fmt: skip
        args = (*streams, past_key, past_value, seqlens, total, *tables)
        call = insert_call(program, node, _optc.group_query_attention.default, args, kernel)
        self._connect(program, node, call)

    def _rotary(self, program: Program, q: Node, k: Node, past: Any) -> tuple[tuple[Any, Any], Node, Node, bool]:
        """Tables for the kernel's own rotary embedding and q, k before it; (None, None) when it stays outside."""
        first, second = _call(q, ROTARY), _call(k, ROTARY)
        outside = (None, None), q, k, False
        if first is None or second is None or first.args[1:] != second.args[1:] or first.kwargs != second.kwargs:
            return outside
        if not _counts_up_from(first.args[1], past):
            return outside
        tables = rotary_tables(program, first, self.positions)
        inner = first.args[0], second.args[0]
        assert isinstance(inner[0], Node)
        assert isinstance(inner[1], Node)
        size = int(value_of(q).shape[3])
        if 2 * value_of(tables[0]).shape[1] != size:
            return outside  # the CPU kernel rotates whole heads
        return tables, inner[0], inner[1], bool(first.kwargs["interleaved"])

    def _streams(self, program: Program, node: Node, q: Node, k: Node, v: Node) -> tuple[Any, Any, Any]:
        flat = [flat_heads(program, node, x) for x in (q, k, v)]
        split = _packed_source(flat)
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
                merged = _merged_heads(reader, user)
                if merged is not None:
                    replace_node(program, merged, part)
            if user.users:
                shaped = insert_call(program, user, _aten.unflatten.int, (part, -1, [heads, -1]))
                replace_call(program, user, _aten.transpose.int, (shaped, 1, 2))


def rotary_tables(program: Program, rotary: Node, positions: int) -> tuple[Node, Node]:
    """cos and sin [positions, R] of a rotary node as weights, made once per source of frequencies."""
    name = program.weight_of(rotary.args[2])
    assert name is not None, "rotary frequencies are a weight"
    scaling = float(rotary.kwargs["scaling"])
    dtype = value_of(rotary).dtype
    placeholders = {weight: placeholder for placeholder, weight in program.weight_names().items()}
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    angle = torch.arange(positions).float()[:, None] * program.weight(name).float()
    made = []
    for kind, table in (("cos", torch.cos(angle)), ("sin", torch.sin(angle))):
        key = f"{name}.{kind}_cache" + ("" if scaling == 1.0 else f"_{scaling:g}")
        if key in placeholders:
            made.append(nodes[placeholders[key]])
        else:
            made.append(add_weight(program, key, (table * scaling).to(dtype)))
    return made[0], made[1]


def _counts_up_from(position: object, past: Any) -> bool:
    """Whether position is past[:, None] + arange(S), as static-kv-cache makes it."""
    add = _call(position, _aten.add.Tensor)
    if add is None:
        return False
    left, right = _call(add.args[0], _aten.unsqueeze.default), _call(add.args[1], _aten.arange.default)
    return left is not None and right is not None and left.args == (past, 1)


def flat_heads(program: Program, before: Node, x: Node) -> Node:
    """x [B,H,S,D] as [B,S,H*D], by undoing its view and transpose where they are there."""
    transpose = _call(x, _aten.transpose.int)
    if transpose is not None and transpose.args[1:] in ((1, 2), (2, 1)):
        inner = transpose.args[0]
        assert isinstance(inner, Node)
        view = _call(inner, *_RESHAPES)
        size = value_of(inner).shape[2] * value_of(inner).shape[3]
        if view is not None and isinstance(view.args[0], Node):
            source = view.args[0]
            if _shape(source) == [*_shape(inner)[:2], str(size)]:
                return source
    else:
        inner = insert_call(program, before, _aten.transpose.int, (x, 1, 2))
    return insert_call(program, before, _aten.flatten.using_ints, (inner, 2, 3))


def _packed_source(flat: list[Node]) -> Node | None:
    """The tensor whose consecutive parts q, k and v are, or None."""
    parts = [_call(x, operator.getitem) for x in flat]
    if any(part is None or part.args[1] != index for index, part in enumerate(parts)):
        return None
    splits = {part.args[0] for part in parts if part is not None}
    split = _call(splits.pop(), _aten.split_with_sizes.default) if len(splits) == 1 else None
    if split is None or len(split.args[1]) != 3:
        return None
    source = split.args[0]
    assert isinstance(source, Node)
    axis = (*split.args, 0)[2]
    return source if axis in (-1, value_of(source).dim() - 1) else None


def _merged_heads(reader: Node, out: Node) -> Node | None:
    """The node that is out [B,H,S,D] as [B,S,H*D]: transpose, perhaps a copy, and a view; else None."""
    if _call(reader, _aten.transpose.int) is None or reader.args[1:] not in ((1, 2), (2, 1)):
        return None
    _, heads, _, size = value_of(out).shape
    node = reader
    while len(node.users) == 1:
        node = next(iter(node.users))
        if _call(node, *_COPIES):
            continue
        merged = [_shape(reader)[0], _shape(reader)[1], str(heads * size)]
        return node if _call(node, *_RESHAPES) and _shape(node) == merged else None
    return None


# -- linears and norms ------------------------------------------------------------------------


class _QuantizedLinear(Rule):
    """linear(x, dequantize(codes, scale, zero), bias) -> matmul_nbits"""

    def __init__(self, accuracy_level: int) -> None:
        self.accuracy_level = accuracy_level

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        source = _call(node, _aten.linear.default)
        weight = _call(source.args[1], _optc.dequantize.default) if source is not None else None
        if weight is None:
            return None
        names = [program.weight_of(argument) for argument in weight.args[:2]]
        if None in names:
            return Miss(node.name, "codes or scales are computed, not weights")
        columns = int(value_of(weight).shape[1])
        size = int(weight.kwargs["group_size"]) or columns
        if weight.kwargs["bits"] not in (2, 4, 8):
            return Miss(node.name, f"MatMulNBits has no {weight.kwargs['bits']}-bit kernel")
        if size < 16 or size & (size - 1):
            return Miss(node.name, f"MatMulNBits takes groups of 16, 32, 64, ..., not of {size}")
        return Match(node, {"dequantize": weight, "size": size})

    def rewrite(self, program: Program, match: Match) -> None:
        node, weight, size = match.node, match.found["dequantize"], match.found["size"]
        bits = int(weight.kwargs["bits"])
        codes_name = str(program.weight_of(weight.args[0]))
        codes, scale = program.weight(codes_name), program.weight(str(program.weight_of(weight.args[1])))
        rows, columns = codes.shape
        packed = pack_nbits(codes.reshape(rows, columns // size, size), bits)
        base = codes_name.removesuffix(".codes").removesuffix("_codes")
        args = [node.args[0], add_weight(program, f"{base}.packed", packed)]
        args.append(add_weight(program, f"{base}.scales", scale.reshape(rows, columns // size).contiguous()))
        zero_name = program.weight_of(weight.args[2])
        if zero_name is None:
            args.append(None)
        else:
            zero = program.weight(zero_name).reshape(rows, columns // size)
            args.append(add_weight(program, f"{base}.zero_points", pack_nbits(zero, bits)))
        args.append((*node.args, None)[2])
        kernel = {"K": columns, "N": rows, "bits": bits, "block_size": size, "accuracy_level": self.accuracy_level}
        replace_call(program, node, _optc.matmul_nbits.default, args, kernel)
        contract = program.contract
        record_weight(program, f"{base}.packed", contract.sources.get(codes_name, ()), contract.quantization[codes_name])


class _SkipNorm(Rule):
    """rms_norm(x + y) -> skip_rms_norm(x, y), whose second output is the sum"""

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        if node.target is not _aten.rms_norm.default or node.args[2] is None or len(node.args) < 4:
            return None
        source = node.args[0]
        cast = _call(source, _aten.to.dtype)
        if cast is not None and isinstance(cast.args[0], Node) and value_of(cast.args[0]).dtype == value_of(cast).dtype:
            source = cast.args[0]
        add = _call(source, _aten.add.Tensor)
        if add is None or add.kwargs or not all(isinstance(part, Node) for part in add.args):
            return None
        left, right = (value_of(part) for part in add.args)
        if [str(s) for s in left.shape] != [str(s) for s in right.shape] or left.dtype != right.dtype or left.dim() != 3:
            return None
        if value_of(node).dtype != left.dtype or value_of(node.args[2]).dtype != left.dtype:
            return None
        return Match(node, {"add": add, "cast": cast})

    def rewrite(self, program: Program, match: Match) -> None:
        node, add = match.node, match.found["add"]
        call = insert_call(program, add, _optc.skip_rms_norm.default, (*add.args, node.args[2]), {"eps": node.args[3]})
        normed, total = (insert_call(program, add, operator.getitem, (call, i)) for i in (0, 1))
        replace_node(program, node, normed)
        for old in (match.found["cast"], add):
            if old is not None:
                old.replace_all_uses_with(total, delete_user_cb=lambda user: user is not call)
