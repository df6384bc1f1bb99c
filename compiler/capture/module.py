"""Capture of a plain nn.Module with example inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.export import Dim

from optc.compiler.capture.eval_mode import in_eval_mode
from optc.compiler.capture.exported import module_contract
from optc.compiler.capture.proof import prove_module
from optc.compiler.diagnostics import UsageError
from optc.compiler.ir.export import run_export
from optc.compiler.ir.program import Program
from optc.compiler.settings.fields import check_type


@in_eval_mode
def capture_module(
    module: torch.nn.Module,
    example_inputs: Sequence[Tensor],
    *,
    input_names: Sequence[str] | None = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    largest: Mapping[str, int] | None = None,
    prove: bool = True,
) -> Program:
    """Capture an nn.Module of tensors in, tensors out.

    Args:
        example_inputs: one tensor per argument of `forward`; an axis named dynamic needs size >= 2.
        input_names: names of the inputs in the graph (default: input_0, input_1, ...).
        dynamic: input name -> axis -> name of the dynamic axis; equal names are equal sizes.
        largest: name of a dynamic axis -> its largest size.
        prove: run the program and compare it with the module, also with each dynamic axis at 1; see `prove_module`.

    Raises:
        UsageError: names and inputs do not fit, or are of another type.
        CaptureError: torch.export cannot trace the module, or it returns something else than tensors that it computes.
        GateError: the program is not what the module computes, at one of the sizes.
    """
    _check_arguments(example_inputs, input_names, dynamic)
    names = list(input_names or (f"input_{i}" for i in range(len(example_inputs))))
    axes = {name: dict(dynamic.get(name, {})) for name in names} if dynamic else {name: {} for name in names}
    unknown = sorted(set(dynamic or ()) - set(names))
    if len(names) != len(example_inputs) or unknown:
        raise UsageError(
            "input names do not fit the example inputs",
            why=f"{len(names)} names, {len(example_inputs)} inputs, unknown: {unknown}",
            remedy=f"name each of: {', '.join(names)}",
        )
    most = dict(largest or {})
    dims: dict[str, Any] = {
        label: Dim(label, min=1, max=most.get(label)) for per in axes.values() for label in per.values()
    }
    shapes = tuple({axis: dims[label] for axis, label in axes[name].items()} for name in names)
    exported = run_export(module, tuple(example_inputs), shapes, where=type(module).__name__)
    contract = module_contract(exported, type(module).__name__, names)
    labels = tuple(
        msgspec.structs.replace(spec, dims=tuple(axes[spec.name].get(axis, size) for axis, size in enumerate(sizes)))
        for spec, sizes in zip(contract.inputs, (tensor.shape for tensor in example_inputs), strict=True)
    )
    contract = msgspec.structs.replace(contract, inputs=labels)
    program = Program(exported, contract)
    if prove:
        program.proof = prove_module(program, module, example_inputs)
    return program


def _check_arguments(example_inputs: Any, input_names: Any, dynamic: Any) -> None:
    check_type("example_inputs", example_inputs, list | tuple, "a tuple of tensors")
    for index, item in enumerate(example_inputs):
        check_type(f"example_inputs[{index}]", item, Tensor, "a tensor")
    if input_names is not None:
        check_type("input_names", input_names, tuple[str, ...], "a list of texts")
    if dynamic is not None:
        check_type(
            "dynamic", dynamic, dict[str, dict[int, str]], 'names of axes by input and axis: {"x": {0: "batch"}}'
        )
