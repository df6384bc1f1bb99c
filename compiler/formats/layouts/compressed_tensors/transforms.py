"""Reads `transform_config` of compressed-tensors folders: rotations of inputs that a loader computes at run time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from optc.compiler.formats.layouts.compressed_tensors import TRANSFORM_PART
from optc.compiler.formats.layouts.compressed_tensors.targets import names
from optc.compiler.formats.layouts.config import ConfigReader
from optc.compiler.formats.layouts.tensors import FLOATS, TensorReader
from optc.compiler.ops.dialect.rotation import hadamard_signs

_FOLDED = ("weight_input", "weight_output")
_LARGEST = 1 << 10


@dataclass(frozen=True)
class Turn:
    """A rotation by Sylvester's Hadamard matrix of `size` channels; `part` is what its matrix is called beside a linear."""

    size: int
    part: str
    targets: tuple[str, ...]
    ignore: tuple[str, ...]

    def fits(self, module: str) -> bool:
        """Whether the input of a linear is rotated."""
        taken = any(target == "Linear" or names(target, module) for target in self.targets)
        return taken and not any(names(target, module) for target in self.ignore)


def turns(config: ConfigReader) -> list[Turn]:
    """The rotations of inputs. What is folded into weights is left out: the files hold it.

    Raises:
        InputError: a transform that optc has no form for.
    """
    found = []
    for name, group in config.parts("config_groups").items():
        for apply in group.objects("apply"):
            where = apply.text("location")
            if where in _FOLDED:
                continue
            apply.choice("location", where, ("input", *_FOLDED))
            group.choice("type", group.text("type"), ("hadamard",))
            if group.boolean("randomize", False):
                raise group.refusal("'randomize' is set, and optc reads Hadamard matrices in Sylvester's order")
            size = group.integer("head_dim", 0)
            if not 1 < size <= _LARGEST or size & (size - 1):
                raise group.refusal(f"'head_dim' is {size}, not a power of two up to {_LARGEST}")
            part = TRANSFORM_PART.format(name)
            found.append(Turn(size, part, tuple(apply.texts("targets")), tuple(apply.texts("ignore"))))
    return found


def rotation_of(found: Sequence[Turn], module: str, reader: TensorReader, columns: int) -> int:
    """The channels of a block by which a linear's input is rotated, 0 where it is not.

    Raises:
        InputError: two rotations, one that does not divide the `columns`, or a stored matrix that is another.
    """
    own = [turn for turn in found if turn.fits(module)]
    if not own:
        return 0
    size, name = own[0].size, f"{module}.{own[0].part}"
    if len(own) > 1 or columns % size:
        why = "its input is rotated twice" if len(own) > 1 else f"blocks of {size} do not divide {columns} channels"
        raise reader.wrong_shape(f"{module}.weight", why)
    if name in reader and not torch.equal(reader.read(name, *FLOATS).double(), hadamard_signs(size)):
        raise reader.wrong_shape(name, f"it is not the Hadamard matrix of Sylvester, [{size}, {size}] of 1 and -1")
    return size
