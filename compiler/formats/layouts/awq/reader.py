"""Reads linears of AWQ folders; the layout is described in `optc.compiler.formats.layouts.awq`."""

from __future__ import annotations

import torch
from torch import Tensor

from optc.compiler.formats.layouts.awq import BITS, ORDER
from optc.compiler.formats.layouts.config import ConfigReader
from optc.compiler.formats.layouts.tensors import FLOATS, TensorReader
from optc.compiler.formats.layouts.weight import QuantizedWeight, Scheme, check_parts
from optc.compiler.formats.layouts.words import unpack_words

_NIBBLES = 8


class Awq:
    """Reads the linears of one folder.

    Raises (all methods):
        InputError: another version of the layout, or tensors that do not fit it.
    """

    def __init__(self, config: ConfigReader, reader: TensorReader) -> None:
        self._reader = reader
        # Older configs say w_bit and q_group_size.
        config.choice("bits", config.integer("bits", config.integer("w_bit", BITS)), (BITS,))
        config.choice("version", config.text("version", config.text("format", "gemm")).lower(), ("gemm",))
        config.choice("zero_point", config.boolean("zero_point", True), (True,))
        size = config.integer("group_size", config.integer("q_group_size", 128))
        self._group_size = 0 if size == -1 else size
        if self._group_size < 0:
            raise config.refusal(f"'group_size' is {size}")

    def modules(self) -> list[str]:
        """The linears that the files hold quantized."""
        return [name.removesuffix(".qweight") for name in self._reader.tensors if name.endswith(".qweight")]

    def key_values(self) -> None:
        """None: the layout has no quantized keys and values."""

    def parts(self, module: str) -> tuple[str, ...]:
        """The tensors of one linear's weight."""
        return tuple(f"{module}.{name}" for name in ("qweight", "qzeros", "scales"))

    def shape(self, module: str) -> tuple[int, int]:
        """[N, K] of one linear, from the headers."""
        name = f"{module}.qweight"
        shape = self._reader.shape(name)
        if len(shape) != 2:
            raise self._reader.wrong_shape(name, f"found {list(shape)}, expected two axes")
        return shape[1] * _NIBBLES, shape[0]

    def read(self, module: str) -> QuantizedWeight:
        """One linear's weight; without zero points where all are the middle code."""
        codes = unpack_nibbles(self._reader.matrix(f"{module}.qweight", torch.int32))
        zero = unpack_nibbles(self._reader.matrix(f"{module}.qzeros", torch.int32))
        scale = self._reader.matrix(f"{module}.scales", *FLOATS).t().contiguous()
        middle = bool((zero == 2 ** (BITS - 1)).all())
        scheme = Scheme(bits=BITS, group_size=self._group_size, symmetric=middle)
        weight = QuantizedWeight(scheme, codes, scale, zero)
        check_parts(weight, module)
        return QuantizedWeight(scheme, codes, scale, None) if middle else weight


def unpack_nibbles(words: Tensor) -> Tensor:
    """int32 [R, N / 8] -> uint8 [N, R]."""
    rows = unpack_words(words, BITS, words.shape[1] * _NIBBLES).unflatten(1, (-1, _NIBBLES))
    places = torch.tensor([ORDER.index(column) for column in range(_NIBBLES)], device=rows.device)
    return rows.index_select(-1, places).flatten(1).t().contiguous()
