"""Rounded weights on disk, group by group, so that a killed quantization continues where it was."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from optc.compiler.diagnostics import JSON_ERRORS, os_errors
from optc.compiler.files import read_plain, remove_parts, replace_file
from optc.compiler.rewriting.quantization_record import LinearRecord
from optc.passes.quantization.arithmetic.grid import Grid


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """What is not a tensor about a rounded weight."""

    bits: int
    group_size: int
    symmetric: bool
    damping: float | None
    note: str
    record: LinearRecord


class _Header(msgspec.Struct, frozen=True):
    entries: tuple[Entry, ...]


class GroupStore:
    """A folder with one file per finished group; a file is whole or absent, a damaged one counts as absent.

    The hash of a file is part of its name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def open(work_dir: Path, key: str) -> GroupStore:
        """The store of one run: `key` says all that its results depend on.

        Raises:
            InputError, ResourceError: the folder cannot be made.
        """
        folder = work_dir / f"groups-{key[:32]}"
        with os_errors("making the work folder", str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
            remove_parts(folder)  # of runs that were killed
        return GroupStore(folder)

    def save(self, number: int, entries: list[tuple[Entry, torch.Tensor, Grid]]) -> None:
        """Write the codes and grids of a group.

        Raises:
            InputError, ResourceError: it cannot be written.
        """
        tensors = {}
        for index, (_, codes, grid) in enumerate(entries):
            tensors[f"{index}.codes"] = codes.to(torch.uint8).contiguous().cpu()
            tensors[f"{index}.scale"] = grid.scale.contiguous().cpu()
            tensors[f"{index}.zero"] = grid.zero.contiguous().cpu()
        header = msgspec.json.encode(_Header(tuple(entry for entry, _, _ in entries))).decode()
        data = save_tensors(tensors, {"entries": header})
        path = self.folder / f"{number:05d}.{hashlib.sha256(data).hexdigest()}.safetensors"
        with os_errors("saving a rounded group", str(self.folder)):
            replace_file(path, data)

    def load(self, number: int) -> list[tuple[Entry, torch.Tensor, Grid]] | None:
        """What `save` wrote for a group, or None when there is nothing usable."""
        for path in sorted(self.folder.glob(f"{number:05d}.*.safetensors")):
            data = read_plain(path, "reading a rounded group", follow=False)
            if hashlib.sha256(data).hexdigest() == path.name.split(".")[1]:
                return self._decoded(data)
        return None

    def _decoded(self, data: bytes) -> list[tuple[Entry, torch.Tensor, Grid]] | None:
        try:
            tensors = load_tensors(data)
            size = int.from_bytes(data[:8], "little")
            text = msgspec.json.decode(data[8 : 8 + size])["__metadata__"]["entries"]
            header = msgspec.json.decode(text, type=_Header)
            return [self._entry(index, entry, tensors) for index, entry in enumerate(header.entries)]
        except (safetensors.SafetensorError, KeyError, TypeError, *JSON_ERRORS):
            return None  # of another version: it is computed again

    def _entry(self, index: int, entry: Entry, tensors: dict[str, torch.Tensor]) -> tuple[Entry, torch.Tensor, Grid]:
        codes, scale, zero = (tensors[f"{index}.{part}"] for part in ("codes", "scale", "zero"))
        return entry, codes.float(), Grid(scale, zero, entry.bits, entry.group_size, entry.symmetric)
