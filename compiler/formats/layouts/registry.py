"""The layouts of quantized model folders by name: who reads one and who writes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from optc.compiler.formats.group_sizes import BITS
from optc.compiler.formats.layouts import awq, bitsandbytes, compressed_tensors, fp8_blocks, gptq, modelopt
from optc.compiler.formats.layouts.awq.reader import Awq
from optc.compiler.formats.layouts.awq.writer import AwqWriter
from optc.compiler.formats.layouts.bitsandbytes.reader import Bitsandbytes
from optc.compiler.formats.layouts.compressed_tensors.reader import CompressedTensors
from optc.compiler.formats.layouts.compressed_tensors.writer import CompressedTensorsWriter
from optc.compiler.formats.layouts.config import ConfigReader
from optc.compiler.formats.layouts.fp8_blocks.reader import Fp8Blocks
from optc.compiler.formats.layouts.fp8_blocks.writer import Fp8BlocksWriter
from optc.compiler.formats.layouts.gptq.reader import Gptq
from optc.compiler.formats.layouts.gptq.writer import GptqWriter, keeps_exact_zeros
from optc.compiler.formats.layouts.modelopt.reader import ModelOpt
from optc.compiler.formats.layouts.modelopt.writer import ModelOptWriter
from optc.compiler.formats.layouts.tensors import TensorReader
from optc.compiler.formats.layouts.weight import QuantizedWeight
from optc.compiler.formats.layouts.writing import LayoutWriter


@dataclass(frozen=True)
class CheckpointLayout:
    """One layout.

    Attributes:
        name: `quant_method` of its config.
        reader: from its config and the folder's tensors to what reads its linears.
        writer: from the weights to what writes them; None where optc only reads it.
        chosen: it is a choice of `--layout`; the others belong to a target of their own.
        integer_bits: of integer weights that both the layout and its loaders take.
    """

    name: str
    reader: Callable[[ConfigReader, TensorReader], Any]
    writer: Callable[[Sequence[QuantizedWeight]], LayoutWriter] | None
    chosen: bool = True
    integer_bits: tuple[int, ...] = ()


LAYOUTS = {
    layout.name: layout
    for layout in (
        CheckpointLayout(
            compressed_tensors.METHOD,
            CompressedTensors,
            lambda _: CompressedTensorsWriter(),
            integer_bits=CompressedTensorsWriter().bits,
        ),
        CheckpointLayout(awq.METHOD, Awq, lambda _: AwqWriter(), integer_bits=(awq.BITS,)),
        CheckpointLayout(
            gptq.METHOD,
            Gptq,
            lambda weights: GptqWriter(keeps_exact_zeros(weights)),
            integer_bits=BITS,
        ),
        CheckpointLayout(fp8_blocks.METHOD, Fp8Blocks, lambda _: Fp8BlocksWriter()),
        CheckpointLayout(modelopt.METHOD, ModelOpt, lambda _: ModelOptWriter(), chosen=False),
        CheckpointLayout(bitsandbytes.METHOD, Bitsandbytes, None, chosen=False),
    )
}


def layout_writer(name: str, weights: Sequence[QuantizedWeight]) -> LayoutWriter:
    """The writer of a layout that has one, for these weights."""
    writer = LAYOUTS[name].writer
    assert writer is not None, name
    return writer(weights)


CHOICES = tuple(layout.name for layout in LAYOUTS.values() if layout.chosen)
"""Of `--layout`."""
