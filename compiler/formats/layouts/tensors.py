"""Tensors of a checked model folder, read one by one, and refused where they are not as a layout has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from optc.compiler.diagnostics import InputError
from optc.compiler.formats.safetensors_header import TensorInfo, shown
from optc.compiler.ir.lazy_weights import LazyWeight, materialized
from optc.compiler.ir.saved.safetensors_file import TYPES
from optc.compiler.ir.stored_weights import OpenFile, in_file

CPU = torch.device("cpu")
TOGETHER = "check that config.json and the weights belong together"


class TensorReader:
    """Reads tensors of a folder by name; files stay open until `close`, or until the last lazy one of them is gone.

    Args:
        device: where tensors that are read go; lazy ones are of the CPU.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo], device: torch.device = CPU) -> None:
        self.folder, self.tensors, self.device = folder, tensors, device
        self._files: dict[Path, OpenFile] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor that must be there, from the header alone."""
        self._require(name)
        return self.tensors[name].shape

    def read(self, name: str, *dtypes: torch.dtype) -> Tensor:
        """A tensor that must be there and have one of these types.

        Raises:
            InputError: missing, of another type, or cannot be read.
        """
        found: Tensor = materialized(self.lazy(name, *dtypes))
        return found.to(self.device)

    def lazy(self, name: str, *dtypes: torch.dtype) -> LazyWeight:
        """The same tensor, which is read when an operator needs it.

        Raises:
            InputError: missing, of another type, or the file cannot be opened.
        """
        self._require(name)
        info = self.tensors[name]
        path, dtype = self.folder / info.file, TYPES[info.dtype]
        if dtypes and dtype not in dtypes:
            raise InputError(
                f"tensor '{shown(name)}' has the wrong type",
                where=str(path),
                why=f"it holds {dtype}, expected {' or '.join(map(str, dtypes))}",
                remedy=TOGETHER,
            )
        try:
            return in_file(path, info.offset, info.shape, dtype, self._files)
        except OSError as error:
            raise InputError(
                "the model cannot be read",
                where=str(path),
                why=str(error),
                remedy="check its permissions and the disk",
            ) from error

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
                f"tensor '{shown(name)}' cannot be a scale",
                where=str(self.folder / self.tensors[name].file),
                why="it holds a value that is not a positive number",
                remedy="use another copy of the model",
            )
        return value

    def wrong_shape(self, name: str, why: str) -> InputError:
        """The error for a tensor whose shape does not fit the layout."""
        path = self.folder / self.tensors[name].file
        return InputError(f"tensor '{shown(name)}' has the wrong shape", where=str(path), why=why, remedy=TOGETHER)

    def close(self) -> None:
        """Forget the open files."""
        self._files.clear()

    def _require(self, name: str) -> None:
        if name not in self.tensors:
            raise InputError(
                f"missing tensor '{shown(name)}'",
                where=str(self.folder),
                why="the layout that config.json names has one for every quantized linear",
                remedy=TOGETHER,
            )


FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""Types of scales."""
