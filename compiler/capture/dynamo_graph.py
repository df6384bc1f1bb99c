"""A graph of torch.compile, taken apart: which arguments are weights, sizes and tensors, and what the outputs are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Graph, GraphModule, Node

from optc.compiler.diagnostics import TargetError

Argument = Tensor | SymInt | int

_MODES = frozenset(
    (
        torch._C._set_grad_enabled,
        torch.autograd.grad_mode._enter_inference_mode,
        torch.autograd.grad_mode._exit_inference_mode,
    )
)
"""Calls that change whether gradients are recorded: none are here."""
_ENTER, _EXIT = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast
_PART = re.compile(r"_modules\['([^']+)'\]|_(?:parameters|buffers)\['([^']+)'\]$|\.(\w+)$", re.ASCII)


@dataclass(frozen=True)
class Place:
    """Where a size is found: an axis of an argument."""

    argument: int
    axis: int


@dataclass(frozen=True)
class Arguments:
    """The arguments of a graph, by their place in its calls.

    Attributes:
        weights: argument -> name of the tensor, which the module holds.
        tensors: arguments that are inputs of the program.
        sizes: argument that is a size -> the tensor's axis that has it.
        numbers: arguments that are sizes of no tensor; each is an input of the program as the first axis of [n, 0].
    """

    weights: Mapping[int, str]
    tensors: tuple[int, ...]
    sizes: Mapping[int, Place]
    numbers: tuple[int, ...]


def read_arguments(graph: GraphModule, examples: Sequence[Argument], written: frozenset[int]) -> Arguments:
    """Sort the arguments of a graph.

    Args:
        written: arguments that the graph writes into: such a weight is an input.

    Raises:
        TargetError: an argument of a kind that no program takes.
    """
    nodes = placeholders(graph)
    weights: dict[int, str] = {}
    for index, (node, example) in enumerate(zip(nodes, examples, strict=True)):
        if isinstance(example, Tensor) and _held(node, example) and index not in written:
            name = _weight_name(node)
            weights[index] = name if name not in weights.values() else f"{name}_{index}"
    tensors = tuple(i for i, item in enumerate(examples) if isinstance(item, Tensor) and i not in weights)
    places = dict(_places(nodes, tensors))
    sizes: dict[int, Place] = {}
    numbers: list[int] = []
    for index, (node, example) in enumerate(zip(nodes, examples, strict=True)):
        if isinstance(example, Tensor):
            continue
        if not isinstance(example, int | SymInt):
            raise TargetError(
                "the graph takes something else than tensors and whole numbers",
                where=node.name,
                why=f"argument {index} is of type {type(example).__name__}",
                remedy="pass it as a tensor",
            )
        found = places.get(str(_value(node)))
        if found is None:
            numbers.append(index)
        else:
            sizes[index] = found
    return Arguments(weights, tensors, sizes, tuple(numbers))


def placeholders(graph: GraphModule) -> list[Node]:
    """The placeholders, in the order of a call's arguments."""
    return [node for node in graph.graph.nodes if node.op == "placeholder"]


def _value(node: Node) -> Any:
    return node.meta.get("example_value", node.meta.get("val"))


def _held(node: Node, example: Tensor) -> bool:
    """Whether the module holds a tensor: Dynamo marks what it reads off an nn.Module."""
    described = node.meta.get("tensor_dict") or {}
    return isinstance(example, torch.nn.Parameter) or "_dynamo_static_input_type" in described


def _weight_name(node: Node) -> str:
    """`model.layers.0.weight` of Dynamo's `L['self']._modules['model']...`; else the placeholder's own name."""
    argument = node.meta.get("grapharg")
    source = str(getattr(getattr(argument, "source", None), "name", ""))
    parts = ["".join(found) for found in _PART.findall(source)]
    return ".".join(parts) if parts and all(part.isidentifier() or part.isdigit() for part in parts) else node.name


def _places(nodes: Sequence[Node], tensors: Sequence[int]) -> Iterator[tuple[str, Place]]:
    for index in reversed(tensors):
        shape = _value(nodes[index]).shape
        yield from ((str(size), Place(index, axis)) for axis, size in enumerate(shape) if isinstance(size, SymInt))


@dataclass
class Outputs:
    """Where each output of the graph comes from.

    Attributes:
        kinds: ("computed", index of a program's output), ("argument", index) or ("size", its symbolic value).
        nodes: the nodes that the program computes.
    """

    kinds: list[tuple[str, Any]] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)


def read_outputs(graph: GraphModule) -> Outputs:
    """Sort the outputs of a graph.

    Raises:
        TargetError: an output that is neither a tensor nor a size.
    """
    order = {node: index for index, node in enumerate(placeholders(graph))}
    outputs = Outputs()
    items = graph.graph.output_node().args[0]
    for item in items if isinstance(items, tuple | list) else (items,):
        value = _value(item) if isinstance(item, Node) else item
        if isinstance(item, Node) and item in order:
            outputs.kinds.append(("argument", order[item]))
        elif isinstance(item, Node) and isinstance(value, Tensor):
            outputs.kinds.append(("computed", len(outputs.nodes)))
            outputs.nodes.append(item)
        elif isinstance(value, int | SymInt):
            outputs.kinds.append(("size", value))
        else:
            raise TargetError(
                "the graph returns something else than tensors and sizes",
                where=str(item),
                why=f"it is of type {type(value).__name__}",
                remedy="return it as a tensor",
            )
    return outputs


def standalone(graph: GraphModule, arguments: Arguments, outputs: Outputs, examples: Sequence[Argument]) -> GraphModule:
    """The same computation with weights as attributes, sizes read off tensors, and computed tensors alone as outputs.

    Args:
        examples: one for each argument; weights are taken from there.
    """
    nodes, made = placeholders(graph), Graph()
    values: dict[Node, Any] = {}
    for index in (*arguments.tensors, *arguments.numbers):
        values[nodes[index]] = made.placeholder(nodes[index].name)
    for index in arguments.numbers:
        values[nodes[index]] = made.call_function(torch.ops.aten.sym_size.int, (values[nodes[index]], 0))
    for index, place in arguments.sizes.items():
        tensor = values[nodes[place.argument]]
        values[nodes[index]] = made.call_function(torch.ops.aten.sym_size.int, (tensor, place.axis))
    root: dict[str, Any] = {}
    for index, name in arguments.weights.items():
        weight = examples[index]
        assert isinstance(weight, Tensor)
        root[name] = torch.nn.Parameter(weight.detach(), requires_grad=False)
        values[nodes[index]] = made.get_attr(name)
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "output") or node.target in _MODES or _idle_autocast(node):
            continue
        if node.op in ("get_attr", "call_module"):
            root[node.target] = _attribute(graph, node.target)
        values[node] = made.node_copy(node, values.__getitem__)
    made.output(tuple(values[node] for node in outputs.nodes))
    return GraphModule(root, made, class_name="TorchCompileGraph")


def _idle_autocast(node: Node) -> bool:
    """Whether a call enters or leaves a region that turns autocast off where it is not on."""
    entry = node.args[0] if node.target is _EXIT and node.args else node
    if not isinstance(entry, Node) or entry.target is not _ENTER:
        return False
    device, _, enabled = (*entry.args, None, None, True)[:3]
    return enabled is False and not torch.is_autocast_enabled(str(device))


def _attribute(module: torch.nn.Module, path: str) -> Any:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part)
    return found
