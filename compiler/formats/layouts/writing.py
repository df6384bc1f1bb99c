"""What writers of layouts share: their interface, and the reasons against weights that several of them give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from optc.compiler.diagnostics import TargetError
from optc.compiler.formats.layouts.key_values import KeyValueScheme
from optc.compiler.formats.layouts.weight import QuantizedWeight, Scheme

REMEDY = "choose another --layout, or other quantization options"


class LayoutWriter(Protocol):
    """One layout."""

    @property
    def name(self) -> str:
        """As `--layout` calls it."""

    @property
    def remedy(self) -> str:
        """What to do about a weight that cannot be written."""

    def obstacle(self, weight: QuantizedWeight) -> str | None:
        """Why a weight cannot be written, or None."""

    def tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """What is written for a weight: name behind the module's -> tensor."""

    def config(self, schemes: Mapping[str, Scheme], linears: Iterable[str], head: str = "") -> dict[str, Any]:
        """quantization_config.

        Args:
            schemes: quantized linear -> its scheme.
            linears: all linears of the model.
            head: the linear that makes the logits, "" where there is none.

        Raises:
            TargetError: the layout cannot name this mixture.
        """

    def key_values(
        self, scheme: KeyValueScheme, scales: Mapping[str, tuple[Tensor, Tensor]]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What quantization_config says of rounded keys and values, and the tensors of their scales by name.

        Args:
            scales: attention module -> scales of its keys and values, float32 [1] or [Hkv, 1, 1].

        Raises:
            TargetError: the layout has no place for them.
        """


def named_scales(scales: Mapping[str, tuple[Tensor, Tensor]], parts: tuple[str, str]) -> dict[str, Tensor]:
    """Tensor name -> scale, of an attention's keys and values."""
    return {
        f"{module}.{part}": scale for module, pair in scales.items() for part, scale in zip(parts, pair, strict=True)
    }


def foreign(weight: QuantizedWeight) -> str | None:
    """What only some layouts hold, or None."""
    if weight.scheme.rotation:
        return "its input is rotated at run time; use --layout compressed-tensors"
    return unlike_integers(weight)


def unlike_integers(weight: QuantizedWeight) -> str | None:
    """What is not of integer or fp8 weights with scales per token, or None."""
    if weight.scheme.format in ("nvfp4", "mxfp4"):
        return f"{weight.scheme.format} weights; use --layout compressed-tensors"
    if weight.scheme.static:
        return "its input has a calibrated scale, and the layout has scales per token"
    return "its input is multiplied by a factor of its own" if weight.input_factor is not None else None


def zero_points(weight: QuantizedWeight) -> Tensor:
    """Zero points uint8 [N, G]; the middle code where the weight has none."""
    if weight.zero is not None:
        return weight.zero
    return torch.full_like(weight.scale, 2 ** (weight.scheme.bits - 1), dtype=torch.uint8)


def scale_obstacle(weight: QuantizedWeight) -> str | None:
    half = weight.scale.to(torch.float16)
    if torch.equal(half.to(weight.scale.dtype), weight.scale):
        return None
    return "its scales are not float16 numbers, which the layout keeps: run the pass round-scales after quantization"


def no_key_values(layout: str, scales: Iterable[str]) -> TargetError:
    return TargetError(
        f"the layout '{layout}' has no place for the scales of keys and values",
        where=next(iter(scales)),
        remedy="use --layout compressed-tensors",
    )


def one_setting(layout: str, schemes: Mapping[str, Scheme]) -> Scheme:
    kinds = {(scheme.bits, scheme.group_size, scheme.symmetric): scheme for scheme in schemes.values()}
    if len({(bits, size) for bits, size, _ in kinds}) == 1:
        return min(kinds.values(), key=lambda scheme: scheme.symmetric)
    raise TargetError(
        f"the layout '{layout}' has one setting for all linears",
        why=f"{len(kinds)} are requested: " + ", ".join(f"{bits} bits g{size}" for bits, size, _ in kinds),
        remedy="use --layout compressed-tensors",
    )
