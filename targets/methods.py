"""Quantization methods by name: which passes each is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from optc.compiler.diagnostics import UsageError, unknown_name
from optc.compiler.formats.group_sizes import AUTO_SIZES, BITS
from optc.compiler.formats.layouts import compressed_tensors, fp8_blocks
from optc.compiler.rewriting.passes import Pass
from optc.compiler.target.options import CompileOptions, Quantization, QuantRequest
from optc.compiler.target.target import Step
from optc.passes.fusion.fold_batchnorm import FoldBatchnorm
from optc.passes.quantization.activations import QuantizeActivations
from optc.passes.quantization.arithmetic.static_weights import METHOD as STATIC
from optc.passes.quantization.auto import QuantizeAuto
from optc.passes.quantization.clip import QuantizeClip
from optc.passes.quantization.fp8 import QuantizeFp8
from optc.passes.quantization.gptq import QuantizeGptq
from optc.passes.quantization.head import GROUP_SIZES, QuantizeHead
from optc.passes.quantization.inputs import QuantizeInputs
from optc.passes.quantization.llm_int8 import QuantizeLlmInt8
from optc.passes.quantization.mxfp4 import QuantizeMxfp4
from optc.passes.quantization.nf4 import QuantizeNf4
from optc.passes.quantization.nvfp4 import QuantizeNvfp4
from optc.passes.quantization.rotate_inputs import RotateInputs
from optc.passes.quantization.rotate_residual import RotateResidual
from optc.passes.quantization.rotate_values import RotateValues
from optc.passes.quantization.round_scales import RoundScales
from optc.passes.quantization.rtn import QuantizeRtn
from optc.passes.quantization.scale_awq import ScaleAwq
from optc.passes.quantization.scale_smoothquant import ScaleSmoothQuant
from optc.passes.quantization.smooth_activations import QuantizeSmoothActivations
from optc.passes.quantization.static import QuantizeStatic
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
        layouts: of quantized folders, those that hold its weights, () where none does; None: all that hold integers of
            its bits.
        wide_scales: its scales are float32 numbers; those of the others are float16 ones, where these can hold them.
        rotates: the folder says how its loader rotates inputs, where other methods leave such rotations out.
    """

    summary: str
    passes: Callable[[Quantization], list[Pass]]
    bits: int = 4
    fixed: bool = False
    own_bits: bool = False
    group_size: int | None = None
    layouts: tuple[str, ...] | None = None
    wide_scales: bool = False
    rotates: bool = False

    @property
    def own_group_size(self) -> int | None:
        """Group size of a fixed method: its own, or a row in 8 bits."""
        return self.group_size or (0 if self.bits == 8 else None)


def _common(chosen: Quantization) -> dict[str, Any]:
    """What the integer quantizers have in common."""
    return {
        "bits": chosen.bits,
        "group_size": chosen.group_size,
        "symmetric": chosen.symmetric,
        "ignore": chosen.ignore,
    }


def _rtn(chosen: Quantization) -> list[Pass]:
    return [QuantizeRtn(**_common(chosen))]


def _gptq(chosen: Quantization) -> list[Pass]:
    return [QuantizeGptq(**_common(chosen))]


def _awq(chosen: Quantization) -> list[Pass]:
    return [ScaleAwq(**_common(chosen)), QuantizeClip(**_common(chosen))]


def _awq_gptq(chosen: Quantization) -> list[Pass]:
    return [ScaleAwq(**_common(chosen)), QuantizeGptq(**_common(chosen))]


def _best(chosen: Quantization) -> list[Pass]:
    return [QuantizeGptq(**_common(chosen), sweeps=4, follow=0.5), TuneScales()]


def _auto(chosen: Quantization) -> list[Pass]:
    average: dict[str, Any] = {} if chosen.average_bits is None else {"average_bits": chosen.average_bits}
    return [QuantizeAuto(group_size=chosen.group_size, symmetric=chosen.symmetric, ignore=chosen.ignore, **average)]


def _smoothquant(chosen: Quantization) -> list[Pass]:
    return [
        ScaleSmoothQuant(ignore=chosen.ignore),
        RotateInputs(ignore=chosen.ignore),
        QuantizeGptq(**_common(chosen)),
        QuantizeActivations(format="int8"),
    ]


def _smoothquant_mixed(chosen: Quantization) -> list[Pass]:
    return [
        ScaleSmoothQuant(ignore=chosen.ignore),
        QuantizeGptq(**_common(chosen)),
        QuantizeSmoothActivations(),
    ]


def _rotated(passes: Callable[[Quantization], list[Pass]]) -> Callable[[Quantization], list[Pass]]:
    """A method's passes behind the rotations that fold into weights."""
    return lambda chosen: [RotateResidual(), RotateValues(), *passes(chosen)]


def _w4a8(chosen: Quantization) -> list[Pass]:
    return [QuantizeGptq(**_common(chosen)), QuantizeActivations(format="fp8")]


def _nvfp4(chosen: Quantization) -> list[Pass]:
    return [QuantizeNvfp4(ignore=chosen.ignore), QuantizeInputs(format="nvfp4")]


def _mxfp4(chosen: Quantization) -> list[Pass]:
    return [QuantizeMxfp4(ignore=chosen.ignore)]


METHODS: dict[str, Method] = {
    "rtn": Method("round to nearest; needs no calibration", _rtn, wide_scales=True),
    "gptq": Method("GPTQ: the error of each column is compensated in the columns after it", _gptq),
    "awq": Method("AWQ: activation-aware scales folded into earlier weights, clipped ranges", _awq),
    "awq+gptq": Method("AWQ's scales, then GPTQ's rounding", _awq_gptq),
    "best": Method(
        "the strongest found here: GPTQ that follows the unquantized model, codes refined, scales trained", _best
    ),
    "auto": Method("bits per linear by measured sensitivity, within --average-bits; then GPTQ", _auto, own_bits=True),
    "int8": Method("8-bit weights, one scale per output channel", _rtn, bits=8, fixed=True, wide_scales=True),
    "smoothquant": Method(
        "W8A8: SmoothQuant's scales, rotations where they pay, 8-bit weights by GPTQ and inputs",
        _smoothquant,
        bits=8,
        fixed=True,
    ),
    "smoothquant-mixed": Method(
        "W8A8 of smoothquant without rotations; inputs that 8 bits cannot hold stay in 16 (W8A16)",
        _smoothquant_mixed,
        bits=8,
        fixed=True,
    ),
    "smoothquant-rotated": Method(
        "W8A8 of smoothquant with its rotations, which vLLM computes by the folder's transform_config; transformers does not",
        _smoothquant,
        bits=8,
        fixed=True,
        layouts=(compressed_tensors.METHOD,),
        rotates=True,
    ),
    "rotate+rtn": Method("the residual stream and heads rotated offline, then rounded to nearest", _rotated(_rtn)),
    "rotate+gptq": Method("the residual stream and heads rotated offline, then GPTQ", _rotated(_gptq)),
    "rotate+best": Method("the residual stream and heads rotated offline, then `best`", _rotated(_best)),
    "rotate+smoothquant": Method(
        "the residual stream and heads rotated offline, then W8A8 of smoothquant",
        _rotated(_smoothquant),
        bits=8,
        fixed=True,
    ),
    "w4a8": Method(
        "4-bit weights by GPTQ in groups of 128, E4M3 inputs per token",
        _w4a8,
        bits=4,
        fixed=True,
        group_size=128,
        layouts=(compressed_tensors.METHOD,),
    ),
    STATIC: Method(
        "convolutions and linears in integers: 8-bit weights per channel, 8-bit activations per tensor, calibrated",
        lambda chosen: [FoldBatchnorm(), QuantizeStatic(ignore=chosen.ignore)],
        bits=8,
        fixed=True,
        layouts=(),
    ),
    "llm-int8": Method(
        "W8A8 with outlier columns in full precision",
        lambda chosen: [QuantizeLlmInt8(ignore=chosen.ignore)],
        bits=8,
        fixed=True,
        layouts=(),
    ),
    "fp8": Method(
        "E4M3 weights per channel and inputs per token",
        lambda chosen: [QuantizeFp8(ignore=chosen.ignore), QuantizeActivations(format="fp8")],
        bits=8,
        fixed=True,
    ),
    "fp8-block": Method(
        "E4M3 weights in blocks of 128 x 128 and inputs in groups of 128, as DeepSeek-V3",
        lambda chosen: [
            QuantizeFp8(granularity="block", ignore=chosen.ignore),
            QuantizeActivations(format="fp8-128"),
        ],
        bits=8,
        fixed=True,
        group_size=128,
        layouts=(compressed_tensors.METHOD, fp8_blocks.METHOD),
    ),
    "nf4": Method(
        "4-bit NormalFloat, blocks of 64, scales in 8 bits",
        lambda chosen: [QuantizeNf4(ignore=chosen.ignore, double_quant=True)],
        bits=4,
        fixed=True,
        layouts=(),
    ),
    "nvfp4": Method(
        "4-bit floats in blocks of 16 with E4M3 scales, weights and inputs; scales of inputs calibrated",
        _nvfp4,
        bits=4,
        fixed=True,
        group_size=16,
        layouts=(compressed_tensors.METHOD,),
    ),
    "mxfp4": Method(
        "4-bit floats in blocks of 32 with powers of two as scales, weights alone",
        _mxfp4,
        bits=4,
        fixed=True,
        group_size=32,
        layouts=(compressed_tensors.METHOD,),
    ),
}

WEIGHT_ONLY = ("rtn", "gptq", "awq", "awq+gptq", "best")
"""Methods that end in plain integer weights of any supported bits and group size."""


def choose_quantization(asked: QuantRequest) -> Quantization | None:
    """The quantization that was asked for, with the bits and group size that its method stands for; None without one.

    Raises:
        UsageError: unknown method, bits or a group size for a method that has its own, options without a method.
    """
    if asked.quant is None:
        return None
    if asked.quant not in METHODS:
        raise unknown_name("quantization", asked.quant, METHODS)
    method = METHODS[asked.quant]
    if asked.average_bits is not None and not method.own_bits:
        raise UsageError("--average-bits is for --quant auto", remedy="use --bits, or --quant auto")
    if method.own_bits and asked.bits is not None:
        raise UsageError(f"--quant {asked.quant} chooses the bits itself", remedy="use --average-bits")
    if method.fixed:
        _check_fixed(asked, method)
    bits = None if method.own_bits else method.bits if asked.bits is None else asked.bits
    size = AUTO_SIZES if asked.group_size == "auto" else asked.group_size
    return Quantization(
        method=asked.quant,
        bits=bits,
        average_bits=asked.average_bits,
        group_size=method.own_group_size if method.fixed else size,
        symmetric=asked.symmetric is not False,
        ignore=asked.ignore,
    )


def _check_fixed(asked: QuantRequest, method: Method) -> None:
    """Refuse bits and a group size that are not the method's own."""
    own = (("bits", asked.bits, method.bits), ("group-size", asked.group_size, method.own_group_size))
    for name, value, fixed in own:
        if value not in (None, fixed):
            raise UsageError(
                f"--quant {asked.quant} does not support --{name} {value}",
                why=method.summary,
                remedy=f"leave --{name} out",
            )


def quantization_steps(
    chosen: Quantization | None, *, rotations: bool = True, choices: Sequence[int] = BITS
) -> list[Step]:
    """The steps of the chosen method, none without one. Scale passes may find nothing to fold; a rotation may not.

    Args:
        rotations: whether the target can run operators in front of a linear that the model did not have.
        choices: the bits that a method may choose from which chooses them itself.
    """
    if chosen is None:
        return []
    method = METHODS[chosen.method]
    passes = method.passes(chosen)
    passes = [item for item in passes if rotations or method.rotates or not isinstance(item, RotateInputs)]
    passes = [replace(item, choices=tuple(choices)) if isinstance(item, QuantizeAuto) else item for item in passes]
    return [Step(item, optional=not (item.lossy or isinstance(item, RotateResidual))) for item in passes]


def head_steps(
    chosen: Quantization | None,
    asked: Literal[4, 8, 16, 32] | None,
    *,
    rows_at_8: bool = False,
    largest_at_4: int | None = None,
) -> list[Step]:
    """The step that rounds the embedding and the head, as the linears are rounded; none where they stay as they are.

    Args:
        chosen: how the linears are quantized.
        asked: bits, of which 16 and 32 are the compute type. None: 8 where the linears are quantized.
        rows_at_8: codes of 8 bits have a scale for each row, whatever the groups of the linears.
        largest_at_4: codes of 4 bits have a scale for so many neighbours at most.
    """
    bits = asked or (32 if chosen is None else 8)
    if bits == 16 or bits == 32:
        return []
    form: dict[str, Any] = {} if chosen is None else {"symmetric": chosen.symmetric, "ignore": chosen.ignore}
    size = None if chosen is None else chosen.group_size
    size = size[0] if isinstance(size, tuple) else size
    size = 0 if rows_at_8 and bits == 8 else size or GROUP_SIZES[0]
    if largest_at_4 is not None and bits == 4:
        size = min(size, largest_at_4)
    return [Step(QuantizeHead(bits=bits, group_size=size, **form), optional=True)]


def rounded_last(steps: Sequence[Step]) -> list[Step]:
    """Steps in their order, but those that round activations behind all others.

    Whatever changes the numbers in front of such a rounding moves codes, which costs more than its own budget has.
    """
    last = [
        step
        for step in steps
        if isinstance(step.rewrite, QuantizeActivations | QuantizeSmoothActivations | QuantizeStatic)
    ]
    return [*(step for step in steps if step not in last), *last]


def stored_scales(options: CompileOptions) -> list[Step]:
    """A step that makes scales fit 16 bits, for methods whose own do not yet; an exporter then stores them so."""
    wide = options.quantization is not None and METHODS[options.quantization.method].wide_scales
    return [Step(RoundScales(strict=False), optional=True)] if wide and options.dtype == "fp32" else []
