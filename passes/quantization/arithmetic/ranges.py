"""Largest magnitudes of activations over the calibration text."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.calibration.examples import Examples
from optc.compiler.diagnostics import InputError, UsageError
from optc.compiler.rewriting.passes import PassContext
from optc.passes.quantization.arithmetic.stream import Stream


def calibration_feed(name: str, context: PassContext) -> Tensor | Examples:
    """The calibration tokens [n, L] of a pass, or the examples of a module.

    Raises:
        InputError: there are none.
    """
    if context.calibration is None:
        raise InputError(
            f"pass '{name}' needs calibration tokens",
            remedy="give a text with --calibration FILE (a model with a tokenizer uses a built-in one), or of a module "
            "example inputs with calibration=",
        )
    return context.calibration.tokens


def calibration_tokens(name: str, context: PassContext) -> Tensor:
    """The calibration tokens [n, L] of a pass that needs tokens.

    Raises:
        InputError: there are none. UsageError: the program is a module, which has examples.
    """
    found = calibration_feed(name, context)
    if isinstance(found, Examples):
        raise UsageError(
            f"pass '{name}' needs a model that takes tokens",
            why="a plain module is calibrated by examples of its inputs",
            remedy="use --quant gptq, awq or smoothquant",
        )
    return found


def largest_magnitudes(stream: Stream, node: Node, where: str, keep: tuple[int, ...] = (-1,)) -> Tensor:
    """The largest |value| of a node over all sequences and along every axis but those in `keep`, in float32.

    Args:
        stream: already advanced to `node`.
        where: the layer, for errors.

    Raises:
        InputError: no values, or NaN or infinity among them.
    """
    total: Tensor | None = None
    for value in stream.values(node):
        if not value.numel():
            continue
        kept = {axis % value.dim() for axis in keep}
        others = [axis for axis in range(value.dim()) if axis not in kept]
        largest = value.detach().float().abs().amax(others)
        total = largest if total is None else torch.maximum(total, largest)
    if total is None:
        raise InputError("no calibration token reaches a layer", where=where, remedy="give a longer calibration text")
    check_finite(total, where)
    return total


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; `aminmax` passes NaN on, and makes no tensor as large as its input."""
    return all(math.isfinite(bound) for bound in tensor.aminmax())


def check_finite(statistics: Tensor, where: str) -> None:
    """Refuse what was computed from activations that are not all finite.

    Args:
        where: the layer, for the error.

    Raises:
        InputError: NaN or infinity in `statistics`.
    """
    if not is_finite(statistics):
        raise InputError(
            "the calibration text gives activations that are NaN or infinite",
            where=where,
            remedy="use --dtype fp32 or bf16, and look at the model's own outputs on this text",
        )
