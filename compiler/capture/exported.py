"""An ExportedProgram that another tool made, as a Program of kind "module"."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.utils import _pytree as pytree

from optc.compiler import compat
from optc.compiler.capture.facts import attention_layers
from optc.compiler.diagnostics import CaptureError, InputError, described
from optc.compiler.execution.stage_driver import run_module
from optc.compiler.ir.contract import Contract, Input, Output
from optc.compiler.ir.program import Program
from optc.compiler.ir.saved.exported_archive import read_exported

_INPUT_REMEDY = "export a module around it whose forward takes its tensors alone"


def capture_exported(exported: ExportedProgram, *, where: str = "ExportedProgram") -> Program:
    """A Program of an ExportedProgram, which is believed: its own module is not here to be compared with.

    Inputs and outputs are flat, under the names of the graph's placeholders; dynamic axes under those of their symbols.

    Args:
        where: what to call it in errors.

    Raises:
        CaptureError: it takes or returns something else than tensors.
    """
    contract = module_contract(exported, where)
    own = Program(exported, contract).clone()  # the caller's stays as it is
    _flatten_calls(own.exported, [spec.name for spec in contract.inputs], len(contract.outputs))
    return own


def _flatten_calls(exported: ExportedProgram, names: list[str], outputs: int) -> None:
    """Make a program take its tensors one by one, and return a tuple of them, whatever containers its module took."""
    entry = exported.module_call_graph[0]
    assert entry.signature is not None
    exported.module_call_graph[0] = dataclasses.replace(
        entry,
        signature=dataclasses.replace(
            entry.signature,
            in_spec=pytree.tree_structure(((0,) * len(names), {})),
            out_spec=pytree.tree_structure((0,) * outputs),
            forward_arg_names=names,
        ),
    )
    if exported.example_inputs is not None:
        exported.example_inputs = (tuple(pytree.tree_leaves(exported.example_inputs)), {})


def capture_exported_file(path: Path) -> Program:
    """A Program of a file of `torch.export.save`, with inputs made up for the gate: the file's own are a pickle.

    Floats are drawn from a normal distribution, whole numbers from 0 and 1; sizes are those that it was exported with.

    Raises:
        InputError: the file cannot be read, or the program does not run. CaptureError: see `capture_exported`.
    """
    program = capture_exported(read_exported(path), where=str(path))
    examples = tuple(_made_up(node.meta["val"], index) for index, node in enumerate(program.user_inputs()))
    program.exported.example_inputs = (examples, {})
    try:
        run_module(program, examples)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        raise InputError(
            "the exported program does not run on made-up inputs",
            where=str(path),
            why=described(error),
            remedy="optc.compile(torch.export.load(FILE), ...) in Python, which reads the inputs that it was exported "
            "with, for files that you trust",
        ) from error
    return program


def _made_up(value: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = [compat.size_hint(size) for size in value.shape]
    if value.dtype.is_floating_point or value.dtype.is_complex:
        made = torch.randn(shape, generator=generator).to(value.dtype)
    else:
        made = torch.randint(0, 2, shape, generator=generator).to(value.dtype)
    return made.to(value.device)


def module_contract(exported: ExportedProgram, where: str, names: Sequence[str] | None = None) -> Contract:
    """The contract of a program of tensors in, tensors out.

    Args:
        names: of the inputs; None takes those of the placeholders.

    Raises:
        CaptureError: see `capture_exported`.
    """
    _check_calls(exported, where)
    check_outputs(exported, where)
    placeholders = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    inputs = []
    for index, spec in enumerate(s for s in exported.graph_signature.input_specs if s.kind is InputKind.USER_INPUT):
        value = placeholders[spec.arg.name].meta.get("val") if isinstance(spec.arg, TensorArgument) else None
        if not isinstance(value, torch.Tensor):
            raise CaptureError(
                "the program takes something else than tensors",
                where=where,
                why=f"input {index} is '{spec.arg.name}', no tensor",
                remedy=_INPUT_REMEDY,
            )
        inputs.append(
            Input(
                name=names[index] if names is not None else spec.arg.name,
                role="input",
                dtype=str(value.dtype).removeprefix("torch."),
                dims=tuple(size if isinstance(size, int) else str(size) for size in value.shape),
            )
        )
    count = len(exported.graph_signature.user_outputs)
    return Contract(
        kind="module",
        inputs=tuple(inputs),
        outputs=tuple(Output(name=f"output_{i}" if count > 1 else "output", role="output") for i in range(count)),
        layers=attention_layers(exported),
        sources={name: (name,) for name in exported.state_dict},
    )


def _check_calls(exported: ExportedProgram, where: str) -> None:
    """A program is one graph of operators.

    Raises:
        CaptureError: a call runs another graph.
    """
    for node in exported.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise CaptureError(
                "the graph runs another graph inside",
                where=f"{where}, {node.name}",
                why=f"'{node.target}' is no operator: it stands for a region with autocast, or for control flow",
                remedy="instead of autocast convert the model (model.to(torch.bfloat16)); leave control flow out",
            )


def check_outputs(exported: ExportedProgram, where: str) -> None:
    """Engines give back tensors that their graph computes. A module may return nothing, and write into its inputs.

    Raises:
        CaptureError: an output is no tensor, or a weight of the module itself.
    """
    specs = [spec for spec in exported.graph_signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    if len(specs) == 1 and isinstance(specs[0].arg, ConstantArgument) and specs[0].arg.value is None:
        return
    held = {*exported.graph_signature.inputs_to_parameters, *exported.graph_signature.inputs_to_buffers}
    for index, spec in enumerate(specs):
        if not isinstance(spec.arg, TensorArgument):
            what = repr(spec.arg.value) if isinstance(spec.arg, ConstantArgument) else "a number"
            why = f"output {index} is {what}, not a tensor"
        elif spec.arg.name in held:
            why = f"output {index} is a weight of the module itself"
        else:
            continue
        raise CaptureError(
            "the module returns something else than tensors that it computes",
            where=where,
            why=why,
            remedy="capture a module around it whose forward returns its computed tensors alone",
        )
