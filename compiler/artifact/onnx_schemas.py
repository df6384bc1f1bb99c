"""Nodes of an ONNX graph against the schemas of their operators: number of inputs, which may be left out, types.

ONNX Runtime asks its schemas for most of this, and dies of some of what is left: an empty name where an input is required
is a null pointer in several kernels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class _Arity:
    """Inputs and outputs of an operator of ONNX Runtime's own, as its documentation has them (ContribOperators.md).

    Attributes:
        required: positions of the inputs that must be there. most: number of inputs. outputs: most outputs.
    """

    required: frozenset[int]
    most: int
    outputs: int = 1


def _arity(required: int | Iterable[int], most: int, outputs: int = 1) -> _Arity:
    return _Arity(frozenset(range(required) if isinstance(required, int) else required), most, outputs)


_MICROSOFT = {
    "BiasGelu": _arity(2, 2),
    "FastGelu": _arity(1, 2),
    "FusedMatMul": _arity(2, 2),
    "Gelu": _arity(1, 1),
    "GatherBlockQuantized": _arity(3, 4),
    "GroupQueryAttention": _arity((0, 5, 6), 14, 4),
    "MatMulBnb4": _arity(3, 3),
    "MatMulIntegerToFloat": _arity(4, 7),
    "MatMulNBits": _arity(3, 6),
    "MultiHeadAttention": _arity(1, 10, 4),
    "QuickGelu": _arity(1, 1),
    "RotaryEmbedding": _arity(4, 4),
    "SkipLayerNormalization": _arity(3, 5, 4),
    "SkipSimplifiedLayerNormalization": _arity(3, 4, 4),
}
_OWN_STANDARD = {"SimplifiedLayerNormalization": _arity(2, 2, 2)}
"""Operators that ONNX Runtime keeps in the standard domain, where ONNX has none of the name."""


def misfit(node: Any, version: int) -> str | None:
    """Why a node does not fit its operator's schema; None where it does.

    Args:
        node: whose operator is an allowed one. version: of the standard operators.
    """
    own = _MICROSOFT.get(node.op_type) if node.domain else _OWN_STANDARD.get(node.op_type)
    if own is not None:
        return _arity_misfit(node, own)
    import onnx

    try:
        schema = onnx.defs.get_schema(node.op_type, max_inclusive_version=version)
    except onnx.defs.SchemaError:
        return f"operator set {version} has no such operator"
    return _standard_misfit(node, schema, onnx.defs.OpSchema.FormalParameterOption)


def _arity_misfit(node: Any, arity: _Arity) -> str | None:
    if len(node.input) > arity.most or not 0 < len(node.output) <= arity.outputs:
        return f"{len(node.input)} inputs and {len(node.output)} outputs"
    given = {position for position, name in enumerate(node.input) if name}
    missing = sorted(arity.required - given)
    if missing:
        return f"its input {missing[0]} is missing"
    return None if node.output[0] else "its first output has no name"


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
    given = {attribute.name for attribute in node.attribute}
    lacking = sorted(name for name, attribute in known.items() if attribute.required and name not in given)
    return f"it lacks the attribute {lacking[0]!r}" if lacking else None


def type_misfit(model: Any) -> str | None:
    """What the inference of types and shapes refuses about a graph whose nodes fit their schemas; None where it goes through.

    Operators that ONNX does not know are passed over.
    """
    import onnx

    try:
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=False)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError, TypeError) as error:
        return " ".join(str(error).split())[:300]
    return None
