"""A captured nn.Module is run and compared with the module, at the sizes that its contract promises."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from optc.compiler.capture.proof.blame import first_difference
from optc.compiler.capture.proof.reference import OWN_ERRORS
from optc.compiler.diagnostics import GateError
from optc.compiler.execution.drift import Drift, comparable, measure
from optc.compiler.execution.stage_driver import StageRun, run_module, written_inputs
from optc.compiler.ir.devices import seeded
from optc.compiler.ir.program import Program
from optc.compiler.ir.proof import CaptureFigures, CaptureProof
from optc.compiler.rewriting.retrace import Replay

TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Largest difference of outputs, as a share of their largest magnitude. Both run the same kernels, so that as a rule
there is none."""

Case = tuple[str, tuple[Tensor, ...]]
"""What inputs are, and the inputs."""


def prove_module(
    program: Program, module: nn.Module, example_inputs: Sequence[Tensor], cases: Iterable[Case] | None = None
) -> CaptureProof:
    """Hold a captured module to its own forward: on the example inputs, and with each dynamic axis at 1 and longer.

    What it writes into its inputs is compared as its outputs are. Sizes that the module itself does not take are left
    out, with a note.

    Args:
        cases: other inputs to compare with, the example inputs first.

    Raises:
        GateError: the program computes something else or does not run (names the sizes and the first submodule that
            differs), or the module gives different numbers each time.
    """
    begin = time.perf_counter()
    figures: list[CaptureFigures] = []
    names: list[str] = []
    notes: list[str] = []
    written = written_inputs(program)
    for name, inputs in _cases(program, example_inputs) if cases is None else cases:
        try:
            own = _own(module, inputs, written)
        except OWN_ERRORS as error:
            if not names:
                raise
            reason = (str(error).strip().splitlines() or [""])[0]
            notes.append(f"not compared with {name}: the module itself fails: {type(error).__name__}: {reason}")
            continue
        figures.append(_compare(program, module, name, inputs, own))
        names.append(name)
    worst = max(figures, key=lambda row: row.max_abs_diff)
    return CaptureProof(
        proved=True,
        reference=type(module).__name__,
        inputs=tuple(names),
        figures=(worst,),
        seconds=round(time.perf_counter() - begin, 3),
        notes=tuple(notes),
    )


def _cases(program: Program, example_inputs: Sequence[Tensor]) -> Iterator[Case]:
    """(what it is, inputs): the examples, then each dynamic axis at 1, then all of them one longer."""
    sizes = {
        label: tensor.shape[axis]
        for spec, tensor in zip(program.contract.inputs, example_inputs, strict=True)
        for axis, label in enumerate(spec.dims)
        if isinstance(label, str)
    }
    yield "the example inputs", tuple(example_inputs)
    wanted = [{label: 1} for label in sizes]
    wanted += [{label: size + 1 for label, size in sizes.items()}] if sizes else []
    for change in wanted:
        yield (
            ", ".join(f"{label} = {size}" for label, size in change.items()),
            tuple(
                _resized(tensor, spec.dims, change)
                for spec, tensor in zip(program.contract.inputs, example_inputs, strict=True)
            ),
        )


def _resized(tensor: Tensor, dims: Sequence[int | str], sizes: dict[str, int]) -> Tensor:
    shape = [sizes.get(str(label), size) for label, size in zip(dims, tensor.shape, strict=True)]
    return resize(tensor, shape)


def resize(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor with other sizes: its own values, cut or repeated."""
    for axis, size in enumerate(shape):
        if size != tensor.shape[axis]:
            tensor = tensor.index_select(axis, torch.arange(size, device=tensor.device) % tensor.shape[axis])
    return tensor.contiguous()


@contextmanager
def _same_state(module: nn.Module) -> Iterator[None]:
    """Begin with the same random numbers each time, and put back what a forward writes into buffers."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    tensors = (*module.parameters(), *module.buffers())
    device = tensors[0].device if tensors else torch.device("cpu")
    try:
        with seeded(device):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def _own(module: nn.Module, inputs: Sequence[Tensor], written: Sequence[int]) -> list[Tensor]:
    """What the module returns, and the inputs that it writes into."""
    fresh = _fresh(inputs)
    with _same_state(module), torch.no_grad():
        return [*_tensors(module(*fresh)), *(fresh[index] for index in written)]


def _fresh(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copies: a forward may write into its inputs."""
    return tuple(tensor.clone() for tensor in inputs)


def _tensors(outputs: object) -> list[Tensor]:
    return [leaf.detach() for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _compare(
    program: Program, module: nn.Module, name: str, inputs: tuple[Tensor, ...], own: list[Tensor]
) -> CaptureFigures:
    kind = type(module).__name__
    try:
        with _same_state(module):
            ours = _tensors(run_module(program, inputs))
    except OWN_ERRORS as error:
        raise GateError(
            "the capture failed the numerics gate: the program does not run",
            where=kind,
            why=f"with {name}: {str(error).strip().splitlines()[0]}",
            remedy="declare dynamic only axes whose every size the module treats alike",
        ) from error
    shapes = [[tuple(tensor.shape) for tensor in side] for side in (own, ours)]
    if shapes[0] != shapes[1]:
        raise GateError(
            "the capture failed the numerics gate: the program's outputs have different shapes",
            where=kind,
            why=f"with {name}: {shapes[1]}, not {shapes[0]}",
            remedy="declare dynamic only axes whose every size the module treats alike",
        )
    dtype, drift = _dtype(module, (*inputs, *own)), _drift(own, ours)
    if not drift.max_abs_diff <= TOLERANCE[dtype] * max(drift.scale, 1e-6):
        raise _miss(program, module, name, inputs, own, drift)
    return CaptureFigures(
        dtype=str(dtype).removeprefix("torch."),
        max_abs_diff=drift.max_abs_diff,
        scale=drift.scale,
        relative=drift.relative,
    )


def _drift(own: list[Tensor], ours: list[Tensor]) -> Drift:
    return measure(StageRun(own, [], role="output"), StageRun(ours, [], role="output"))


def _dtype(module: nn.Module, tensors: Sequence[Tensor]) -> torch.dtype:
    """The narrowest floating type that takes part."""
    kinds = {tensor.dtype for tensor in (*module.parameters(), *module.buffers(), *tensors)} & set(TOLERANCE)
    return max(kinds, key=lambda kind: TOLERANCE[kind], default=torch.float32)


def _miss(
    program: Program, module: nn.Module, name: str, inputs: tuple[Tensor, ...], own: list[Tensor], drift: Drift
) -> GateError:
    kind = type(module).__name__
    again = _own(module, inputs, written_inputs(program))
    if any(not torch.equal(*comparable(first, second)) for first, second in zip(own, again, strict=True)):
        return GateError(
            f"the capture failed the numerics gate: {kind} gives different numbers each time",
            where=kind,
            why="two runs of the module on the same inputs and seed differ",
            remedy="optc.capture(..., prove=False)",
        )
    with _same_state(module), torch.no_grad():
        layer = first_difference(
            module,
            lambda: module(*_fresh(inputs)),
            Replay(program, {}),
            list(inputs),
            None,
            TOLERANCE[_dtype(module, inputs)],
        )
    return GateError(
        f"the capture failed the numerics gate: the program is not what {kind} computes",
        where=f"the first module whose output differs: {layer}" if layer else kind,
        why=f"with {name}: max abs difference {drift.max_abs_diff:.3g} on outputs of up to {drift.scale:.3g}",
        remedy="declare dynamic only axes whose every size the module treats alike",
    )
