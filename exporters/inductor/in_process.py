"""A legalized Program of kind "module" as a function of this process, compiled by Inductor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.graph import CodeGen

from optc.compiler import compat
from optc.compiler.execution.stage_driver import run_module, written_inputs
from optc.compiler.ir.devices import program_device, seeded
from optc.compiler.ir.program import Program
from optc.compiler.kernels.cpu.library import build_library
from optc.compiler.kernels.kernel import kernels_for, used_kernels
from optc.exporters.inductor.packing import packing_pays
from optc.exporters.inductor.selfcheck import compare_outputs

Compiled = Callable[..., Sequence[Any]]
"""Called with the inputs of a contract, flat, it returns the outputs; inputs that the program writes into it writes."""

_loaded: list[str] = []


def compile_here(
    program: Program, examples: Sequence[Tensor], *, tolerance: float, settings: Mapping[str, Any] | None = None
) -> Compiled:
    """Compile a program for this process, and compare what was compiled with it.

    On the CPU weights become constants of the compiled code (Inductor's freezing): it folds what is computed of weights
    alone, packs those of linears and convolutions for oneDNN and MKL, and does not see what is written into them later.
    On a GPU, and where packing does not pay (`packing_pays`), they stay where they are.

    Args:
        examples: inputs to compare with.
        tolerance: largest difference of an output, as a share of its largest magnitude.
        settings: of Inductor.

    Raises:
        TargetError: no C++ compiler, or it fails.
        GateError: the compiled code computes other numbers than the program.
    """
    program = program.in_memory()
    device = program_device(program)
    if device.type == "cpu" and used_kernels(program, "cpu"):
        _load_kernels()
    module = program.exported.module(check_guards=False)
    module.graph.set_codegen(CodeGen())
    module.recompile()
    fakes = [node.meta["val"] for node in program.user_inputs()]
    # Random numbers are drawn as PyTorch draws them, so that compiled code can be compared.
    freezes = device.type == "cpu" and packing_pays(program)
    configs = {"freezing": freezes, "fallback_random": True, **(settings or {})}
    compiled = compat.inductor_compile(module, fakes, configs)
    _check(program, compiled, examples, tolerance)
    return compiled


def _load_kernels() -> None:
    """Load the library of all kernels for the CPU, once: each library would replace the kernels of the last."""
    if not _loaded:
        path = str(build_library(kernels_for("cpu")))
        torch.ops.load_library(path)
        _loaded.append(path)


def _check(program: Program, compiled: Compiled, examples: Sequence[Tensor], tolerance: float) -> None:
    expected, written = run_module(program, examples), written_inputs(program)
    inputs = list(examples)
    for index in written:
        inputs[index] = inputs[index].clone()
    with torch.no_grad(), seeded(program_device(program)):
        found = [*compiled(*inputs), *(inputs[index] for index in written)]
    for index, (old, new) in enumerate(zip(expected, found, strict=True)):
        compare_outputs(old, new, tolerance, f"output {index}")
