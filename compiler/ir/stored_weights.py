"""Weights that lie in files: those of a checkpoint, and what passes make.

They are read with `pread` into new buffers: pages of a mapped file would count as this process's memory. Passes put new
tensors into a `WorkFile`, and what they get back is lazy.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from optc.compiler.diagnostics import InputError, os_errors
from optc.compiler.files import nameless_file
from optc.compiler.ir.lazy_weights import LazyWeight, like_shape
from optc.compiler.ir.weight_buffers import WEIGHTS
from optc.compiler.ops.packed.onnxruntime import pack_nbits, unpack_nbits

_SPILLED_BYTES = 1 << 16  # smaller tensors stay in memory
_CHUNK = 1 << 19  # bytes that are converted together: in the cache, and from the heap rather than from the system
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def return_freed_memory() -> None:
    """Let the C library give every freed buffer of a megabyte and more back to the system at once.

    glibc keeps freed buffers of up to 32 MB for later ones, between whatever else was allocated meanwhile: the weights
    of a model, read one after the other, would leave a heap several times the size of the largest of them. Each page of
    a new buffer costs as much as a thousand additions, so what is smaller stays in the heap, of which 64 MB are kept.
    """
    library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if library is not None and hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        library.mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def in_file(
    path: Path, offset: int, shape: Sequence[int], dtype: torch.dtype, files: dict[Path, OpenFile]
) -> LazyWeight:
    """A weight that lies contiguous in a file.

    Args:
        files: files that are open already; this one is added.
    """
    if path not in files:
        files[path] = OpenFile(os.open(path, os.O_RDONLY), str(path))
    return Stored(files[path], offset, tuple(shape), dtype, dtype).lazy()


class OpenFile:
    """A file descriptor that is closed with its last user."""

    def __init__(self, handle: int, name: str) -> None:
        self.handle, self.name = handle, name
        weakref.finalize(self, os.close, handle)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer from the file.

        Raises:
            InputError: it cannot be read, or is shorter than it was.
        """
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self.handle, [buffer[done:]], offset + done)
            except OSError as error:
                raise InputError(
                    "the weights cannot be read", where=self.name, why=str(error), remedy="check the disk"
                ) from error
            if not count:
                raise InputError(
                    "the weights became shorter while they were read",
                    where=self.name,
                    why=f"the file ends before byte {offset + len(buffer)}",
                    remedy="leave the model alone while it is compiled",
                )
            done += count


class WorkFile:
    """A file without a name, for tensors that passes make; its space is free again when the last of them is gone."""

    def __init__(self, folder: Path | None = None) -> None:
        """Args: folder: where the file is made; None takes the system's folder for temporary files.

        Raises:
            InputError, ResourceError: it cannot be made there.
        """
        place = folder or Path(tempfile.gettempdir())
        with os_errors("making a work file", str(place)):
            self._file = OpenFile(nameless_file(place), f"{place} (work file)")
        self._end = 0

    def store(self, tensor: Tensor) -> Tensor:
        """The same tensor, lazy, its elements in the file; a small one, or one that is lazy already, as it is.

        Codes below 16 take half a byte each.

        Raises:
            ResourceError, InputError: the disk is full, or the file cannot be written.
        """
        if isinstance(tensor, LazyWeight) or tensor.nbytes < _SPILLED_BYTES or tensor.device.type != "cpu":
            return tensor
        flat = tensor.detach().contiguous().reshape(-1)
        nibbles = flat.dtype is torch.uint8 and flat.numel() % 2 == 0 and int(flat.max()) < 16
        offset = self._end
        for piece in flat.split(_CHUNK):
            stored = pack_nbits(piece, 4) if nibbles else piece
            self._append(raw_bytes(stored))
        kind = flat.dtype
        return Stored(self._file, offset, tuple(tensor.shape), kind, kind, nibbles).lazy()

    def _append(self, data: memoryview) -> None:
        with os_errors("writing weights to a work file", self._file.name):
            while data:
                count = os.pwrite(self._file.handle, data, self._end)
                data, self._end = data[count:], self._end + count


@dataclass(frozen=True, eq=False)
class Stored:
    """Elements that lie contiguous in a file as `stored`, cast to `dtype` when they are read.

    `nibbles`: uint8 numbers below 16, two per byte, the first in the low half.
    """

    file: OpenFile
    offset: int
    shape: tuple[int, ...]
    stored: torch.dtype
    dtype: torch.dtype
    nibbles: bool = False

    def lazy(self) -> LazyWeight:
        return LazyWeight(self, like_shape(self.shape, self.dtype))

    def read(self) -> Tensor:
        out = WEIGHTS.empty(self.shape, self.dtype)
        flat, begin = out.view(-1), 0
        for piece in flat.split(_CHUNK // self.stored.itemsize):
            self._fill(piece, begin)
            begin += len(piece)
        return out

    def rows(self, indices: Tensor) -> Tensor | None:
        """[..., C] for indices of rows of a matrix [R, C], each read once; None where there is no such row."""
        chosen, places = torch.unique(indices.reshape(-1), return_inverse=True)
        if len(chosen) and not 0 <= int(chosen[0]) <= int(chosen[-1]) < self.shape[0]:
            return None
        width = self.shape[1]
        found = torch.empty((len(chosen), width), dtype=self.dtype)
        for place, row in enumerate(chosen.tolist()):
            self._fill(found[place], row * width)
        return found[places].reshape(*indices.shape, width)

    def part(self, start: int, end: int) -> Stored | None:
        """Rows of the first axis, None where they do not begin at a byte."""
        inner = math.prod(self.shape[1:])
        if self.nibbles and (inner * start) % 2:
            return None
        skipped = inner * start // 2 if self.nibbles else inner * start * self.stored.itemsize
        return replace(self, offset=self.offset + skipped, shape=(end - start, *self.shape[1:]))

    def _fill(self, out: Tensor, begin: int) -> None:
        """Fill a flat piece of the result with the elements from number `begin` on."""
        if self.nibbles:
            packed = torch.empty((len(out) + 1) // 2, dtype=torch.uint8)
            self.file.read_into(raw_bytes(packed), self.offset + begin // 2)
            out.copy_(unpack_nbits(packed, 4, len(out)))
            return
        direct = self.stored is self.dtype
        data = out if direct else torch.empty(len(out), dtype=self.stored)
        self.file.read_into(raw_bytes(data), self.offset + begin * self.stored.itemsize)
        if not direct:
            out.copy_(data)
