"""Safetensors files of bounded size, with the index that Hugging Face's loaders read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from optc.compiler.diagnostics import os_errors
from optc.compiler.ir.saved.safetensors_file import write_safetensors
from optc.compiler.ir.stored_weights import WorkFile

SHARD_BYTES = 5_000_000_000
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def write_shards(directory: Path, tensors: Iterable[tuple[str, Tensor]], limit: int = SHARD_BYTES) -> dict[str, str]:
    """Write tensors as they come, a file whenever `limit` bytes are reached; returns tensor -> file.

    They wait in a file too, since the header in front of them is known with the last one.

    Raises:
        ResourceError, InputError: the disk is full, or not writable.
    """
    parts: list[dict[str, int]] = []
    held: dict[str, Tensor] = {}
    work = WorkFile(directory)

    def flush() -> None:
        nonlocal work
        path = directory / f"{len(parts)}.part"
        with os_errors("writing the weights", str(path)):
            write_safetensors(path, held, metadata={"format": "pt"})
        parts.append({name: tensor.nbytes for name, tensor in held.items()})
        held.clear()
        work = WorkFile(directory)

    for name, tensor in tensors:
        if held and sum(item.nbytes for item in held.values()) + tensor.nbytes > limit:
            flush()
        held[name] = work.store(tensor)
    flush()
    return _publish(directory, parts)


def _publish(directory: Path, parts: list[dict[str, int]]) -> dict[str, str]:
    """Give the files their names, which tell how many there are, and write the index."""
    count = len(parts)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    placed = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    with os_errors("writing the weights", str(directory)):
        for number, name in enumerate(names):
            (directory / f"{number}.part").rename(directory / name)
        if count > 1:
            total = sum(size for part in parts for size in part.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return placed
