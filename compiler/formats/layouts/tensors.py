"""Tensors of a checked model folder, read one by one, and refused where they are not as a layout has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from optc.compiler.diagnostics import InputError
from optc.compiler.formats.safetensors_header import TensorInfo, damaged, shown

TOGETHER = "check that config.json and the weights belong together"


class TensorReader:
    """Reads tensors of a folder by name; files stay open until `close`."""

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self.folder, self.tensors = folder, tensors
        self._files: dict[str, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor that must be there, from the header alone."""
        self._require(name)
        return self.tensors[name].shape

    def read(self, name: str, *dtypes: torch.dtype) -> Tensor:
        """A tensor that must be there and have one of these types.

        Raises:
            InputError: missing, of another type, or damaged.
        """
        self._require(name)
        file = self.tensors[name].file
        path = self.folder / file
        try:
            if file not in self._files:
                self._files[file] = safe_open(path, framework="pt")
            tensor: Tensor = self._files[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise damaged(path, str(error), name) from error
        if dtypes and tensor.dtype not in dtypes:
            raise InputError(
                f"tensor '{shown(name)}' has the wrong type", where=str(path),
                why=f"it holds {tensor.dtype}, expected {' or '.join(map(str, dtypes))}", remedy=TOGETHER,
            )  # fmt: skip
        return tensor

    def matrix(self, name: str, *dtypes: torch.dtype) -> Tensor:
        """The same for a tensor of two axes."""
        tensor = self.read(name, *dtypes)
        if tensor.dim() != 2:
            raise self.wrong_shape(name, f"found {list(tensor.shape)}, expected two axes")
        return tensor

    def positive(self, name: str) -> Tensor:
        """A tensor of fixed scales as float32.

        Raises:
            InputError: as `read` does, or one of them is no positive number.
        """
        value = self.read(name, *FLOATS).float()
        if not bool((torch.isfinite(value) & (value > 0)).all()):
            raise InputError(
                f"tensor '{shown(name)}' cannot be a scale", where=str(self.folder / self.tensors[name].file),
                why="it holds a value that is not a positive number", remedy="use another copy of the model",
            )  # fmt: skip
        return value

    def wrong_shape(self, name: str, why: str) -> InputError:
        """The error for a tensor whose shape does not fit the layout."""
        path = self.folder / self.tensors[name].file
        return InputError(
            f"tensor '{shown(name)}' has the wrong shape", where=str(path), why=why, remedy=TOGETHER
        )

    def close(self) -> None:
        """Forget the open files."""
        self._files.clear()

    def _require(self, name: str) -> None:
        if name not in self.tensors:
            raise InputError(
                f"missing tensor '{shown(name)}'", where=str(self.folder),
                why="the layout that config.json names has one for every quantized linear", remedy=TOGETHER,
            )  # fmt: skip


FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""Types of scales."""
