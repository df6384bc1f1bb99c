"""What a folder says of the pictures that its model reads: sizes, channels, names of classes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optc.compiler.diagnostics import CaptureError, InputError
from optc.compiler.model_folder.config_file import CONFIG, read_json

SETTINGS = ("preprocessor_config.json", "processor_config.json")
"""Files that say how a processor of transformers makes pictures; the second nests that in `image_processor`."""
LARGEST = 8192
"""Pixels of an edge: more is a mistake, or meant to take all memory."""


def picture_settings(folder: Path) -> dict[str, Any] | None:
    """The settings of a folder's image processor; None where it has none.

    Raises:
        InputError: malformed, or with a size that is none.
    """
    for name in SETTINGS:
        if not (folder / name).is_file():
            continue
        whole = read_json(folder / name)
        found = whole if name == SETTINGS[0] else whole.get("image_processor")
        if isinstance(found, dict):
            for key in ("size", "crop_size", "pad_size"):
                _check_edges(found.get(key), f"{folder / name}: {key}")
            return found
    return None


def _check_edges(size: Any, where: str) -> None:
    """Hold a size, a number or numbers by edge, to what a picture can have.

    Raises:
        InputError: it is none.
    """
    edges = list(size.values()) if isinstance(size, dict) else [size]
    if not all(edge is None or (type(edge) is int and 0 < edge <= LARGEST) for edge in edges):
        raise InputError(
            "the image processor's size is unusable",
            where=where,
            why=f"{size!r:.80}",
            remedy=f"state whole numbers of pixels from 1 to {LARGEST}",
        )


def picture_size(folder: Path, config: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of what a model reads: what its processor makes of a picture, else the config's own image_size.

    A processor that keeps the shape of pictures (a shortest edge, no crop) makes many sizes: there it is the config's, else a
    square of that edge.

    Args:
        config: of the folder, as JSON.

    Raises:
        CaptureError: neither says it. InputError: as `picture_settings`.
    """
    settings = picture_settings(folder) or {}
    chosen = settings.get("crop_size" if settings.get("do_center_crop") else "size")
    stated = config.get("image_size") or (config.get("vision_config") or {}).get("image_size")
    for size in (chosen, stated, _shortest(chosen)):
        if found := _pair(size):
            _check_edges(dict(enumerate(found)), str(folder / CONFIG))
            return found
    raise CaptureError(
        "nothing says how large the pictures are that the model reads (pixel_values)",
        where=str(folder),
        why=f"there is no {SETTINGS[0]} with a size, and no image_size in {CONFIG}",
        remedy=f"put the model's {SETTINGS[0]} into the folder",
    )


def _pair(size: Any) -> tuple[int, int] | None:
    """Height and width, where a size is both; a number is a square."""
    if isinstance(size, dict):
        size = [size.get("height"), size.get("width")]
    edges = [size, size] if isinstance(size, int) else size
    if isinstance(edges, list | tuple) and len(edges) == 2 and all(type(edge) is int for edge in edges):
        return edges[0], edges[1]
    return None


def _shortest(size: Any) -> Any:
    return size.get("shortest_edge") if isinstance(size, dict) else None


def class_names(config: Mapping[str, Any]) -> dict[int, str]:
    """`id2label` of a config, of what in it are numbers and names; empty where there is none."""
    stated = config.get("id2label")
    items = stated.items() if isinstance(stated, dict) else ()
    return {int(key): name for key, name in items if str(key).isdecimal() and isinstance(name, str)}
