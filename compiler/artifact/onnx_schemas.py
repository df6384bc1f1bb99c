"""Nodes of an ONNX graph against the schemas of their operators: number of inputs, which may be left out, types, attributes.

ONNX Runtime asks its schemas for most of this, and dies of some of what is left: an empty name where an input is required
is a null pointer in several kernels, a number of heads that is 0 or negative a division by zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MOST = 1 << 31
"""Beyond any size that an attribute of an operator gives."""
_FLOAT, _INT, _STRING = 1, 2, 3  # AttributeProto.AttributeType
_SIZE, _SWITCH = (1, MOST), (0, 1)
Bounds = tuple[int, int] | int
"""The least and the most of an integer, or the type of another attribute."""


@dataclass(frozen=True)
class _Own:
    """An operator of ONNX Runtime's own, as its documentation has it (ContribOperators.md).

    Attributes:
        required: positions of the inputs that must be there. most: number of inputs. outputs: most outputs.
        attributes: what it may have. needed: those that it must have.
    """

    required: frozenset[int]
    most: int
    outputs: int
    attributes: Mapping[str, Bounds]
    needed: frozenset[str]


def _own(
    required: int | Iterable[int], most: int, outputs: int = 1, *, needed: Iterable[str] = (), **attributes: Bounds
) -> _Own:
    positions = frozenset(range(required) if isinstance(required, int) else required)
    return _Own(positions, most, outputs, attributes, frozenset(needed))


_CACHE: dict[str, Bounds] = {"k_quant_type": _STRING, "v_quant_type": _STRING, "kv_cache_bit_width": (0, 8)}
MICROSOFT = {
    "BiasGelu": _own(2, 2),
    "FastGelu": _own(1, 2),
    "FusedMatMul": _own(
        2, 2, alpha=_FLOAT, transA=_SWITCH, transB=_SWITCH, transBatchA=_SWITCH, transBatchB=_SWITCH
    ),
    "Gelu": _own(1, 1),
    "GatherBlockQuantized": _own(
        3, 4, bits=(2, 8), block_size=_SIZE, gather_axis=(-MOST, MOST), quantize_axis=(-MOST, MOST)
    ),
    "GroupQueryAttention": _own(
        (0, 5, 6), 14, 4, needed=("num_heads", "kv_num_heads"), num_heads=_SIZE, kv_num_heads=_SIZE, scale=_FLOAT,
        softcap=_FLOAT, local_window_size=(-1, MOST), do_rotary=_SWITCH, rotary_interleaved=_SWITCH,
        smooth_softmax=(-1, 1), qk_output=(0, 2), **_CACHE,
    ),
    "LinearAttention": _own(
        (0, 1, 2, 4), 6, 2, needed=("q_num_heads", "kv_num_heads"), q_num_heads=_SIZE, kv_num_heads=_SIZE,
        scale=_FLOAT, update_rule=_STRING,
    ),
    "MatMulBnb4": _own(
        3, 3, needed=("K", "N", "block_size", "quant_type"), K=_SIZE, N=_SIZE, block_size=_SIZE, quant_type=_SWITCH,
        training_mode=_SWITCH, transB=_SWITCH,
    ),
    "MatMulIntegerToFloat": _own(4, 7),
    "MatMulNBits": _own(
        3, 6, needed=("K", "N", "block_size"), K=_SIZE, N=_SIZE, bits=(2, 8), block_size=_SIZE, accuracy_level=(0, 4),
        weight_prepacked=(0, 2),
    ),
    "MultiHeadAttention": _own(
        1, 10, 4, needed=("num_heads",), num_heads=_SIZE, mask_filter_value=_FLOAT, scale=_FLOAT, unidirectional=_SWITCH
    ),
    "QuickGelu": _own(1, 1, alpha=_FLOAT),
    "RotaryEmbedding": _own(
        4, 4, interleaved=_SWITCH, is_packed_batching=_SWITCH, num_heads=(0, MOST), rotary_embedding_dim=(0, MOST),
        scale=_FLOAT,
    ),
    "SkipLayerNormalization": _own(3, 5, 4, epsilon=_FLOAT),
    "SkipSimplifiedLayerNormalization": _own(3, 4, 4, epsilon=_FLOAT),
}  # fmt: skip
"""ONNX Runtime's operators that a model may have: pure functions of tensors."""
_OWN_STANDARD = {
    "SimplifiedLayerNormalization": _own(2, 2, 2, axis=(-MOST, MOST), epsilon=_FLOAT, stash_type=(0, MOST))
}
"""Operators that ONNX Runtime keeps in the standard domain, where ONNX has none of the name."""
_COUNTS = frozenset((
    "blocksize", "dilations", "group", "kernel_shape", "kv_num_heads", "num_groups", "num_outputs", "q_num_heads", "strides",
))  # fmt: skip
"""Attributes of standard operators that kernels divide by: 1 or more."""


def misfit(node: Any, version: int) -> str | None:
    """Why a node does not fit its operator's schema; None where it does.

    Args:
        node: whose operator is an allowed one. version: of the standard operators.
    """
    own = MICROSOFT.get(node.op_type) if node.domain else _OWN_STANDARD.get(node.op_type)
    if own is not None:
        return _own_misfit(node, own)
    import onnx

    try:
        schema = onnx.defs.get_schema(node.op_type, max_inclusive_version=version)
    except onnx.defs.SchemaError:
        return f"operator set {version} has no such operator"
    return _standard_misfit(node, schema, onnx.defs.OpSchema.FormalParameterOption)


def _own_misfit(node: Any, own: _Own) -> str | None:
    if len(node.input) > own.most or not 0 < len(node.output) <= own.outputs:
        return f"{len(node.input)} inputs and {len(node.output)} outputs"
    given = {position for position, name in enumerate(node.input) if name}
    missing = sorted(own.required - given)
    if missing:
        return f"its input {missing[0]} is missing"
    if not node.output[0]:
        return "its first output has no name"
    for attribute in node.attribute:
        bounds = own.attributes.get(attribute.name)
        if bounds is None:
            return f"it has an attribute {attribute.name!r}"
        if attribute.type != (bounds if isinstance(bounds, int) else _INT):
            return f"its attribute {attribute.name!r} has another type"
        if not isinstance(bounds, int) and not bounds[0] <= attribute.i <= bounds[1]:
            return f"its attribute {attribute.name!r} is {attribute.i}"
    lacking = sorted(own.needed - {attribute.name for attribute in node.attribute})
    return f"it lacks the attribute {lacking[0]!r}" if lacking else None


def _standard_misfit(node: Any, schema: Any, option: Any) -> str | None:
    inputs, outputs = len(node.input), len(node.output)
    if not schema.min_input <= inputs <= schema.max_input or not schema.min_output <= outputs <= schema.max_output:
        return f"{inputs} inputs and {outputs} outputs"
    for names, formal, kind in ((node.input, schema.inputs, "input"), (node.output, schema.outputs, "output")):
        for position, name in enumerate(names):
            spec = formal[min(position, len(formal) - 1)]
            if not name and spec.option is not option.Optional:
                return f"its {kind} {position} ({spec.name}) is missing"
    known = schema.attributes
    for attribute in node.attribute:
        if attribute.name not in known:
            return f"it has an attribute {attribute.name!r}"
        if attribute.type != int(known[attribute.name].type):
            return f"its attribute {attribute.name!r} has another type"
        numbers = [attribute.i] if attribute.type == _INT else attribute.ints
        if attribute.name in _COUNTS and not all(1 <= number <= MOST for number in numbers):
            return f"its attribute {attribute.name!r} is {list(numbers)[:8]}"
    given = {attribute.name for attribute in node.attribute}
    lacking = sorted(name for name, attribute in known.items() if attribute.required and name not in given)
    return f"it lacks the attribute {lacking[0]!r}" if lacking else None
