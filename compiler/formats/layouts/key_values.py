"""Scales of an attention's keys and values, as model folders keep them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from optc.compiler.formats.layouts.tensors import TensorReader

ValueFormat = Literal["int8", "fp8"]


@dataclass(frozen=True)
class KeyValueScheme:
    """How the keys (after the rotary embedding) and values of every attention are rounded; scales are fixed.

    Attributes:
        granularity: one scale per layer, or per key/value head.
    """

    format: ValueFormat
    granularity: Literal["layer", "head"]


@dataclass(frozen=True)
class FolderKeyValues:
    """Scales of keys and values in a folder.

    Attributes:
        attentions: modules, as the folder names them.
        parts: names of the scales of keys and of values behind a module's.
    """

    scheme: KeyValueScheme
    attentions: tuple[str, ...]
    parts: tuple[str, str]

    def names(self, attention: str) -> tuple[str, str]:
        """The tensors of one attention."""
        return f"{attention}.{self.parts[0]}", f"{attention}.{self.parts[1]}"

    def read(self, reader: TensorReader, attention: str) -> tuple[Tensor, Tensor]:
        """Scales of one attention's keys and values, float32 [1], or [Hkv, 1, 1] per head.

        value = code * scale, as `optc.quantize` and `optc.dequantize_activation` have it; the shapes broadcast to
        [B, Hkv, S, D].

        Raises:
            InputError: one of the two is missing, has another shape, or is no positive number.
        """
        keys, values = (self._scale(reader, name) for name in self.names(attention))
        return keys, values

    def _scale(self, reader: TensorReader, name: str) -> Tensor:
        scale = reader.positive(name)
        if self.scheme.granularity == "layer":
            if scale.numel() != 1:
                raise reader.wrong_shape(name, f"found {list(scale.shape)}, expected one number")
            return scale.reshape(1)
        if scale.dim() != 3 or scale.shape[1:] != (1, 1):
            raise reader.wrong_shape(name, f"found {list(scale.shape)}, expected [heads, 1, 1]")
        return scale


def find_key_values(reader: TensorReader, scheme: KeyValueScheme, parts: tuple[str, str]) -> FolderKeyValues | None:
    """The scales of a folder by the names of its tensors, None when it has none."""
    endings = tuple(f".{part}" for part in parts)
    found = [name.removesuffix(ending) for name in reader.tensors for ending in endings if name.endswith(ending)]
    return FolderKeyValues(scheme, tuple(dict.fromkeys(found)), parts) if found else None
