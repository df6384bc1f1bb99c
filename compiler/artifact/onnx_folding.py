"""How much an engine computes while it opens an ONNX graph: what follows from constants alone, which it folds.

Sizes come from onnx's inference of shapes. It does not follow sizes that are computed (its data propagation does, and takes
any time and memory for them); here those of a few numbers are computed and put into the graph as constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

_MOST = 64
"""Numbers of a value that is computed here: a shape, or a place in one."""
_ROUNDS = 8
_Array = np.ndarray[Any, np.dtype[np.int64]]


def inferred(model: Any) -> Any:
    """A graph whose nodes fit their schemas, with the types and shapes that follow; a string says why they do not.

    Operators that ONNX does not know are passed over.
    """
    import onnx

    try:
        return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=False)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError, TypeError) as error:
        return " ".join(str(error).split())[:300]


def folded_numbers(model: Any) -> int | str:
    """How many numbers follow from constants in an inferred graph. A string says of which the size does not follow."""
    for _ in range(_ROUNDS):
        count = _count(model)
        if isinstance(count, int):
            return count
        known = _with_known_sizes(model)
        if known is None:
            return count
        model = inferred(known)
        if isinstance(model, str):
            return model
    return count


def _constants(graph: Any) -> set[str]:
    """Initializers that nothing can be fed in place of."""
    fed = {item.name for item in graph.input}
    return {tensor.name for tensor in graph.initializer if tensor.name not in fed}


def _shapes(graph: Any) -> dict[str, list[int]]:
    """Shapes of values of which every size is a number."""
    found = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for item in (*graph.value_info, *graph.output):
        shape = item.type.tensor_type.shape
        if item.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in shape.dim):
            found[item.name] = [dim.dim_value for dim in shape.dim]
    return found


def _count(model: Any) -> int | str:
    constant, shapes, total = _constants(model.graph), _shapes(model.graph), 0
    for node in model.graph.node:
        if not all(name in constant for name in node.input if name):
            continue
        for name in filter(None, node.output):
            if name not in shapes:
                return f"the size of {name!r}, which is computed from constants, does not follow"
            constant.add(name)
            total += math.prod(shapes[name])
    return total


def _with_known_sizes(model: Any) -> Any:
    """A copy of a graph in which small values that follow from constants are initializers; None where none is new."""
    from onnx import ModelProto, numpy_helper

    shapes, values = _shapes(model.graph), _small(model.graph)
    constant, outputs = _constants(model.graph), {item.name for item in model.graph.output}
    changed = ModelProto()
    changed.CopyFrom(model)
    del changed.graph.node[:]
    for node in model.graph.node:
        made = None
        if all(name in constant for name in node.input if name):
            constant.update(node.output)
            made = _computed(node, values, shapes)
        if made is None or len(node.output) != 1 or node.output[0] in outputs:
            changed.graph.node.append(node)
            continue
        values[node.output[0]] = made
        changed.graph.initializer.append(numpy_helper.from_array(made, node.output[0]))
    return None if len(changed.graph.node) == len(model.graph.node) else changed


def _small(graph: Any) -> dict[str, _Array]:
    """Initializers of a few whole numbers that lie in the model."""
    from onnx import TensorProto, numpy_helper

    constant = _constants(graph)
    return {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if tensor.name in constant
        and tensor.data_type == TensorProto.INT64
        and tensor.data_location != TensorProto.EXTERNAL
        and math.prod(tensor.dims) <= _MOST
    }


def _computed(node: Any, values: Mapping[str, _Array], shapes: Mapping[str, list[int]]) -> _Array | None:
    """What a node of a few numbers gives; None for other nodes."""
    if node.domain:
        return None
    given = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type == "Shape":
        shape = shapes.get(node.input[0])
        return (
            None if shape is None else np.array(shape[given.get("start", 0) : given.get("end", len(shape))], np.int64)
        )
    compute = _SMALL.get(node.op_type)
    if compute is None or not all(name in values for name in node.input):
        return None
    try:
        made = np.asarray(compute([values[name] for name in node.input], given), np.int64)
    except (ValueError, IndexError, TypeError):
        return None
    return made if made.size <= _MOST else None


_SMALL: Mapping[str, Callable[[list[_Array], Mapping[str, int]], Any]] = {
    "Add": lambda x, _: x[0] + x[1],
    "Sub": lambda x, _: x[0] - x[1],
    "Mul": lambda x, _: x[0] * x[1],
    "Max": lambda x, _: np.maximum.reduce(x),
    "Min": lambda x, _: np.minimum.reduce(x),
    "Concat": lambda x, given: np.concatenate(x, given["axis"]),
    "Gather": lambda x, given: np.take(x[0], x[1], given.get("axis", 0)),
    "Squeeze": lambda x, _: np.squeeze(x[0], tuple(x[1].tolist()) if len(x) > 1 else None),
    "Unsqueeze": lambda x, _: np.expand_dims(x[0], tuple(x[1].tolist())),
}
"""Operators by which sizes are computed: arguments and whole attributes -> the value."""
