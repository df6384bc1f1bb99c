"""Hand-made ONNX graphs, and TensorRT for RTX's parser and builder on them."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from optc.exporters.trt import build_plan

B, H, HKV, D, T = 2, 4, 2, 16, 32
HALF, BOOL, INT64 = TensorProto.FLOAT16, TensorProto.BOOL, TensorProto.INT64
QKV = [("q", HALF, ["b", H, "s", D]), ("k", HALF, ["b", HKV, T, D]), ("v", HALF, ["b", HKV, T, D])]


def model(
    nodes: list[Any], inputs: list[Any], weights: tuple[Any, ...] = (), *, opset: int = 24, microsoft: bool = False
) -> ModelProto:
    """A graph whose one output is `y`."""
    domains = [helper.make_opsetid("", opset)] + [helper.make_opsetid("com.microsoft", 1)] * microsoft
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(*item) for item in inputs],
        [helper.make_tensor_value_info("y", HALF, None)],
        list(weights),
    )
    return helper.make_model(graph, opset_imports=domains, ir_version=11)


def node(kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> Any:
    return helper.make_node(kind, inputs, outputs, **attributes)


def half(name: str, *shape: int) -> Any:
    return numpy_helper.from_array(np.full(shape, 0.02, np.float16), name)


def nibbles(name: str, kind: int, *shape: int) -> Any:
    """4-bit numbers, all 1."""
    data = np.full((int(np.prod(shape)) + 1) // 2, 0x11, np.uint8).tobytes()
    return helper.make_tensor(name, kind, shape, data, raw=True)


class Parsed:
    """What TensorRT for RTX reads a graph as; `errors` when it refuses it."""

    def __init__(self, graph: ModelProto) -> None:
        self.trt, _ = build_plan.load("rtx")
        self.log = build_plan.make_logger(self.trt)
        self.builder = self.trt.Builder(self.log)
        self.network = self.builder.create_network(0)
        self.parser = self.trt.OnnxParser(self.network, self.log)
        taken = self.parser.parse(graph.SerializeToString())
        errors = [self.parser.get_error(index).desc() for index in range(self.parser.num_errors)]
        self.errors = "" if taken else " ".join(errors)

    def check(self, **network: Any) -> dict[str, Any]:
        """build_plan's comparison with a program that has these layers and the graph's own tensors."""
        facts = {
            "network": network,
            "inputs": dict.fromkeys(self.network.get_input(i).name for i in range(self.network.num_inputs)),
            "outputs": {"y": None},
        }
        return build_plan.check_network(self.trt, self.network, facts)
