"""`basic` graphs keep to what the parser of TensorRT 8.6 takes, by its source (onnx-tensorrt, branch 8.6-EA).

What it does not take it refuses or, worse, reads as something else; it cannot be run without a GPU.
"""

from __future__ import annotations

from types import SimpleNamespace

import onnx
import pytest
import torch
import trt_driver
from onnx import TensorProto, numpy_helper
from rewrites import stirred

from optc.exporters.trt import build_plan

OPERATORS = {
    "Add",
    "And",
    "Cast",
    "Concat",
    "Constant",
    "DequantizeLinear",
    "Div",
    "Erf",
    "Exp",
    "Expand",
    "Gather",
    "Greater",
    "Identity",
    "Less",
    "LessOrEqual",
    "MatMul",
    "Mul",
    "Neg",
    "Not",
    "Or",
    "Pow",
    "QuantizeLinear",
    "Range",
    "ReduceMean",
    "Reshape",
    "ScatterND",
    "Shape",
    "Sigmoid",
    "Slice",
    "Softmax",
    "Split",
    "Sqrt",
    "Squeeze",
    "Sub",
    "Tanh",
    "Transpose",
    "Unsqueeze",
    "Where",
}
CASTS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL}


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> onnx.GraphProto:
    """A Llama in float16 with 8-bit weights and inputs."""
    given = {"dtype": "fp16", "quant": "smoothquant", "trt_ops": "basic"}
    folder = tmp_path_factory.mktemp("basic")
    chosen = trt_driver.options(**given)
    trt_driver.export(trt_driver.stages(stirred("llama", torch.float16), chosen)[1], folder, chosen)
    return onnx.load(folder / "model.onnx").graph


def test_only_operators_and_types_that_it_knows(graph: onnx.GraphProto) -> None:
    assert {node.op_type for node in graph.node} <= OPERATORS
    casts = [node.attribute[0].i for node in graph.node if node.op_type == "Cast"]
    assert set(casts) <= CASTS
    kinds = {item.data_type for item in graph.initializer}
    assert kinds <= {*CASTS, TensorProto.INT8}
    assert all(item.type.tensor_type.elem_type in CASTS for item in [*graph.input, *graph.output])


def test_shape_has_no_start_and_end(graph: onnx.GraphProto) -> None:
    """They are ignored: Shape(x, start=1, end=2) would be the whole shape."""
    shapes = [node for node in graph.node if node.op_type == "Shape"]
    assert shapes
    assert not [node.name for node in shapes if node.attribute]


def test_rounding_has_three_inputs_and_positive_scales_of_float32(graph: onnx.GraphProto) -> None:
    stored = {item.name: item for item in graph.initializer}
    nodes = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(nodes) == 2 * (8 + 14)
    for node in nodes:
        scale, zero = (numpy_helper.to_array(stored[name]) for name in node.input[1:])
        assert scale.dtype == "float32"
        assert (scale > 0).all()
        assert zero.dtype == "int8"
        assert zero.shape == scale.shape
        assert not zero.any()


def test_weights_are_float32_behind_both_and_a_transpose(graph: onnx.GraphProto) -> None:
    """DequantizeLinear of stored codes is not taken, and only this form becomes a product of integers."""
    stored = {item.name: item for item in graph.initializer}
    maker = {output: node for node in graph.node for output in node.output}
    readers: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    weights = [node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] in stored]
    assert len(weights) == 14
    for node in weights:
        assert stored[node.input[0]].data_type == TensorProto.FLOAT
        assert stored[node.input[0]].dims[0] == stored[node.input[1]].dims[0]
        assert readers[node.output[0]] == ["DequantizeLinear"]
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            assert maker[node.input[0]].op_type == "QuantizeLinear"
            after = set(readers[node.output[0]])
            assert after == ({"Transpose"} if maker[node.input[0]] in weights else {"MatMul"})


def test_axes_are_stored(graph: onnx.GraphProto) -> None:
    stored = {item.name for item in graph.initializer}
    moved = [node for node in graph.node if node.op_type in ("Squeeze", "Unsqueeze")]
    assert all(node.input[1] in stored for node in moved)


def network_of(count: int, reported: str) -> SimpleNamespace:
    """A parsed network of DequantizeLinear layers only, whose codes are reported as of a type."""
    codes = SimpleNamespace(dtype=f"DataType.{reported}")
    layer = SimpleNamespace(type="LayerType.DEQUANTIZE", get_input=lambda index: codes)
    return SimpleNamespace(
        num_layers=count, get_layer=lambda index: layer, num_inputs=0, num_outputs=0, get_input=None, get_output=None
    )


def test_before_10_the_number_of_rounded_tensors_is_compared() -> None:
    """The API reports types there that it chose by itself."""
    facts = {"network": {"dequantize": {"INT8": 3}}, "inputs": {}, "outputs": {}}
    old, new = SimpleNamespace(__version__="8.6.0"), SimpleNamespace(__version__="10.9.0")
    build_plan.check_network(old, network_of(3, "FLOAT"), facts)
    with pytest.raises(build_plan.BuildError, match="the parsed network is not the program") as caught:
        build_plan.check_network(old, network_of(2, "FLOAT"), facts)
    assert "dequantize: {'FLOAT': 2}, the program has {'INT8': 3}" in caught.value.why
    with pytest.raises(build_plan.BuildError, match="the parsed network is not the program"):
        build_plan.check_network(new, network_of(3, "FLOAT"), facts)
