"""Calls of `fused_linear` and how far its kernels may be from the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import bounds
import torch
from interpreted import DEVICE
from torch import Tensor

from optc.compiler.kernels.cuda.fused_linear import FUSED_LINEAR
from optc.compiler.kernels.cuda.linear import launch
from optc.compiler.ops.packed.cuda import pack_float, pack_integer

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias and residual": {"bias": True, "residual": True},
    "rms": {"norm": "rms"},
    "layer": {"norm": "layer", "bias": True},
    "rms, gated": {"norm": "rms", "activation": "silu", "gated": True},
    "everything": {"norm": "layer", "activation": "gelu_tanh", "gated": True, "bias": True, "residual": True},
    "gelu": {"activation": "gelu", "residual": True},
    "relu": {"activation": "relu", "bias": True},
}
FORMATS = {
    "floats": ("", 0, False),
    "fp8": ("fp8", 0, False),
    "int8 per row": ("int8", 0, False),
    "int8 per row, zero points": ("int8", 0, True),
    "int8 g32": ("int8", 32, False),
    "int8 g128, zero points": ("int8", 128, True),
    "int4 per row": ("int4", 0, True),
    "int4 g32": ("int4", 32, False),
    "int4 g32, zero points": ("int4", 32, True),
    "int4 g64": ("int4", 64, False),
    "int4 g128": ("int4", 128, False),
    "int4 g128, zero points": ("int4", 128, True),
}


@dataclass(frozen=True)
class Case:
    """A call: K `columns`, `n` results, `tokens` rows."""

    format: str = ""
    group_size: int = 0
    asymmetric: bool = False
    tokens: int = 1
    n: int = 3
    columns: int = 256
    norm: str = ""
    activation: str = ""
    gated: bool = False
    bias: bool = False
    residual: bool = False
    dtype: torch.dtype = torch.float32

    def linear(self) -> launch.Linear:
        """Random tensors; a few elements of tokens and weights stand out, as they do in models."""
        generator = torch.Generator().manual_seed(self.tokens + self.columns)

        def normal(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator)
            return (values * torch.exp(torch.randn(shape, generator=generator))).to(self.dtype).to(DEVICE)

        rows = 2 * self.n if self.gated else self.n
        has_norm, layer = self.norm != "", self.norm == "layer"
        return launch.Linear(
            normal(self.tokens, self.columns),
            *self._weight(rows, generator),
            normal(self.columns) if has_norm else None,
            normal(self.columns) if layer else None,
            normal(rows) if self.bias else None,
            normal(self.tokens, self.n) if self.residual else None,
            self.norm,
            1e-5,
            self.activation,
            self.gated,
            self.format,
            self.group_size,
        )

    def _weight(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None, Tensor | None]:
        groups = self.columns // (self.group_size or self.columns)
        weight = torch.randn((rows, self.columns), generator=generator) * self.columns**-0.5
        if not self.format:
            return weight.to(self.dtype).to(DEVICE), None, None
        scale = (torch.rand((rows, groups), generator=generator) + 0.5).to(self.dtype)
        if self.format == "fp8":
            packed = pack_float(weight.to(torch.float8_e4m3fn), scale)
        else:
            bits = 4 if self.format == "int4" else 8
            codes = torch.randint(2**bits, (rows, self.columns), generator=generator, dtype=torch.uint8)
            zero = torch.randint(2**bits, (rows, groups), generator=generator, dtype=torch.uint8)
            scale = scale * (4 * self.columns**-0.5 / 2**bits)
            packed = pack_integer(codes, scale.to(self.dtype), zero if self.asymmetric else None, bits)
        return (
            packed.weight.to(DEVICE),
            packed.scale.to(DEVICE),
            None if packed.zero is None else packed.zero.to(DEVICE),
        )


def knobs(linear: launch.Linear) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the op."""
    names = ("norm", "eps", "activation", "gated", "format", "group_size", "inputs")
    return linear[:8], dict(zip(names, linear[8:], strict=True))


EXACT = 3e-4
"""Of the GEMV of a few hundred columns, with a scale for each run of them; the products' one per token is coarser."""


def check(
    found: Tensor,
    linear: launch.Linear,
    share: float = EXACT,
    *,
    rounded_tokens: bool = False,
    rounded_product: bool = False,
) -> None:
    """Against the reference in float32: within a share of the largest output, and one rounding of the result.

    `rounded_tokens`: the product takes normalized tokens in their own type, and may be as far off as the reference in
    that type is, times the margin. `rounded_product`: so is what an activation takes, whose slope is at most 1.13.
    """
    args, keywords = knobs(linear)
    wide = [item.float() if isinstance(item, Tensor) and item.is_floating_point() else item for item in args]
    if linear.format == "fp8":
        wide[1] = linear.weight
    expected = FUSED_LINEAR.spec.reference(*wide, **keywords)
    one_rounding = 0.0 if linear.x.dtype is torch.float32 else torch.finfo(linear.x.dtype).eps
    largest = float(expected.abs().max())
    bound = (share + one_rounding) * largest
    if rounded_tokens and one_rounding:
        rounded = FUSED_LINEAR.spec.reference(*args, **keywords)
        bound = max(bound, bounds.MARGIN * float((rounded.float() - expected).abs().max()))
    if rounded_product and linear.activation:
        before = FUSED_LINEAR.spec.reference(*wide, **keywords | {"activation": ""})
        bound += 1.13 * one_rounding / 2 * float(before.abs().max())
    assert found.dtype is linear.x.dtype
    assert found.shape == expected.shape
    assert bool(torch.isfinite(found).all())
    assert float((found.float() - expected).abs().max()) <= bound
