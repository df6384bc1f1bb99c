"""The header of a safetensors file, read as hostile input.

Layout (github.com/huggingface/safetensors, "Format"): 8 bytes, little-endian header length N; N bytes
of JSON, tensor name -> {dtype, shape, data_offsets}, and `__metadata__`; then the data. Offsets count
from the start of the data, which the tensors cover without holes.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from optc.compiler.diagnostics import JSON_ERRORS, InputError
from optc.compiler.ir.saved.safetensors_file import TYPES
from optc.compiler.json_text import unique_keys

_MAX_HEADER = 100_000_000  # the format's own limit
_MAX_RANK = 64
_MAX_TENSORS = 200_000  # the largest checkpoints have half as many, in hundreds of files
_MAX_VALUES = 20 * _MAX_TENSORS  # names, numbers and texts of the header: a tensor of four dimensions has ten
_REMEDY = "download or copy the file again"
_Whole = Annotated[int, msgspec.Meta(ge=0)]


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: file name, dtype as in the header, shape, byte offset in the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * TYPES[self.dtype].itemsize


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[_Whole, ...]
    data_offsets: tuple[_Whole, _Whole]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file in file order; the data is not read.

    Raises:
        InputError: truncated, malformed, overlapping, or sizes that do not fit; names the tensor.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8:
            raise damaged(path, f"it has {size} bytes, too few for a header: truncated")
        if length > _MAX_HEADER:
            raise damaged(path, f"its header claims {length} bytes; the format allows {_MAX_HEADER}")
        if 8 + length > size:
            raise damaged(path, f"its header claims {length} bytes and the file has {size}: truncated")
        text = file.read(length)
    infos = {}
    for name, raw in _entries(path, text).items():
        infos[name] = _tensor(path, name, raw, data_start=8 + length)
    _check_layout(path, infos, data_start=8 + length, end=size)
    return infos


def shown(name: str) -> str:
    """A tensor name fit for a message: no control characters, not endless."""
    name = name if len(name) <= 200 else name[:200] + "..."
    return name if name.isprintable() else name.encode("unicode_escape").decode()


def damaged(path: Path, why: str, tensor: str | None = None) -> InputError:
    """The error for a safetensors file that is not what it says."""
    where = str(path) if tensor is None else f"{path}: tensor '{shown(tensor)}'"
    return InputError("the safetensors file is damaged", where=where, why=why, remedy=_REMEDY)


def _entries(path: Path, text: bytes) -> dict[str, msgspec.Raw]:
    tensors = text.count(b'"data_offsets"')
    if tensors > _MAX_TENSORS:
        raise damaged(path, f"its header names {tensors} tensors; at most {_MAX_TENSORS} are read from a file")
    values = text.count(b",") + text.count(b":")  # at least as many are made of it
    if values > _MAX_VALUES:
        raise damaged(path, f"its header holds {values} values; at most {_MAX_VALUES} are read from a file")
    if not text.startswith(b"{"):
        raise damaged(path, "its header is not a JSON object")
    try:
        json.loads(text, object_pairs_hook=unique_keys)
        entries = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        msgspec.json.decode(entries.pop("__metadata__", msgspec.Raw(b"{}")), type=dict[str, str])
    except JSON_ERRORS as error:
        raise damaged(path, f"its header is malformed: {error}") from error
    return entries


def _tensor(path: Path, name: str, raw: msgspec.Raw, data_start: int) -> TensorInfo:
    try:
        entry = msgspec.json.decode(raw, type=_Entry)
    except JSON_ERRORS as error:
        raise damaged(path, f"its header entry is malformed: {error}", name) from error
    if entry.dtype not in TYPES:
        raise InputError(
            f"dtype {shown(entry.dtype)} is not supported",
            where=f"{path}: tensor '{shown(name)}'",
            remedy=f"convert the tensor to one of {', '.join(TYPES)}",
        )
    if len(entry.shape) > _MAX_RANK:
        raise damaged(path, f"it has {len(entry.shape)} dimensions; at most {_MAX_RANK} are allowed", name)
    begin, end = entry.data_offsets
    info = TensorInfo(path.name, entry.dtype, entry.shape, data_start + begin)
    if end - begin != info.nbytes:
        kind = f"{entry.dtype} {list(entry.shape)}"
        why = f"{kind} takes {info.nbytes} bytes; its offsets [{begin}, {end}] span {end - begin}"
        raise damaged(path, why, name)
    return info


def _check_layout(path: Path, infos: dict[str, TensorInfo], data_start: int, end: int) -> None:
    """The tensors must fill the file from the end of the header on, in some order, without overlap."""
    place = data_start
    for name, info in sorted(infos.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        stop = info.offset + info.nbytes
        if stop > end:
            raise damaged(path, f"it ends at byte {stop} and the file has {end}: truncated", name)
        if info.offset != place:
            kind = "overlaps the tensor before it" if info.offset < place else "leaves a hole before it"
            raise damaged(path, f"it starts at byte {info.offset}, expected {place}: {kind}", name)
        place = stop
    if place != end:
        raise damaged(path, f"{end - place} bytes follow the last tensor")
