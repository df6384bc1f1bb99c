"""Bounds on outputs that are rounded on their way: to 16 bits, or, of activations, to codes (see README.md).

What two implementations of such a program differ by depends on the order of their sums, which is another on every
processor. So a bound is measured where it is used: how far rounding moves the outputs of the very program in PyTorch,
relative to their size, times a margin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from optc.compiler.execution import stage_driver
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.retrace import Replay

MARGIN = 4.0
_SHORT = (torch.float16, torch.bfloat16)
_HALF_BITS, _CALM_BITS = 11, 18  # of the significand: float16's, and 64 times the step of float32
_SUMS = (
    "aten::linear",
    "aten::addmm",
    "optc::attention",
    "optc::linear_few",
    "optc::linear_nbits",
    "optc::linear_dynamic",
    "optc::matmul_nbits",
)


@dataclass(frozen=True)
class Gap:
    """How far outputs are from the expected ones; differences are shares of what is expected.

    Attributes:
        largest: the largest absolute difference / the largest magnitude.
        rms: root mean square of the difference / root mean square of what is expected.
        calm: as `largest`, of the token that a quarter of all tokens are no further off than. What goes another
            way in few tokens only, as a code at half a step, does not move it; a wrong number in a layer does.
        kl: mean KL(expected || found) per token in nats.
        other: share of tokens whose most likely successor is another.
    """

    largest: float
    rms: float
    calm: float
    kl: float
    other: float


def gap(found: Sequence[Tensor], expected: Sequence[Tensor]) -> Gap:
    """Compare two lists of logits [..., V] of equal shapes."""
    assert [tuple(item.shape) for item in found] == [tuple(item.shape) for item in expected]
    new, old = (torch.cat([item.detach().flatten(0, -2).double() for item in side]) for side in (found, expected))
    assert bool(old.isfinite().all())
    difference = (new - old).abs().nan_to_num(nan=math.inf)
    log_new, log_old = new.log_softmax(-1), old.log_softmax(-1)
    return Gap(
        largest=float(difference.max() / old.abs().max()),
        rms=float(difference.square().mean().sqrt() / old.square().mean().sqrt()),
        calm=float(difference.amax(-1).sort().values[len(old) // 4] / old.abs().max()),
        kl=float((log_old.exp() * (log_old - log_new)).sum(-1).mean()),
        other=float((new.argmax(-1) != old.argmax(-1)).double().mean()),
    )


def check(found: Sequence[Tensor], expected: Sequence[Tensor], rounding: Gap, what: object = "") -> Gap:
    """Assert that logits are no further from the expected ones than MARGIN times what rounding moves them by.

    KL goes with the square of a difference, and so does its margin. Of tokens, one in twenty may choose another
    successor on top: two of nearly equal logits.
    """
    made = gap(found, expected)
    limits = Gap(
        largest=MARGIN * rounding.largest,
        rms=MARGIN * rounding.rms,
        calm=MARGIN * rounding.calm,
        kl=MARGIN**2 * rounding.kl,
        other=MARGIN * rounding.other + 0.05,
    )
    for name in Gap.__dataclass_fields__:
        value, limit = getattr(made, name), getattr(limits, name)
        assert value <= limit, f"{what} {name} {value:.2e} > {limit:.2e}; found {made}, rounding makes {rounding}"
    return made


class _InFloat32(Replay):
    """Holds and computes in float32 what the program does in 16 bits."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_function(target, tree_map(_wide, args), tree_map(_wide, kwargs))


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in _SHORT:
        return value.float()
    return torch.float32 if isinstance(value, torch.dtype) and value in _SHORT else value


def _rounding_to(bits: int) -> type[Replay]:
    class Rounding(Replay):
        """Rounds the results of attention and of products with a weight to `bits` of significand."""

        def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            made = super().call_function(target, args, kwargs)
            return round_to(made, bits) if str(target).removesuffix(".default") in _NAMES else made

    return Rounding


_NAMES = {name.replace("::", ".") for name in _SUMS}


def round_to(x: Tensor, bits: int) -> Tensor:
    """Numbers with `bits` of significand, the nearest ones."""
    significand, exponent = torch.frexp(x)
    return torch.ldexp((significand * 2.0**bits).round() * 2.0**-bits, exponent)


def _run(program: Program, rows: Sequence[Sequence[int]], replay: type[Replay]) -> list[Tensor]:
    return stage_driver.run_stage(program, rows, replay=replay).logits


def in_float32(program: Program, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits [len, V] of each row by the same program with all that it holds in 16 bits, weights too, in float32."""
    inputs = tuple(
        msgspec.structs.replace(spec, dtype="float32") if spec.dtype in ("float16", "bfloat16") else spec
        for spec in program.contract.inputs
    )
    return _run(program.with_contract(inputs=inputs), rows, _InFloat32)


def of_half(program: Program, rows: Sequence[Sequence[int]]) -> tuple[list[Tensor], Gap]:
    """For a program in 16 bits: its logits in float32, and how far its own rounding is from them."""
    expected = in_float32(program, rows)
    return expected, gap(stage_driver.run_stage(program, rows).logits, expected)


def of_codes(program: Program, rows: Sequence[Sequence[int]]) -> tuple[list[Tensor], Gap]:
    """For a float32 program that rounds activations to codes: its logits, and how far other sums are from them.

    A number near half a step goes to the other code when a sum runs in another order, and later tokens and layers
    see it: how far that goes is measured with sums that are rounded as in float16, which sends many numbers there.
    Most tokens meet no such number in float32: they are held to sums with 64 times the rounding of float32.
    """
    expected = stage_driver.run_stage(program, rows).logits
    many, few = (gap(_run(program, rows, _rounding_to(bits)), expected) for bits in (_HALF_BITS, _CALM_BITS))
    return expected, replace(many, calm=few.calm)
