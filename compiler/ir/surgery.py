"""Edits of an ExportedProgram in place: new weights, dropped weights, replaced nodes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import OutputKind, OutputSpec, TensorArgument
from torch.fx import Node
from torch.utils._pytree import tree_structure

from optc.compiler.compat import symbolic_dispatch
from optc.compiler.ir.asserts import ASSERTS
from optc.compiler.ir.contract import Output
from optc.compiler.ir.program import Program
from optc.compiler.ir.quick_tracing import quick_shapes


def fake_mode(program: Program) -> FakeTensorMode:
    """The fake mode that the graph's shapes live in."""
    for node in program.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            assert isinstance(mode, FakeTensorMode)
            return mode
    raise AssertionError("a Program without any tensor")


def add_weight(program: Program, name: str, tensor: torch.Tensor) -> Node:
    """Add a weight (as a persistent buffer, in the program's work file where it has one) and return its placeholder."""
    state = program.exported.state_dict
    assert name not in state, f"weight {name} exists"
    node = program.weight_table.add_buffer("b_" + re.sub(r"\W", "_", name), name)
    with fake_mode(program):
        node.meta["val"] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    state[name] = program.stored(tensor)
    return node


def set_weight(program: Program, name: str, tensor: torch.Tensor) -> None:
    """Replace the value of a weight of a clone under edit; shape and dtype stay."""
    table = program.exported.state_dict if name in program.exported.state_dict else program.exported.constants
    old = table[name]
    assert isinstance(old, torch.Tensor), name
    assert (old.shape, old.dtype) == (tensor.shape, tensor.dtype), f"{name} would change its shape or type"
    tensor = program.stored(tensor)
    # A parameter stays one: torch.export distinguishes them from buffers by type.
    table[name] = torch.nn.Parameter(tensor, requires_grad=False) if isinstance(old, torch.nn.Parameter) else tensor


def replace_call(
    program: Program, old: Node, target: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None
) -> Node:
    """Put a call of `target` in place of `old`; shapes are recomputed, source lines are kept."""
    graph = program.graph
    with graph.inserting_before(old):
        new = graph.call_function(target, tuple(args), kwargs or {})
    new.meta = {key: value for key, value in old.meta.items() if key not in ("val", "tensor_meta")}
    infer_meta(program, new)
    replace_node(program, old, new)
    return new


def replace_node(program: Program, old: Node, new: Node) -> None:
    """Let everything that read `old`, the program's outputs among it, read `new`; erase `old`."""
    for spec in program.exported.graph_signature.output_specs:
        if spec.arg.name == old.name:
            spec.arg.name = new.name
    old.replace_all_uses_with(new)
    program.graph.erase_node(old)


def insert_call(
    program: Program, before: Node, target: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None
) -> Node:
    """Insert a call before a node, with its fake value; source lines are taken from `before`."""
    with program.graph.inserting_before(before):
        new = program.graph.call_function(target, tuple(args), kwargs or {})
    new.meta = {key: value for key, value in before.meta.items() if key not in ("val", "tensor_meta")}
    infer_meta(program, new)
    return new


def add_output(program: Program, node: Node, spec: Output) -> Program:
    """Let a clone under edit return a node's value behind its other outputs; it returns a tuple from then on."""
    exported, output = program.exported, program.graph.output_node()
    output.args = ((*output.args[0], node),)
    exported.graph_signature.output_specs.append(
        OutputSpec(kind=OutputKind.USER_OUTPUT, arg=TensorArgument(name=node.name), target=None)
    )
    entry, count = exported.module_call_graph[0], len(program.contract.outputs) + 1
    assert entry.signature is not None
    signature = dataclasses.replace(entry.signature, out_spec=tree_structure((0,) * count))
    exported.module_call_graph[0] = dataclasses.replace(entry, signature=signature)
    return program.with_contract(outputs=(*program.contract.outputs, spec)).changed()


def keep_outputs(program: Program, count: int) -> Program:
    """A program of the first outputs alone, as a tuple, and of what they need."""
    program = program.clone()
    exported, output = program.exported, program.graph.output_node()
    output.args = (tuple(output.args[0])[:count],)
    specs = exported.graph_signature.output_specs
    kept = [spec for spec in specs if spec.kind is OutputKind.USER_OUTPUT][:count]
    specs[:] = [spec for spec in specs if spec.kind is not OutputKind.USER_OUTPUT] + kept
    entry = exported.module_call_graph[0]
    assert entry.signature is not None
    signature = dataclasses.replace(entry.signature, out_spec=tree_structure((0,) * count))
    exported.module_call_graph[0] = dataclasses.replace(entry, signature=signature)
    drop_dead(program)
    return program.with_contract(outputs=program.contract.outputs[:count]).changed()


def infer_meta(program: Program, node: Node) -> None:
    """Compute node.meta["val"] from the fake values of its inputs."""
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with torch.no_grad(), fake_mode(program), symbolic_dispatch(), quick_shapes():
        node.meta["val"] = node.target(*args, **kwargs)


def drop_dead(program: Program) -> None:
    """Remove nodes that nothing reads, then weights that no node reads.

    Metadata asserts go first: they repeat what the fake values say, and keep dead values alive.
    """
    exported = program.exported
    for node in program.calls(*ASSERTS):
        exported.graph.erase_node(node)
    exported.graph.eliminate_dead_code(_has_effect)
    names = program.weight_names()
    placeholders = exported.graph.find_nodes(op="placeholder")
    program.weight_table.drop([node for node in placeholders if node.name in names and not node.users])
    kept = {spec.target for spec in exported.graph_signature.input_specs}
    for table in (exported.state_dict, exported.constants):
        for name in [name for name in table if name not in kept]:
            del table[name]


def _has_effect(node: Node) -> bool:
    """Whether a call does something beside computing its value; inactive dropout, which torch counts, does not."""
    inactive = node.target is torch.ops.aten.dropout.default and node.args[2] is False
    return node.is_impure() and not inactive
