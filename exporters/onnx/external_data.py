"""Initializers whose bytes are made when they are written, and the file that holds them.

Each weight is made once, piece by piece where it lies in a file already, hashed as it is written, and let go; what is
on the disk is then read back the same way and compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters

from optc.compiler.diagnostics import ArtifactError
from optc.compiler.ir.lazy_operators import pieces
from optc.compiler.ir.stored_weights import raw_bytes

_INLINE_BYTES = 256  # ONNX Runtime's shape inference reads axes and shapes, and cannot from another file
_READ = 16 << 20


class WeightTensor(ir.LazyTensor):
    """An initializer that has the bytes of a tensor.

    Args:
        make: the tensor, whose bytes, row by row, are those of numbers of `kind` in `shape`; it may be lazy.
    """

    def __init__(self, name: str, make: Callable[[], torch.Tensor], kind: ir.DataType, shape: Sequence[int]) -> None:
        self.make = make

        def tensor() -> Any:
            found = torch.cat([piece.reshape(-1) for piece in pieces(make())] or [make().reshape(-1)])
            if kind.bitwidth < 8:
                return ir.PackedTensor(found.numpy(), kind, shape=ir.Shape(shape), name=name)
            return tensor_adapters.TorchTensor(found.reshape(tuple(shape)), name=name)

        super().__init__(tensor, dtype=kind, shape=ir.Shape(shape), name=name)

    def chunks(self) -> Iterator[memoryview]:
        """The bytes, some at a time."""
        for piece in pieces(self.make()):
            yield raw_bytes(piece)


def write_data(models: Sequence[ir.Model], path: Path) -> list[dict[str, str]]:
    """Write the larger initializers of models one after the other and let them refer to these; sha256 of each, by name.

    What an earlier model holds already is not written again. Within a model no two share bytes: readers refuse that.

    Raises:
        OSError: the file cannot be written.
    """
    written: dict[str, list[int]] = {}  # sha256 -> where such bytes begin
    found = []
    with path.open("wb") as file:
        for model in models:
            free = {digest: list(starts) for digest, starts in written.items()}
            digests: dict[str, str] = {}
            for name, value in model.graph.initializers.items():
                tensor = value.const_value
                assert tensor is not None
                if tensor.nbytes <= _INLINE_BYTES:
                    digests[name] = hashlib.sha256(tensor.tobytes()).hexdigest()
                    continue
                digest = _digest_of(tensor) if free else ""
                if free.get(digest):
                    start = free[digest].pop()
                else:
                    start, digest = _append(file, tensor)
                    written.setdefault(digest, []).append(start)
                digests[name] = digest
                value.const_value = ir.ExternalTensor(
                    path.name, start, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name, base_dir=path.parent
                )
            found.append(digests)
    return found


def _chunks(tensor: Any) -> Iterable[Any]:
    return tensor.chunks() if isinstance(tensor, WeightTensor) else (tensor.tobytes(),)


def _digest_of(tensor: Any) -> str:
    digest = hashlib.sha256()
    for chunk in _chunks(tensor):
        digest.update(chunk)
    return digest.hexdigest()


def _append(file: BinaryIO, tensor: Any) -> tuple[int, str]:
    """(where the bytes of a tensor begin, their sha256)."""
    digest, start = hashlib.sha256(), _aligned(file.tell())
    file.write(bytes(start - file.tell()))
    for chunk in _chunks(tensor):
        digest.update(chunk)
        file.write(chunk)
    return start, digest.hexdigest()


def compare_data(path: Path, digests: dict[str, str]) -> dict[str, int]:
    """Compare the initializers of a written model with those that were to be written; bytes of each, by name.

    Raises:
        ArtifactError: one is not there, or differs.
    """
    stored = {name: value.const_value for name, value in ir.load(path).graph.initializers.items()}
    for name, digest in digests.items():
        if name not in stored or _digest(path.parent, stored[name]) != digest:
            raise ArtifactError(
                "a written weight differs from the one in memory",
                where=f"{path}: {name}",
                remedy="check the disk and compile again",
            )
    return {name: int(stored[name].nbytes) for name in digests}


def _aligned(place: int) -> int:
    """The next multiple of the size of the largest elements (float64)."""
    return -(-place // 8) * 8


def _digest(folder: Path, tensor: Any) -> str:
    if not isinstance(tensor, ir.ExternalTensor):
        return hashlib.sha256(tensor.tobytes()).hexdigest()
    digest = hashlib.sha256()
    # Read, not mapped: pages of a mapped file would count as this process's memory.
    with (folder / tensor.location).open("rb") as file:
        file.seek(tensor.offset or 0)
        left = int(tensor.length or 0)
        while left and (data := file.read(min(left, _READ))):
            digest.update(data)
            left -= len(data)
    return digest.hexdigest()
