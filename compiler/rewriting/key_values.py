"""Rounded keys and values: attention(q, dequantize_activation(quantize(k)), dequantize_activation(quantize(v)))."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.linears import quantized_activation
from optc.compiler.formats.layouts.key_values import ValueFormat
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import add_weight
from optc.compiler.rewriting.rounded_inputs import rounded_input
from optc.compiler.rewriting.weights import record_weight

_PARTS = ((1, "key"), (2, "value"))
"""Arguments of `optc.attention`."""


def rounded(call: Node) -> bool:
    """Whether an attention reads rounded keys or values."""
    return any(call.args[index].target is torch.ops.optc.dequantize_activation.default for index, _ in _PARTS)


def round_key_values(
    program: Program,
    call: Node,
    stem: str,
    scales: Sequence[Tensor],
    format: str,
    sources: Sequence[tuple[str, ...]] = ((), ()),
) -> None:
    """Round what an attention reads, in place, with new weights STEM.key_scale and STEM.value_scale.

    Args:
        scales: of keys and of values, float32, of a shape that broadcasts to [B, Hkv, S, D].
        sources: tensors of the checkpoint that they come from.
    """
    for (index, part), scale, source in zip(_PARTS, scales, sources, strict=True):
        name = f"{stem}.{part}_scale"
        record_weight(program, name, source)
        node = add_weight(program, name, scale.contiguous())
        call.update_arg(index, rounded_input(program, call, call.args[index], format, node))


def key_value_scales(program: Program, call: Node) -> tuple[ValueFormat, tuple[str, str]] | None:
    """(format, names of the scales of keys and of values) of an attention that rounds both alike, or None."""
    made = [quantized_activation(call.args[index]) for index, _ in _PARTS]
    names = [None if item is None else program.weight_of(item.args[-1]) for item in made]
    formats: set[ValueFormat] = {item.kwargs["format"] for item in made if item is not None}
    if names[0] is None or names[1] is None or len(formats) != 1:
        return None
    return formats.pop(), (names[0], names[1])
