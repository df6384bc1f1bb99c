"""Model folders that are already quantized: from compressed-tensors, AWQ, GPTQ, ModelOpt or bitsandbytes to the canonical form.

The model is built with dense weights, captured as any other, and each quantized linear then reads its codes
(`optc.compiler.capture.restored`).

Nothing is quantized anew: the codes are those of the folder, scales are cast to the compute type.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from optc.compiler.diagnostics import InputError, UsageError
from optc.compiler.formats.layouts import QuantizedWeight, modelopt
from optc.compiler.formats.layouts.config import KEY, ConfigReader
from optc.compiler.formats.layouts.key_values import FolderKeyValues
from optc.compiler.formats.layouts.registry import LAYOUTS
from optc.compiler.formats.layouts.tensors import CPU, TOGETHER, TensorReader
from optc.compiler.formats.safetensors_header import TensorInfo, shown
from optc.compiler.ir.lazy_weights import computed
from optc.compiler.model_folder.checkpoint import CheckpointInfo
from optc.compiler.model_folder.config_file import CONFIG, read_json


class Layout(Protocol):
    """How a folder keeps the quantized weights of its linears; see `optc.compiler.formats.layouts`."""

    def modules(self) -> list[str]:
        """Linears that the files hold quantized."""

    def parts(self, module: str) -> tuple[str, ...]:
        """Tensors of one linear's weight."""

    def shape(self, module: str) -> tuple[int, int]:
        """[N, K] of one linear."""

    def read(self, module: str) -> QuantizedWeight:
        """One linear's weight in the canonical form."""

    def key_values(self) -> FolderKeyValues | None:
        """Where the scales of rounded keys and values are, None where nothing rounds them."""


@dataclasses.dataclass(frozen=True)
class QuantizedFolder:
    """The quantized side of a checked model folder.

    Attributes:
        method: compressed-tensors, awq, gptq, fp8, modelopt or bitsandbytes.
        modules: names of the quantized linears, as in the checkpoint.
        key_values: the scales of keys and values, None where they are not rounded.
        dense: the folder as it would be unquantized: `M.weight` [N, K] in place of a linear's parts.
    """

    method: str
    layout: Layout
    reader: TensorReader
    modules: tuple[str, ...]
    key_values: FolderKeyValues | None
    dense: CheckpointInfo

    def stored_bytes(self) -> int:
        """Bytes of codes, scales and zero points in the files."""
        names = (name for module in self.modules for name in self.layout.parts(module))
        return sum(self.reader.tensors[name].nbytes for name in names)

    def state(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Every tensor of the dense model, lazy; the weights of quantized linears are made from codes, in `dtype`."""
        modules = {f"{module}.weight": module for module in self.modules}

        def dense(name: str) -> Tensor:
            return self.layout.read(modules[name]).dense(dtype)

        return {
            name: computed(partial(dense, name), info.shape, dtype) if name in modules else self.reader.lazy(name)
            for name, info in self.dense.tensors.items()
        }


def quantized_folder(info: CheckpointInfo, device: torch.device = CPU) -> QuantizedFolder | None:
    """The quantized weights of a folder, or None when its config names no quantization. Weights are not read.

    Args:
        device: where weights that are read go.

    Raises:
        InputError: a quantization that optc does not read (says which ones it does), tensors that are missing or do
            not fit.
    """
    found = _settings(info)
    if found is None:
        return None
    method, config = found
    reader = TensorReader(info.path, info.tensors, device)
    layout: Layout = LAYOUTS[method].reader(config, reader)
    modules, key_values = tuple(layout.modules()), layout.key_values()
    if not modules and key_values is None:
        raise config.refusal("no linear of the weight files is quantized")
    tensors = dict(info.tensors)
    if key_values is not None:
        for attention in key_values.attentions:
            for name in key_values.names(attention):
                tensors.pop(name, None)  # one that is missing is refused when it is read
    for module in modules:
        rows, columns = layout.shape(module)
        file = info.path.name
        for name in layout.parts(module):
            if name not in info.tensors:
                raise InputError(
                    f"missing tensor '{shown(name)}'",
                    where=str(info.path),
                    why=f"the linear '{shown(module)}' is quantized",
                    remedy=TOGETHER,
                )
            file = tensors.pop(name).file
        tensors[f"{module}.weight"] = TensorInfo(file, "F32", (rows, columns), 0)
    dense = dataclasses.replace(info, tensors=tensors, config={k: v for k, v in info.config.items() if k != KEY})
    return QuantizedFolder(method, layout, reader, modules, key_values, dense)


def _settings(info: CheckpointInfo) -> tuple[str, ConfigReader] | None:
    """(layout, what its config says), None when nothing says that the folder is quantized."""
    own = info.path / modelopt.FILE
    if KEY in info.config:
        config = ConfigReader(info.config, info.path / CONFIG, "config").part(KEY)
        method = config.text("quant_method")
        config.choice("quant_method", method, tuple(LAYOUTS))
        if method != modelopt.METHOD or not own.is_file():
            return method, config
    elif not own.is_file():
        return None
    return modelopt.METHOD, ConfigReader(read_json(own), own, "config").part("quantization")


def refuse_quantizing_again(folder: Path) -> None:
    """Refuse to quantize a folder whose config says that it is quantized; weights unread.

    Raises:
        UsageError: it is already quantized.
        InputError: config.json is malformed.
    """
    path = folder / CONFIG
    config = read_json(path) if path.is_file() else {}
    own = folder / modelopt.FILE
    if KEY in config or own.is_file():
        inner = config.get(KEY)
        method = inner.get("quant_method") if isinstance(inner, dict) else None
        raise UsageError(
            "the model is already quantized",
            where=str(path if KEY in config else own),
            why=f"by {method}" if method else None,
            remedy="leave --quant out: its codes are kept; or give the unquantized model",
        )
