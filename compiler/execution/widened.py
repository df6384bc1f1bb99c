"""float32 arithmetic on a program whose weights are stored in 16 bits.

In bfloat16 two right computations differ by a few percent, so a wrong scale of that size would hide. The same weights,
widened exactly, leave only what differs in the computation; and how far a stage is from itself, widened, is what its own
rounding makes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import torch
from torch import Tensor

from optc.compiler.execution.drift import Drift, measure
from optc.compiler.execution.probe import Probe, run_probe
from optc.compiler.execution.stage_driver import StageRun
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.retrace import Replay

ROUNDINGS = 3.0
"""In 16 bits a right program may be as far from another as this many times that one is from itself in float32."""

_NARROW = (torch.float16, torch.bfloat16)


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether a dtype is one of the 16-bit floating types."""
    return dtype in _NARROW


class WidenedReplay(Replay):
    """Runs a program with 16-bit weights, and casts to 16 bits, in float32. One weight is widened at a time."""

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _wide(super().get_attr(target, args, kwargs))

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = torch.fx.node.map_aggregate((args, kwargs), _wide_dtype)
        return super().call_function(target, args, kwargs)


def own_rounding(program: Program, run: StageRun, probe: Probe) -> Drift:
    """How far what a 16-bit stage computed is from the same stage in float32.

    Args:
        run: of the stage, on this probe.

    Raises:
        RuntimeError: the stage mixes types in a way that cannot be widened.
    """
    wide_probe = replace(probe, tensors=tuple(_wide(item) for item in probe.tensors))
    return measure(run_probe(_with_wide_caches(program), wide_probe, WidenedReplay), run)


def _with_wide_caches(program: Program) -> Program:
    """The same graph, whose caches are said to be float32: those are made by who runs it."""
    names = {str(dtype).removeprefix("torch.") for dtype in _NARROW}
    inputs = tuple(
        msgspec.structs.replace(spec, dtype="float32") if spec.dtype in names else spec
        for spec in program.contract.inputs
    )
    contract = msgspec.structs.replace(program.contract, inputs=inputs)
    return Program(program.exported, contract, work_file=program.work_file)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and is_narrow(value.dtype) else value


def _wide_dtype(value: Any) -> Any:
    return torch.float32 if isinstance(value, torch.dtype) and is_narrow(value) else value
