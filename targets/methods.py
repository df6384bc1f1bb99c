"""Quantization methods by name: which passes each is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from optc.compiler.diagnostics import UsageError, unknown_name
from optc.compiler.formats.integer import BITS
from optc.compiler.rewriting.passes import Pass
from optc.compiler.target.target import CompileOptions, Step
from optc.passes.quantization.activations import QuantizeActivations
from optc.passes.quantization.auto import QuantizeAuto
from optc.passes.quantization.clip import QuantizeClip
from optc.passes.quantization.fp8 import QuantizeFp8
from optc.passes.quantization.gptq import QuantizeGptq
from optc.passes.quantization.inputs import QuantizeInputs
from optc.passes.quantization.llm_int8 import QuantizeLlmInt8
from optc.passes.quantization.nf4 import QuantizeNf4
from optc.passes.quantization.nvfp4 import QuantizeNvfp4
from optc.passes.quantization.rotate_inputs import RotateInputs
from optc.passes.quantization.round_scales import RoundScales
from optc.passes.quantization.rtn import QuantizeRtn
from optc.passes.quantization.scale_awq import ScaleAwq
from optc.passes.quantization.scale_smoothquant import ScaleSmoothQuant
from optc.passes.quantization.tune_scales import TuneScales


@dataclass(frozen=True)
class Method:
    """A quantization method.

    Attributes:
        summary: one line for people.
        passes: the passes for options whose bits are known.
        bits: what `--bits` is when it is not given.
        fixed: bits and group size are part of the method and cannot be chosen.
        own_bits: the method chooses the bits of each linear itself.
        group_size: of a fixed method with groups of its own.
    """

    summary: str
    passes: Callable[[CompileOptions], list[Pass]]
    bits: int = 4
    fixed: bool = False
    own_bits: bool = False
    group_size: int | None = None


def _common(options: CompileOptions) -> dict[str, Any]:
    """What the integer quantizers have in common."""
    return {
        "bits": options.bits_or(4), "group_size": options.group_size, "symmetric": options.symmetric,
        "ignore": options.ignore,
    }  # fmt: skip


def _rtn(options: CompileOptions) -> list[Pass]:
    return [QuantizeRtn(**_common(options))]


def _gptq(options: CompileOptions) -> list[Pass]:
    return [QuantizeGptq(**_common(options))]


def _awq(options: CompileOptions) -> list[Pass]:
    return [ScaleAwq(**_common(options)), QuantizeClip(**_common(options))]


def _awq_gptq(options: CompileOptions) -> list[Pass]:
    return [ScaleAwq(**_common(options)), QuantizeGptq(**_common(options))]


def _best(options: CompileOptions) -> list[Pass]:
    return [QuantizeGptq(**_common(options), sweeps=4, follow=0.5), TuneScales()]


def _auto(options: CompileOptions) -> list[Pass]:
    average: dict[str, Any] = {} if options.average_bits is None else {"average_bits": options.average_bits}
    return [QuantizeAuto(group_size=options.group_size, symmetric=options.symmetric, ignore=options.ignore,
                         choices=options.bit_choices or BITS, **average)]  # fmt: skip


def _smoothquant(options: CompileOptions) -> list[Pass]:
    return [
        ScaleSmoothQuant(ignore=options.ignore),
        RotateInputs(ignore=options.ignore),
        QuantizeGptq(**_common(options)),
        QuantizeActivations(format="int8"),
    ]


def _nvfp4(options: CompileOptions) -> list[Pass]:
    return [QuantizeNvfp4(ignore=options.ignore), QuantizeInputs(format="nvfp4")]


METHODS: dict[str, Method] = {
    "rtn": Method("round to nearest; needs no calibration", _rtn),
    "gptq": Method("GPTQ: errors of one column are made up for by the next ones", _gptq),
    "awq": Method("AWQ: activation-aware scales folded into earlier weights, clipped ranges", _awq),
    "awq+gptq": Method("AWQ's scales, then GPTQ's rounding", _awq_gptq),
    "best": Method("the strongest found here: GPTQ that follows the unquantized model, codes refined, scales trained", _best),
    "auto": Method("bits per linear by measured sensitivity, within --average-bits; then GPTQ", _auto, own_bits=True),
    "int8": Method("8-bit weights, one scale per output channel", _rtn, bits=8, fixed=True),
    "smoothquant": Method("W8A8: SmoothQuant's scales, rotations where they pay, 8-bit weights by GPTQ and inputs", _smoothquant,
                          bits=8, fixed=True),
    "llm-int8": Method("W8A8 with outlier columns in full precision", lambda options: [QuantizeLlmInt8(ignore=options.ignore)],
                       bits=8, fixed=True),
    "fp8": Method("E4M3 weights per channel and inputs per token", lambda options: [
        QuantizeFp8(ignore=options.ignore), QuantizeActivations(format="fp8")], bits=8, fixed=True),
    "nf4": Method("4-bit NormalFloat, blocks of 64, scales in 8 bits", lambda options: [
        QuantizeNf4(ignore=options.ignore, double_quant=True)], bits=4, fixed=True),
    "nvfp4": Method("4-bit floats in blocks of 16 with E4M3 scales, weights and inputs; scales of inputs calibrated", _nvfp4,
                    bits=4, fixed=True, group_size=16),
}  # fmt: skip

_WIDE_SCALES = ("rtn", "int8")
"""Methods whose scales are float32 numbers; those of the others are float16 ones, where these can hold them."""

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
    if options.average_bits is not None and not method.own_bits:
        raise UsageError("--average-bits is for --quant auto", remedy="use --bits, or --quant auto")
    if method.own_bits and options.bits is not None:
        raise UsageError(f"--quant {options.quant} chooses the bits itself", remedy="use --average-bits")
    if not method.fixed:
        return options if method.own_bits else dataclasses.replace(options, bits=options.bits_or(method.bits))
    own = {"bits": method.bits, "group-size": 0 if method.bits == 8 else method.group_size}
    for name, value in (("bits", options.bits), ("group-size", options.group_size)):
        if value not in (None, own[name]):
            raise UsageError(
                f"--quant {options.quant} takes no --{name} {value}",
                why=method.summary,
                remedy=f"leave --{name} out",
            )
    return dataclasses.replace(options, bits=method.bits, group_size=own["group-size"])


def quantization_steps(options: CompileOptions, *, rotations: bool = True) -> list[Step]:
    """The steps of the chosen method, none without one. Scale passes may find nothing to fold.

    Args:
        rotations: whether the target can run operators in front of a linear that the model did not have.
    """
    if options.quant is None:
        return []
    passes = METHODS[options.quant].passes(options)
    passes = [item for item in passes if rotations or not isinstance(item, RotateInputs)]
    return [Step(item, optional=not item.lossy) for item in passes]


def stored_scales(options: CompileOptions) -> list[Step]:
    """A step that makes scales fit 16 bits, for methods whose own do not yet; an exporter then stores them so."""
    if options.quant not in _WIDE_SCALES or options.dtype not in (None, "fp32"):
        return []
    return [Step(RoundScales(strict=False), optional=True)]
