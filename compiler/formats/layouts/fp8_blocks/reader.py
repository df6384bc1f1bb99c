"""Reads linears of folders in FP8 blocks; the layout is described in `optc.compiler.formats.layouts.fp8_blocks`."""

from __future__ import annotations

import torch

from optc.compiler.formats.layouts.blocks import BLOCK_SCHEME, BLOCKS, spread_rows
from optc.compiler.formats.layouts.config import ConfigReader
from optc.compiler.formats.layouts.fp8_blocks import PARTS
from optc.compiler.formats.layouts.tensors import FLOATS, TensorReader
from optc.compiler.formats.layouts.weight import QuantizedWeight, check_parts


class Fp8Blocks:
    """Reads the linears of one folder.

    Raises (all methods):
        InputError: another size of blocks, calibrated inputs, or tensors that do not fit the config.
    """

    def __init__(self, config: ConfigReader, reader: TensorReader) -> None:
        self._reader = reader
        config.choice("fmt", config.text("fmt", "e4m3"), ("e4m3",))
        config.choice("activation_scheme", config.text("activation_scheme", "dynamic"), ("dynamic",))
        config.choice("weight_block_size", config.integers("weight_block_size"), (BLOCKS,))

    def modules(self) -> list[str]:
        """The linears that the files hold quantized."""
        last = f".{PARTS[1]}"
        return [name.removesuffix(last) for name in self._reader.tensors if name.endswith(last)]

    def parts(self, module: str) -> tuple[str, ...]:
        """The tensors of one linear's weight."""
        return tuple(f"{module}.{name}" for name in PARTS)

    def shape(self, module: str) -> tuple[int, int]:
        """[N, K] of one linear, from the headers."""
        shape = self._reader.shape(f"{module}.weight")
        if len(shape) != 2:
            raise self._reader.wrong_shape(f"{module}.weight", f"found {list(shape)}, expected two axes")
        return shape[0], shape[1]

    def read(self, module: str) -> QuantizedWeight:
        """One linear's weight."""
        codes, scale = (f"{module}.{name}" for name in PARTS)
        held = self._reader.matrix(codes, torch.float8_e4m3fn)
        rows = spread_rows(self._reader, scale, self._reader.matrix(scale, *FLOATS), len(held))
        return check_parts(QuantizedWeight(BLOCK_SCHEME, held, rows), module)

    def key_values(self) -> None:
        """The layout has no scales of keys and values."""
        return
