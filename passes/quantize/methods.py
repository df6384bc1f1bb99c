"""Quantization methods by name: which passes each is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from optc.compiler.diagnostics import UsageError, unknown_name
from optc.compiler.rewriting import Pass
from optc.compiler.target import CompileOptions, Step
from optc.passes.quantize_clip import QuantizeClip
from optc.passes.quantize_gptq import QuantizeGptq
from optc.passes.quantize_rtn import QuantizeRtn
from optc.passes.scale_awq import ScaleAwq
from optc.passes.tune_scales import TuneScales


@dataclass(frozen=True)
class Method:
    """A quantization method.

    Attributes:
        summary: one line for people.
        passes: the passes for options whose bits are known.
        bits: what `--bits` is when it is not given.
        fixed: bits and group size are part of the method and cannot be chosen.
    """

    summary: str
    passes: Callable[[CompileOptions], list[Pass]]
    bits: int = 4
    fixed: bool = False


def _rtn(options: CompileOptions) -> list[Pass]:
    return [QuantizeRtn(bits=options.bits_or(4), group_size=options.group_size, symmetric=options.symmetric,
                        ignore=options.ignore)]  # fmt: skip


def _gptq(options: CompileOptions) -> list[Pass]:
    return [QuantizeGptq(bits=options.bits_or(4), group_size=options.group_size, symmetric=options.symmetric,
                         ignore=options.ignore)]  # fmt: skip


def _scales(options: CompileOptions) -> ScaleAwq:
    return ScaleAwq(bits=options.bits_or(4), group_size=options.group_size, symmetric=options.symmetric,
                    ignore=options.ignore)  # fmt: skip


def _awq(options: CompileOptions) -> list[Pass]:
    return [_scales(options), QuantizeClip(bits=options.bits_or(4), group_size=options.group_size,
                                           symmetric=options.symmetric, ignore=options.ignore)]  # fmt: skip


def _best(options: CompileOptions) -> list[Pass]:
    gptq = QuantizeGptq(
        bits=options.bits_or(4), group_size=options.group_size, symmetric=options.symmetric, ignore=options.ignore,
        sweeps=2, follow=0.5,
    )  # fmt: skip
    return [_scales(options), gptq, TuneScales()]


METHODS: dict[str, Method] = {
    "rtn": Method("round to nearest; needs no calibration", _rtn),
    "gptq": Method("GPTQ: errors of one column are made up for by the next ones", _gptq),
    "awq": Method("AWQ: activation-aware scales folded into earlier weights, clipped ranges", _awq),
    "awq+gptq": Method(
        "AWQ's scales, then GPTQ's rounding", lambda options: [_scales(options), *_gptq(options)]
    ),
    "best": Method(
        "the strongest found here: AWQ's scales, GPTQ with refined codes, scales trained end to end", _best
    ),
    "int8": Method("8-bit weights, one scale per output channel", _rtn, bits=8, fixed=True),
}

WEIGHT_ONLY = ("rtn", "gptq", "awq", "awq+gptq", "best")
"""Methods that end in plain integer weights of any supported bits and group size."""


def resolve(options: CompileOptions) -> CompileOptions:
    """Options with the bits and group size that the method stands for.

    Raises:
        UsageError: unknown method, or bits or a group size for a method that has its own.
    """
    if options.quant is None:
        return options
    if options.quant not in METHODS:
        raise unknown_name("quantization", options.quant, METHODS)
    method = METHODS[options.quant]
    if not method.fixed:
        return dataclasses.replace(options, bits=options.bits_or(method.bits))
    for name, value, own in (("bits", options.bits, method.bits), ("group-size", options.group_size, 0)):
        if value not in (None, own):
            raise UsageError(
                f"--quant {options.quant} takes no --{name} {value}",
                why=method.summary,
                remedy=f"leave --{name} out",
            )
    return dataclasses.replace(options, bits=method.bits, group_size=0)


def quantization_steps(options: CompileOptions) -> list[Step]:
    """The steps of the chosen method, none without one. Scale passes may find nothing to fold."""
    if options.quant is None:
        return []
    passes = METHODS[options.quant].passes(options)
    return [Step(item, optional=not item.lossy) for item in passes]
