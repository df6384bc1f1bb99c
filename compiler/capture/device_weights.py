"""Weights of a model folder that go straight to a device: read once, and checked and made dense there."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from optc.compiler.files import side_by_side
from optc.compiler.formats.layouts.tensors import TensorReader
from optc.compiler.ir.lazy_weights import computed, materialized
from optc.compiler.ir.saved.safetensors_file import TYPES
from optc.compiler.model_folder.checkpoint import CheckpointInfo, check_values, stamped_bytes
from optc.compiler.model_folder.quantized import QuantizedFolder


class StraightTo:
    """The tensors of a checked folder on a device.

    A model is made of lazy ones (`state`) and then gets those of the device (`place`), several at a time: the host holds a
    few of them, whatever their number, and looks at none.
    """

    def __init__(self, info: CheckpointInfo, device: torch.device) -> None:
        self._info, self._device = info, device
        self._reader = TensorReader(info.path, info.tensors, device)
        self._looked_at: set[str] = set()

    def state(self, quantized: QuantizedFolder | None, dtype: torch.dtype) -> dict[str, Tensor]:
        """Every tensor of the dense model, lazy; weights of quantized linears are made from codes, in `dtype`.

        Args:
            quantized: the folder's quantized side, whose tensors go to the same device.
        """
        modules = {} if quantized is None else {f"{module}.weight": module for module in quantized.modules}
        tensors = self._info.tensors if quantized is None else quantized.dense.tensors

        def dense(name: str) -> Tensor:
            assert quantized is not None
            made = quantized.layout.read(modules[name]).dense(dtype)
            self._looked_at |= set(quantized.layout.parts(modules[name])) if _finite(made) else set()
            return made

        return {
            name: computed(partial(dense, name), info.shape, dtype)
            if name in modules
            else computed(partial(self._read, name), info.shape, TYPES[info.dtype])
            for name, info in tensors.items()
        }

    def place(self, model: torch.nn.Module) -> None:
        """Give a model its tensors in place of the lazy ones, and take others (those that it made itself) to the device; what
        several modules share stays one.

        Raises:
            InputError: NaN or Inf in a tensor, also in one that the model does not have; as `check_values`.
        """
        found = {id(tensor): tensor for _, _, tensor in _tensors(model)}
        read = side_by_side(self._moved, list(found.values()), stamped_bytes(self._info))
        kept = dict(zip(found, read, strict=True))
        for table, name, tensor in list(_tensors(model)):
            table[name] = kept[id(tensor)]
        check_values(self._info, [name for name in self._info.tensors if name not in self._looked_at])

    def _moved(self, tensor: Tensor) -> Tensor:
        made = materialized(tensor.detach()).to(self._device)
        return torch.nn.Parameter(made, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else made

    def _read(self, name: str) -> Tensor:
        tensor = self._reader.read(name)
        if not tensor.is_floating_point() or _finite(tensor):
            self._looked_at.add(name)
        return tensor


def _finite(tensor: Tensor) -> bool:
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # float8 has no reductions
    low, high = wide.aminmax() if wide.numel() else (wide.new_zeros(()),) * 2
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _tensors(model: torch.nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """(table, name, tensor) of every parameter and buffer of every module."""
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            yield from ((table, name, tensor) for name, tensor in table.items() if tensor is not None)
