"""Walk an FX graph into an onnx-ir model.

One lowering per operator (see `table`). Sizes that depend on the input (SymInts) are int64 tensors of
shape [1]; they broadcast in arithmetic and concatenate into shapes without reshaping.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from optc.compiler.ir.contract import CACHE_ROLES, Contract
from optc.compiler.ir.lazy_weights import materialized
from optc.compiler.ir.program import Program
from optc.compiler.ir.provenance import module_path
from optc.exporters.onnx.external_data import WeightTensor

OPSET = 24  # from 25 on, ONNX Runtime's CPU Attention has no kernel
IR_VERSION = 11
MICROSOFT = "com.microsoft"

DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float64: ir.DataType.DOUBLE,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.int16: ir.DataType.INT16,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
    torch.bool: ir.DataType.BOOL,
    torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN,
}
DEFAULTS: dict[str, list[Any]] = {"logits_from_end": [[1]]}
"""Inputs with a default, by role: the last token of each row."""
_AXIS_NAMES = {  # the names that onnxruntime-genai's own models use
    "batch": "batch_size",
    "seq": "sequence_length",
    "total": "total_sequence_length",
    "past": "past_sequence_length",
    "present": "max_sequence_length",
}

Lowering = Callable[["Walker", Node], Any]


class Walker:
    """The state of one translation: values by node, initializers by weight name, nodes in order.

    `microsoft`: whether operators of ONNX Runtime's own domain may be used.
    """

    def __init__(
        self,
        program: Program,
        table: dict[Any, Lowering],
        *,
        opset: int = OPSET,
        ir_version: int = IR_VERSION,
        microsoft: bool = True,
    ) -> None:
        self.program, self.table = program, table
        self.opset, self.ir_version, self.microsoft = opset, ir_version, microsoft
        self.values: dict[Node, Any] = {}
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self._weight_names = program.weight_names()
        self._constants: dict[Any, ir.Value] = {}
        self._transposed: dict[str, ir.Value] = {}
        self._scalars: dict[Node, ir.Value] = {}
        self._casts: dict[tuple[int, torch.dtype], ir.Value] = {}
        self._scope = ""
        self._serial: dict[str, int] = {}

    def run(self) -> ir.Model:
        """Translate the whole graph."""
        contract = self.program.contract
        specs = dict(zip(self.program.user_inputs(), contract.inputs, strict=True))
        inputs = []
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                if node in specs:
                    spec = specs[node]
                    dims = [_AXIS_NAMES.get(d, d) if isinstance(d, str) else d for d in spec.dims]
                    self.values[node] = self._graph_value(spec.name, node, dims)
                    if spec.role in DEFAULTS:
                        self._default(self.values[node], DEFAULTS[spec.role])
                    inputs.append(self.values[node])
            elif node.op == "call_function":
                path = module_path(node)
                self._scope = "/" + path.replace(".", "/") if path else ""
                self.values[node] = self._lower(node)
        outputs = self._outputs(contract)
        nodes, used = self._read(outputs)
        kept = [value for value in self.initializers.values() if id(value) in used]
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=nodes,
            initializers=kept,
            name="optc",
            opset_imports={"": self.opset, **({MICROSOFT: 1} if self.microsoft else {})},
        )
        return ir.Model(graph, ir_version=self.ir_version, producer_name="optc")

    def _read(self, outputs: Sequence[ir.Value]) -> tuple[list[ir.Node], set[int]]:
        """The nodes that something reads, in order, and the identities of all values that are read."""
        used, nodes = {id(value) for value in outputs}, []
        for item in reversed(self.nodes):
            if any(id(value) in used for value in item.outputs):
                used |= {id(value) for value in item.inputs if value is not None}
                nodes.append(item)
        return nodes[::-1], used

    def _lower(self, node: Node) -> Any:
        if node.target is operator.getitem and isinstance(self.values.get(node.args[0]), list | tuple):
            return self.values[node.args[0]][node.args[1]]
        return self.table[node.target](self, node)

    def _default(self, value: ir.Value, default: list[Any]) -> None:
        """Let an input have a value that whoever runs the graph may leave as it is."""
        assert value.name is not None
        tensor = torch.tensor(default)
        value.const_value = WeightTensor(value.name, tensor.detach, DTYPES[tensor.dtype], tensor.shape)
        self.initializers[value.name] = value

    def _graph_value(self, name: str, node: Node, dims: Sequence[int | str]) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(DTYPES[node.meta["val"].dtype]))

    def _outputs(self, contract: Contract) -> list[ir.Value]:
        result = self.program.graph.output_node()
        flat = [item for item in torch.utils._pytree.tree_leaves(result.args[0]) if isinstance(item, Node)]
        names = _symbol_names(self.program)
        outputs: list[ir.Value] = []
        for node, spec in zip(flat, contract.outputs, strict=True):
            value = self.values[node]
            if value in outputs or value.name in self.initializers or value.producer() is None:
                value = self.op("Identity", [value])  # one name per output
            val = node.meta["val"]
            cache = spec.role in CACHE_ROLES
            dims = [
                size if isinstance(size, int) else names.get(str(size), f"{spec.name}_dim{axis}")
                for axis, size in enumerate(val.shape)
            ]
            if spec.role == "logits" and contract.input_index("logits_from_end") is not None:
                dims[1] = 1  # of the default: onnxruntime-genai makes room by it
            if cache and not isinstance(val.shape[2], int):
                dims[2] = _AXIS_NAMES["present"]
            value.name, value.type, value.shape = spec.name, ir.TensorType(DTYPES[val.dtype]), ir.Shape(dims)
            outputs.append(value)
        return outputs

    # -- building --------------------------------------------------------------------------

    def op(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
    ) -> Any:
        """Append a node; its output, or the tuple of its outputs when there are several.

        A part of a shape becomes Shape and Slice before opset 19: TensorRT 8's parser ignores Shape's start and end,
        and gives the whole shape.
        """
        if kind == "Shape" and attributes and self.opset < 19:
            ends = [[attributes[key]] for key in ("start", "end")]
            whole = self.op("Shape", inputs)
            return self.op("Slice", [whole, *map(self.constant, ends), self.constant([0])])
        assert self.microsoft or domain != MICROSOFT, f"{kind} is an operator of ONNX Runtime's own"
        trimmed = list(inputs)
        while trimmed and trimmed[-1] is None:
            trimmed.pop()
        name = self._unique(f"{self._scope}/{kind}")
        made = ir.Node(
            domain,
            kind,
            trimmed,
            ir.convenience.convert_attributes(attributes or {}),
            num_outputs=outputs,
            name=name,
        )
        for index, value in enumerate(made.outputs):
            value.name = f"{name}.{index}" if outputs > 1 else f"{name}.out"
        self.nodes.append(made)
        return made.outputs[0] if outputs == 1 else tuple(made.outputs)

    def constant(self, value: Any, dtype: torch.dtype = torch.int64) -> ir.Value:
        """A constant tensor (list or number), shared with equal ones."""
        tensor = torch.tensor(value, dtype=dtype)
        key = (dtype, tuple(tensor.shape), str(tensor.tolist()))  # as text, -0.0 is not 0.0
        if key not in self._constants:
            name = self._unique("const")
            self._constants[key] = self._initializer(name, tensor)
        return self._constants[key]

    def weight(self, node: Node, *, transposed: bool = False) -> ir.Value:
        """The initializer of a weight placeholder; `transposed` stores [N, K] as [K, N]."""
        name = self._weight_names[node.name]
        if not transposed:
            if name not in self.initializers:
                self._initializer(name, self.program.weight(name))
            return self.initializers[name]
        if name not in self._transposed:
            self._transposed[name] = self._initializer(f"{name}.T", self.program.weight(name).detach().t())
        return self._transposed[name]

    def packed(self, node: Node, kind: ir.DataType, shape: Sequence[int]) -> ir.Value:
        """The initializer of bytes that hold two 4-bit numbers each, as numbers of a shape."""
        name = self._weight_names[node.name]
        if name not in self.initializers:
            tensor = self.program.weight(name).detach()
            self._put(name, WeightTensor(name, lambda: tensor, kind, shape))
        return self.initializers[name]

    def compact(self, node: Node) -> ir.Value:
        """A weight of float32, stored in float16 with a cast behind it where all of its values fit exactly.

        ONNX Runtime folds the cast when it loads the model.
        """
        name = self._weight_names[node.name]
        tensor = materialized(self.program.weight(name).detach())
        half = tensor.half()
        if tensor.dtype is not torch.float32 or not torch.equal(half.float(), tensor):
            return self.weight(node)
        if name not in self.initializers:
            stored = self.program.weight(name).detach()
            self.computed(name, lambda: materialized(stored).half(), torch.float16, half.shape)
        return self.cast(self.initializers[name], torch.float32)

    def _initializer(self, name: str, tensor: torch.Tensor) -> ir.Value:
        return self.computed(name, tensor.detach, tensor.dtype, tensor.shape)

    def computed(
        self, name: str, compute: Callable[[], torch.Tensor], dtype: torch.dtype, shape: Sequence[int]
    ) -> ir.Value:
        """An initializer whose bytes are made when they are written, one weight at a time."""
        return self._put(name, WeightTensor(name, compute, DTYPES[dtype], shape))

    def _put(self, name: str, tensor: WeightTensor) -> ir.Value:
        kind = ir.TensorType(tensor.dtype)
        self.initializers[name] = ir.Value(name=name, shape=tensor.shape, type=kind, const_value=tensor)
        return self.initializers[name]

    def _unique(self, name: str) -> str:
        count = self._serial.get(name, 0)
        self._serial[name] = count + 1
        return f"{name}_{count}" if count else name

    # -- arguments -------------------------------------------------------------------------

    def value(self, argument: Any, dtype: torch.dtype | None = None) -> ir.Value:
        """A node's value, a weight, a size or a number as a scalar; cast to `dtype` when it has another."""
        if not isinstance(argument, Node):
            assert dtype is not None, "a number takes the type of what it meets"
            return self.constant(argument, dtype)
        if argument.op == "placeholder" and argument.name in self._weight_names:
            found = self.weight(argument)
        elif is_symbolic(argument):
            found = self.scalar(argument)
        else:
            found = self.values[argument]
        val = argument.meta["val"]
        own = val.dtype if isinstance(val, torch.Tensor) else torch.int64
        return found if dtype is None or own is dtype else self.cast(found, dtype)

    def cast(self, value: ir.Value, dtype: torch.dtype) -> ir.Value:
        """A value in another type, made once."""
        key = (id(value), dtype)
        if key not in self._casts:
            self._casts[key] = self.op("Cast", [value], {"to": int(DTYPES[dtype])})
        return self._casts[key]

    def size(self, argument: Any) -> ir.Value:
        """A size (int or SymInt node) as int64 [1]."""
        if isinstance(argument, Node):
            return self.values[argument]
        assert isinstance(argument, int), f"{argument!r} is known to the tracer only"
        return self.constant([argument])

    def sizes(self, arguments: Sequence[Any]) -> ir.Value:
        """Several sizes as one int64 vector."""
        if all(isinstance(item, int) for item in arguments):
            return self.constant([int(item) for item in arguments])
        return self.op("Concat", [self.size(item) for item in arguments], {"axis": 0})

    def scalar(self, argument: Any) -> ir.Value:
        """A size as an int64 scalar."""
        if not isinstance(argument, Node):
            assert isinstance(argument, int), f"{argument!r} is not a size"
            return self.constant(argument)
        if argument not in self._scalars:
            self._scalars[argument] = self.op("Squeeze", [self.size(argument), self.constant([0])])
        return self._scalars[argument]


def is_symbolic(node: object) -> bool:
    """Whether a node computes a size."""
    return isinstance(node, Node) and not isinstance(node.meta.get("val"), torch.Tensor)


def result_dtype(node: Node) -> torch.dtype:
    """The element type of a node's (first) result; int64 for a size."""
    val = node.meta["val"]
    val = val[0] if isinstance(val, list | tuple) else val
    return val.dtype if isinstance(val, torch.Tensor) else torch.int64


def _symbol_names(program: Program) -> dict[str, str]:
    """Symbolic size -> axis name, from the inputs."""
    names: dict[str, str] = {}
    for node, spec in zip(program.user_inputs(), program.contract.inputs, strict=True):
        for size, dim in zip(node.meta["val"].shape, spec.dims, strict=True):
            if not isinstance(size, int) and isinstance(dim, str):
                names.setdefault(str(size), _AXIS_NAMES.get(dim, dim))
    return names


def axis_of(node: Node, axis: int) -> int:
    """A non-negative axis of a node's tensor."""
    return axis % max(node.meta["val"].dim(), 1)


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    """An argument by position or keyword, as the operator's schema has it."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)
