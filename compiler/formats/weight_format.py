"""Ways of storing a weight [N, K], one object each: which op makes it of its parts, and what it takes.

Other packages add formats by entry points of the group `optc.formats`, each a `WeightFormat`; the module that it lies in
registers its dequantizing op (`optc.compiler.ops.library.define`), and is named by an entry point of `optc.ops` too, so
that saved programs which call the op can be read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from optc.compiler.diagnostics import InputError
from optc.compiler.ops.dialect.mxfp4 import BLOCK as MX_BLOCK
from optc.compiler.ops.dialect.nvfp4 import BLOCK
from optc.compiler.ops.library import OpSpec, find, named
from optc.compiler.plugins import plugins

ENTRY_POINTS = "optc.formats"
HALF = 16
"""Bits of a scale in the ideal size: one of a 16-bit type."""


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """One way.

    Attributes:
        name: as contracts, records and layouts have it.
        op: the op that makes the weight.
        parts: the tensors that `op` takes, in order, as suffixes of the weight's name; the first is `codes`.
        optional: parts that a weight may lack.
        bits: of a code, those that there may be.
        codes: type that codes are held in, one each.
        scale: type of the scales, None where it is the compute type.
        scale_bits: of a scale, in the smallest size that a weight could have.
        group_size: columns that share a scale, None where that can be chosen.
        keywords: from bits, group size and compute type to the keyword arguments of `op`.
        kind: what layouts call the numbers.
        in_folders: whether any layout of model folders holds it.
    """

    name: str
    op: str
    parts: tuple[str, ...]
    bits: tuple[int, ...]
    codes: torch.dtype
    keywords: Callable[[int, int, torch.dtype], dict[str, Any]]
    optional: frozenset[str] = frozenset()
    scale: torch.dtype | None = None
    scale_bits: int = HALF
    group_size: int | None = None
    kind: Literal["int", "float"] = "int"
    in_folders: bool = True

    @property
    def spec(self) -> OpSpec:
        """The op that makes the weight."""
        spec = named(self.op)
        assert spec is not None, f"the format {self.name} needs optc::{self.op}"
        return spec

    def ideal_bits(self, bits: int, group_size: int, *, symmetric: bool) -> float:
        """Bits per parameter of perfectly packed codes, with their scales and, where there are any, zero points."""
        zero_points = "zero" in self.parts and not symmetric
        return bits + self.scale_bits / group_size + (bits / group_size if zero_points else 0)

    def stored_scale(self, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Scales as a program that computes in `dtype` holds them."""
        return scale.to(self.scale or dtype)

    def dequantize(
        self, tensors: Mapping[str, Tensor | None], bits: int, group_size: int, dtype: torch.dtype
    ) -> Tensor:
        """The weight [N, K] in `dtype`.

        Args:
            tensors: by part.
        """
        held = {**tensors, "scale": self.stored_scale(_given(tensors["scale"]), dtype)}
        value: Tensor = self.spec.op(*(held[part] for part in self.parts), **self.keywords(bits, group_size, dtype))
        return value

    def parts_of(self, arguments: Sequence[Any]) -> dict[str, Any]:
        """Part -> argument of a call of `op`; None where it is left out."""
        given = [*arguments, *[None] * (len(self.parts) - len(arguments))]
        return dict(zip(self.parts, given, strict=True))


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


INT = WeightFormat(
    name="int",
    op="dequantize",
    parts=("codes", "scale", "zero"),
    optional=frozenset({"zero"}),
    bits=(2, 3, 4, 8),
    codes=torch.uint8,
    keywords=lambda bits, size, _: {"bits": bits, "group_size": size},
)
FP8 = WeightFormat(
    name="fp8",
    op="dequantize_float",
    parts=("codes", "scale"),
    bits=(8,),
    codes=torch.float8_e4m3fn,
    keywords=lambda _bits, size, _: {"group_size": size},
    kind="float",
)
NF4 = WeightFormat(
    name="nf4",
    op="dequantize_codebook",
    parts=("codes", "scale", "table"),
    bits=(4,),
    codes=torch.uint8,
    keywords=lambda bits, size, _: {"bits": bits, "group_size": size},
    kind="float",
    in_folders=False,
)
NVFP4 = WeightFormat(
    name="nvfp4",
    op="dequantize_nvfp4",
    parts=("codes", "scale", "global_scale"),
    bits=(4,),
    codes=torch.uint8,
    scale=torch.float8_e4m3fn,
    scale_bits=8,
    group_size=BLOCK,
    keywords=lambda _bits, _size, dtype: {"dtype": dtype},
    kind="float",
)


MXFP4 = WeightFormat(
    name="mxfp4",
    op="dequantize_mxfp4",
    parts=("codes", "scale"),
    bits=(4,),
    codes=torch.uint8,
    scale=torch.uint8,
    scale_bits=8,
    group_size=MX_BLOCK,
    keywords=lambda _bits, _size, dtype: {"dtype": dtype},
    kind="float",
)


@lru_cache(maxsize=1)
def weight_formats() -> Mapping[str, WeightFormat]:
    """Every format by name, those of other packages among them."""
    found = {item.name: item for item in (INT, FP8, NF4, NVFP4, MXFP4)}
    for form in plugins(ENTRY_POINTS, "a WeightFormat", lambda item: item if isinstance(item, WeightFormat) else None):
        found.setdefault(form.name, form)
    return found


def weight_format(name: str) -> WeightFormat:
    """The format of a name.

    Raises:
        InputError: there is none.
    """
    found = weight_formats().get(name)
    if found is None:
        raise InputError(
            f"the weight format '{name[:80]}' is not known",
            why=f"known are {', '.join(weight_formats())}",
            remedy="install the package that adds it",
        )
    return found


def format_of(target: object) -> WeightFormat | None:
    """The format that a node's target makes a weight of, or None."""
    spec = find(target)
    if spec is None or not spec.makes_weight:
        return None
    return next((item for item in weight_formats().values() if item.op == spec.name), None)
