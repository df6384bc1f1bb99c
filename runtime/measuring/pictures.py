"""Picture files as the inputs of an artifact that reads pictures, by the model's own processor in transformers."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from optc.compiler.diagnostics import InputError, TargetError, foreign_errors
from optc.compiler.files import read_plain
from optc.compiler.ir.contract import Contract
from optc.compiler.model_folder.pictures import SETTINGS, picture_settings
from optc.runtime.sessions.tensor_model import Array

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
_MOST_BYTES, _MOST_PIXELS = 256 << 20, 1 << 26
_MOST_SHAPE = 32
"""Long edge over short edge: a processor that keeps the shape makes as large a picture of a thin one as it likes."""
_INSTEAD = "give .npy or .npz with what the model's processor in transformers makes of it"


def picture_reader(folder: Path, contract: Contract) -> Callable[[Path], Array]:
    """A function from a picture's file to the model's input, float32 [1, channels, height, width].

    Args:
        folder: of the artifact, with the settings of the processor.

    Raises:
        InputError: the folder has none, or unusable ones; of the function: a file that cannot be read, or of which the
            processor makes another size than the model takes. TargetError: Pillow is not installed.
    """
    spec = contract.inputs[0]
    if len(contract.inputs) != 1 or len(spec.dims) != 4:
        raise InputError(
            "the model does not read pictures alone",
            why=f"its inputs are {', '.join(item.name for item in contract.inputs)}",
            remedy="give .npz with each of them",
        )
    if picture_settings(folder) is None:
        raise InputError(f"the artifact has no {SETTINGS[0]}", where=str(folder), remedy=_INSTEAD)
    processor = _processor(folder)

    def read(path: Path) -> Array:
        picture = _opened(path)
        with foreign_errors("the picture cannot be processed", where=str(path), remedy=_INSTEAD):
            made = np.asarray(processor(images=[picture], return_tensors="np")[spec.name], np.float32)
        if made.shape[1:] != tuple(spec.dims[1:]):
            raise InputError(
                f"the model's processor makes {list(made.shape[1:])} of the picture",
                where=str(path),
                why=f"the artifact reads {list(spec.dims[1:])}: it was captured for one size",
                remedy="give a picture of that shape, or " + _INSTEAD.removeprefix("give "),
            )
        return made

    return read


def _processor(folder: Path) -> Any:
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise TargetError(
            "pictures are read by Pillow, which is not installed", remedy='pip install "optc[pictures]"'
        ) from error
    from transformers import AutoImageProcessor, logging

    logging.set_verbosity_error()
    with foreign_errors("transformers cannot make the model's image processor", where=str(folder), remedy=_INSTEAD):
        return AutoImageProcessor.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def _opened(path: Path) -> Any:
    """A picture in RGB.

    Raises:
        InputError: not one, or too large.
    """
    from PIL import Image

    data = io.BytesIO(read_plain(path, "reading a picture", most=_MOST_BYTES))
    with (
        foreign_errors("the picture cannot be read", where=str(path), remedy="convert it to PNG or JPEG"),
        Image.open(data, formats=("BMP", "JPEG", "PNG", "WEBP")) as picture,
    ):
        width, height = picture.size
        if width * height > _MOST_PIXELS or max(width, height) > _MOST_SHAPE * min(width, height):
            raise InputError(
                f"the picture has {width} x {height} pixels",
                where=str(path),
                why=f"{_MOST_PIXELS} pixels are read, of edges in a ratio of at most {_MOST_SHAPE}",
                remedy="scale it down or cut it",
            )
        return picture.convert("RGB")
