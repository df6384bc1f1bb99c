"""`torch.compile(model, backend="optc")`: each graph of a model through the passes of a target and their gate, in this process.

    model = torch.compile(model.eval(), backend="optc", options={"quant": "int8"})
    with torch.inference_mode():
        model(inputs)

Dynamo calls `backend` through the entry point `torch_dynamo_backends`, or what `import optc` registered where no metadata
of the package is installed.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.fx import GraphModule

from optc.api import run_passes
from optc.capturing import Captured
from optc.compiler.capture.dynamo import CapturedGraph, capture_graph, number_carrier, outside_dynamo
from optc.compiler.capture.size_guards import SizeGuards
from optc.compiler.diagnostics import TargetError, UsageError, unknown_name
from optc.compiler.ir.program import Program
from optc.compiler.pipeline.gate import TOLERANCE
from optc.compiler.pipeline.pipeline import compute_dtype
from optc.compiler.pipeline.rerounding import rerounding, widened
from optc.compiler.settings.fields import check_type, fields_of
from optc.compiler.target.options import QuantRequest
from optc.exporters.inductor.in_process import Compiled, compile_here
from optc.exporters.inductor.selfcheck import ROUNDED_TOLERANCE
from optc.request import from_python, known_keys
from optc.resolving import Resolved, resolve
from optc.targets.methods import METHODS

NAME = "optc"
_TARGETS = {"cpu": "inductor-cpu", "cuda": "inductor-cuda"}
_OPTIONS = (
    *fields_of(QuantRequest),
    "passes",
    "pass_option",
    "max_relative_error",
    "allow_noop",
    "dump_ir",
    "accuracy_level",
    "head_bits",
)
"""Keys of a request that say something about a graph in memory. Its dtype and device are the model's, its gate is fed
with the inputs of the call, and nothing is written."""


def backend(
    graph: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Any:
    """Compile a graph of torch.compile for inference.

    Args:
        graph, example_inputs: as Dynamo gives them.
        options: `target`, and keys of a request as `optc.compile` takes them: quant, bits, group_size, ...
        mode: of Inductor, as `torch.compile(mode=...)` has it.

    Returns:
        A function of the graph's arguments.

    Raises:
        UsageError: unknown options. TargetError: training, or a graph that the target cannot run.
        GateError: a pass, or the compiled code, moves the numbers by more than it may. OptcError: as `optc.compile`.
        Dynamo wraps them in a BackendCompilerFailed, whose `inner_exception` they are.
    """
    device = next((item.device for item in example_inputs if isinstance(item, Tensor)), torch.device("cpu"))
    resolved = _resolved(options or {}, device)
    settings = dict(torch._inductor.list_mode_options(mode)) if mode is not None else {}
    captured = capture_graph(graph, example_inputs)
    if not captured.program.user_inputs() or not (captured.outputs.nodes or captured.written):
        return graph.forward  # it computes nothing of its inputs
    return CompiledGraph(captured, resolved, settings, example_inputs)


def _resolved(options: Mapping[str, Any], device: torch.device) -> Resolved:
    """The request of `options`.

    Raises:
        UsageError: an unknown key, or one that has no effect here. TargetError: another device's target.
    """
    check_type("options", options, Mapping, 'a dictionary: {"quant": "int8"}')
    fitting = _TARGETS.get(device.type)
    if fitting is None:
        raise TargetError(
            'torch.compile(backend="optc") has no target for this device',
            where=str(device),
            remedy=f"move the model to one of: {', '.join(_TARGETS)}",
        )
    for name in options:
        if name not in (*_OPTIONS, "target"):
            if name in known_keys():
                raise UsageError(
                    f'the option "{name}" has no effect in torch.compile',
                    remedy=f"leave it out; these have: target, {', '.join(_OPTIONS)}",
                )
            raise unknown_name("option of torch.compile", name, (*_OPTIONS, "target"))
    given = {**options, "device": str(device)}
    resolved = resolve(from_python(given.pop("target", fitting), **given))
    if resolved.target.name != fitting:
        raise TargetError(
            f"target '{resolved.target.name}' does not run a graph in this process on {device.type}",
            remedy=f'options={{"target": "{fitting}"}}, or optc.compile for a file',
        )
    _refuse_calibrated(resolved)
    return resolved


def _refuse_calibrated(resolved: Resolved) -> None:
    """Refuse methods that look at examples: a graph has the inputs of one call.

    Raises:
        UsageError: the method is one of them.
    """
    chosen = resolved.options.quantization
    if chosen is None:
        return
    whole = msgspec.structs.replace(chosen, bits=chosen.bits or 4, group_size=chosen.group_size or 0)
    if any(item.calibrated for item in METHODS[chosen.method].passes(whole)):
        raise UsageError(
            f"quantization '{chosen.method}' is calibrated, and a graph of torch.compile has no examples",
            remedy='"quant": "rtn", "int8" or "nf4"; optc.compile takes calibration=',
        )


@dataclass(frozen=True, eq=False)
class _Build:
    """What was compiled, and the weights that it was compiled of, as they were then."""

    call: Compiled
    weights: tuple[Tensor, ...]
    versions: tuple[int, ...]


class CompiledGraph:
    """A compiled graph: called with the arguments of Dynamo's graph, it returns its outputs.

    Compiled code holds the weights as they were. A call with other tensors (a module of the same class), or after
    something was written into them, compiles once more.

    Attributes:
        program: the last stage, of the last build. passes: what each pass did.
    """

    def __init__(
        self, captured: CapturedGraph, resolved: Resolved, settings: Mapping[str, Any], examples: Sequence[Any]
    ) -> None:
        self._captured, self._resolved, self._settings = captured, resolved, settings
        arguments = captured.arguments
        self._weight_places = tuple(arguments.weights)
        self._names = tuple(arguments.weights.values())
        self._guards = SizeGuards(captured, examples)
        self._builds: list[_Build] = []
        self._build(tuple(examples[index] for index in self._weight_places), captured.program)

    def __call__(self, *args: Any) -> list[Any]:
        weights = tuple(map(args.__getitem__, self._weight_places))
        call = self._find(weights)
        arguments, outputs = self._captured.arguments, self._captured.outputs
        inputs = [args[index] for index in arguments.tensors]
        inputs += [number_carrier(args[index]) for index in arguments.numbers]
        if self._captured.written:
            self._check_aliases(inputs)
        computed = call(*inputs)
        found: list[Any] = []
        for kind, what in outputs.kinds:
            if kind == "computed":
                found.append(computed[what])
            else:
                found.append(args[what] if kind == "argument" else self._guards.value(what, args))
        return found

    def _find(self, weights: tuple[Tensor, ...]) -> Compiled:
        for build in self._builds:
            if all(map(operator.is_, build.weights, weights)):
                if build.versions == _versions(weights):
                    return build.call
                self._builds.remove(build)
                break
        program = _with_weights(self._captured.program, dict(zip(self._names, weights, strict=True)))
        return self._build(weights, program)

    def _build(self, weights: tuple[Tensor, ...], program: Program) -> Compiled:
        examples = self._captured.examples
        with outside_dynamo():
            assert self._captured.program.proof is not None
            captured = Captured(program, None, [], self._captured.program.proof)
            result = run_passes(captured, self._resolved, None, {}, kind="graph")
            allowed = self._resolved.request.gate.max_relative_error or 0.0
            own = TOLERANCE[compute_dtype(result.program)]
            tolerance = widened(own, ROUNDED_TOLERANCE, result.program, rerounding(result.records), allowed)
            call = compile_here(result.program, examples, tolerance=tolerance, settings=self._settings)
        self._guards.install(first=not self._builds)
        self.program, self.passes = result.program, result.records
        self._builds.insert(0, _Build(call, weights, _versions(weights)))
        return call

    def _check_aliases(self, inputs: Sequence[Tensor]) -> None:
        """Refuse memory that the graph writes under one name and may read under another."""
        places = [item.untyped_storage().data_ptr() for item in inputs]
        for index in self._captured.written:
            if places.count(places[index]) > 1:
                raise TargetError(
                    "the graph writes into a tensor that shares memory with another of its inputs",
                    where=self._captured.program.contract.inputs[index].name,
                    remedy="give the compiled model tensors of their own",
                )


def _versions(weights: Sequence[Tensor]) -> tuple[int, ...]:
    """How often each was written into. Tensors that were made under inference_mode do not count it."""
    return tuple(0 if item.is_inference() else item._version for item in weights)


def _with_weights(program: Program, weights: Mapping[str, Tensor]) -> Program:
    """The captured program over other tensors of the same shapes."""
    changed = program.clone()
    for table in (changed.exported.state_dict, changed.exported.constants):
        for name in table:
            if name in weights:
                table[name] = torch.nn.Parameter(weights[name].detach(), requires_grad=False)
    return changed.changed()
