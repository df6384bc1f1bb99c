"""Reads linears of GPTQ folders; the layout is described in `optc.compiler.formats.layouts.gptq`."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from optc.compiler.formats.layouts.column_order import column_order
from optc.compiler.formats.layouts.config import ConfigReader
from optc.compiler.formats.layouts.gptq import V1, V2
from optc.compiler.formats.layouts.tensors import FLOATS, TensorReader
from optc.compiler.formats.layouts.weight import QuantizedWeight, Scheme, check_parts
from optc.compiler.formats.layouts.words import unpack_words, word_count

_KNOWN = (2, 3, 4, 8)


class Gptq:
    """Reads the linears of one folder.

    Raises (all methods):
        InputError: settings per layer, groups of several sizes, or tensors that do not fit.
    """

    def __init__(self, config: ConfigReader, reader: TensorReader) -> None:
        self._config, self._reader = config, reader
        self._bits = config.integer("bits")
        config.choice("bits", self._bits, _KNOWN)
        layout = config.text("checkpoint_format", config.text("format", V1)) or V1
        config.choice("checkpoint_format", layout, (V1, V2))
        self._offset = 1 if layout == V1 else 0
        size = config.integer("group_size", 128)
        self._group_size = 0 if size == -1 else size
        if self._group_size < 0:
            raise config.refusal(f"'group_size' is {size}")
        rules = [] if config.absent("dynamic") else config.part("dynamic").keys()
        if not all(rule.startswith("-:") for rule in rules):
            raise config.refusal("'dynamic' has separate settings for some layers")

    def modules(self) -> list[str]:
        """The linears that the files hold quantized."""
        return [name.removesuffix(".qweight") for name in self._reader.tensors if name.endswith(".qweight")]

    def key_values(self) -> None:
        """None: the layout has no quantized keys and values."""

    def parts(self, module: str) -> tuple[str, ...]:
        """The tensors of one linear's weight; older folders have no g_idx."""
        names = [f"{module}.{name}" for name in ("qweight", "qzeros", "scales", "g_idx")]
        return tuple(name for name in names if name in self._reader or not name.endswith("g_idx"))

    def shape(self, module: str) -> tuple[int, int]:
        """[N, K] of one linear, from the headers."""
        name = f"{module}.qweight"
        shape = self._reader.shape(name)
        if len(shape) != 2 or shape[0] * 32 % self._bits:
            raise self._reader.wrong_shape(name, f"found {list(shape)} for {self._bits} bits")
        return shape[1], shape[0] * 32 // self._bits

    def read(self, module: str) -> QuantizedWeight:
        """One linear's weight; without zero points where all are the middle code."""
        rows, columns = self.shape(module)
        words = self._reader.matrix(f"{module}.qweight", torch.int32)
        codes = unpack_words(words.t().contiguous(), self._bits, columns)
        order = self._order(module, columns)
        codes = codes if order is None else codes[:, order].contiguous()
        zero = self._zero(module, rows)
        scale = self._reader.matrix(f"{module}.scales", *FLOATS).t().contiguous()
        middle = bool((zero == 2 ** (self._bits - 1)).all())
        scheme = Scheme(bits=self._bits, group_size=self._group_size, symmetric=middle)
        weight = check_parts(QuantizedWeight(scheme, codes, scale, zero, input_order=order), module)
        return dataclasses.replace(weight, zero=None) if middle else weight

    def _zero(self, module: str, rows: int) -> Tensor:
        """uint8 [N, G]."""
        name = f"{module}.qzeros"
        words = self._reader.matrix(name, torch.int32)
        if words.shape[1] != word_count(rows, self._bits):
            raise self._reader.wrong_shape(name, f"it has {words.shape[1]} words for {rows} rows of {self._bits} bits")
        zero = unpack_words(words, self._bits, rows).t().to(torch.int16) + self._offset
        if bool((zero >= 2**self._bits).any()):
            # Readers disagree: AutoGPTQ's kernels wrap it to 0, vLLM's take 2^bits.
            raise self._config.refusal(
                f"'{name}' has a zero point above {2**self._bits - 1}, which readers interpret differently"
            )
        return zero.to(torch.uint8).contiguous()

    def _order(self, module: str, columns: int) -> Tensor | None:
        """See `column_order`."""
        name = f"{module}.g_idx"
        if name in self._reader:
            return column_order(self._config, self._reader, name, columns, self._group_size or columns)
        if self._config.boolean("desc_act", False):
            raise self._config.refusal(f"'desc_act' is true, and '{name}' is missing")
        return None
