"""A quantized weight in the canonical form, and what a layout's config says of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optc.compiler.diagnostics import InputError
from optc.compiler.formats.weight_format import WeightFormat, weight_format
from optc.compiler.ir.contract import ActivationFormat

INPUT_ORDER = "input_order"
"""What a program calls `QuantizedWeight.input_order`, behind the weight's name."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How one linear's weight [N, K] is stored, and what its input is rounded to.

    Attributes:
        format: name of a `WeightFormat`.
        group_size: along K; 0 is one scale per row, or (fp8 alone) with `per_tensor` one for the whole weight.
        activations: "" when the input is not quantized; else per token, scales from the values at hand.
        static: the input's scale is calibrated: one for all tokens (nvfp4: the one above the blocks' own).
        rotation: the input is multiplied by Sylvester's orthonormal Hadamard matrix first, in blocks of so many
            channels, and the weight is of the input so turned; 0 is not at all.
    """

    bits: int
    group_size: int
    symmetric: bool
    format: str = "int"
    activations: ActivationFormat = ""
    per_tensor: bool = False
    static: bool = False
    rotation: int = 0


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes, scales and zero points as `optc.dequantize`, `dequantize_float` or `dequantize_nvfp4` read them.

    Attributes:
        codes: uint8 [N, K], or float8_e4m3fn [N, K].
        scale: floating [N, G]; [1, 1] with `scheme.per_tensor`; nvfp4: the blocks' scales, float8_e4m3fn [N, K/16]; mxfp4:
            their exponents, uint8 [N, K/32].
        zero: uint8 [N, G], or None when symmetric or fp8.
        global_scale: float32 [1], nvfp4 alone.
        input_scale: float32 [1], with `scheme.static`.
        input_factor: [K] that the input is multiplied by first, or None.
        table: float32 [16], what codes of nf4 stand for.
        input_order: int64 [K], the elements of the input that the columns of the codes are for, or None where they are in
            order (GPTQ's act-order: groups are of columns that were quantized one after another).
    """

    scheme: Scheme
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    global_scale: Tensor | None = None
    input_scale: Tensor | None = None
    input_factor: Tensor | None = None
    input_order: Tensor | None = None
    table: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return int(rows), int(columns)

    @property
    def format(self) -> WeightFormat:
        """How it is stored."""
        return weight_format(self.scheme.format)

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """Some rows, as a weight of their own: what is kept by row is cut, the rest shared."""
        return dataclasses.replace(
            self,
            codes=self.codes[start:stop],
            scale=self.scale if self.scheme.per_tensor else self.scale[start:stop],
            zero=None if self.zero is None else self.zero[start:stop],
        )

    def parts(self) -> dict[str, Tensor | None]:
        """The tensors that the format's op takes, by name."""
        return {part: getattr(self, part) for part in self.format.parts}

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] that the codes stand for, scales (but those of nvfp4) rounded to `dtype` first."""
        return self.format.dequantize(self.parts(), self.scheme.bits, self.scheme.group_size, dtype)


def joined(parts: Sequence[QuantizedWeight], where: str) -> QuantizedWeight:
    """Weights [N_i, K] of one input as one weight [sum N_i, K].

    One scale for each whole weight becomes one for each row.

    Raises:
        InputError: they are not quantized alike; names the weight.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    alike = ("table", "global_scale", "input_scale", "input_factor", "input_order")
    for other in parts[1:]:
        same = all(_equal(getattr(first, name), getattr(other, name)) for name in alike)
        if other.scheme != first.scheme or other.codes.shape[1] != first.codes.shape[1] or not same:
            raise InputError(
                "linears that the model computes together are quantized differently",
                where=where,
                why="their schemes, or scales that they would share, differ",
                remedy="quantize the unquantized model again (optc quantize)",
            )
    scales = [part.scale.expand(len(part.codes), 1) if part.scheme.per_tensor else part.scale for part in parts]
    return dataclasses.replace(
        first,
        scheme=dataclasses.replace(first.scheme, per_tensor=False),
        codes=_stacked([part.codes for part in parts]),
        scale=_stacked(scales),
        zero=None if first.zero is None else torch.cat([part.zero for part in parts if part.zero is not None]),
    )


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Rows under rows; 8-bit floats are moved as bytes, for which torch has no cat on every device."""
    if tensors[0].element_size() > 1:
        return torch.cat(list(tensors))
    return torch.cat([tensor.view(torch.uint8) for tensor in tensors]).view(tensors[0].dtype)


def _equal(left: Tensor | None, right: Tensor | None) -> bool:
    return left is right or (left is not None and right is not None and torch.equal(left, right))


def check_parts(weight: QuantizedWeight, where: str) -> QuantizedWeight:
    """Refuse scales or zero points whose shape does not fit the codes.

    Raises:
        InputError: names the weight and the shapes.
    """
    rows, columns = weight.shape
    size = weight.scheme.group_size or columns
    if size <= 0 or columns % size:
        raise InputError(
            f"group size {size} does not divide the weight",
            where=where,
            why=f"it has K = {columns}",
            remedy="check that config.json and the weights belong together",
        )
    shape = (1, 1) if weight.scheme.per_tensor else (rows, columns // size)
    parts = {"scales": weight.scale, "zero points": weight.zero}
    for name, tensor in parts.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise InputError(
                f"the {name} have the wrong shape",
                where=where,
                why=f"found {list(tensor.shape)}, expected {list(shape)} for codes {[rows, columns]}",
                remedy="check that config.json and the weights belong together",
            )
    return weight
