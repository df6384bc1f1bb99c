"""Reads `transform_config` of compressed-tensors folders: rotations of inputs that a loader computes at run time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from optc.compiler.diagnostics import InputError
from optc.compiler.formats.layouts.compressed_tensors import TRANSFORM_PART
from optc.compiler.formats.layouts.compressed_tensors.targets import CLASS, names
from optc.compiler.formats.layouts.config import ConfigReader
from optc.compiler.formats.layouts.tensors import FLOATS, TOGETHER, TensorReader
from optc.compiler.formats.safetensors_header import shown
from optc.compiler.ops.dialect.rotation import hadamard_signs

_FOLDED = ("weight_input", "weight_output")
_LARGEST = 1 << 10
_INPUT_PART = TRANSFORM_PART.format("")


@dataclass(frozen=True)
class Turn:
    """A rotation by Sylvester's Hadamard matrix of `size` channels; `part` is what its matrix is called beside a linear."""

    size: int
    part: str
    targets: tuple[str, ...]
    ignore: tuple[str, ...]
    config: ConfigReader

    def fits(self, module: str) -> bool:
        """Whether the input of a linear is rotated."""
        return self._among(self.targets, module) and not self._among(self.ignore, module)

    def names(self, module: str) -> bool:
        """The same, by more than being a linear."""
        return self.fits(module) and self._among([target for target in self.targets if target != CLASS], module)

    def _among(self, targets: Sequence[str], module: str) -> bool:
        return any(target == CLASS or names(target, module, self.config) for target in targets)


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
            found.append(Turn(size, part, tuple(apply.texts("targets")), tuple(apply.texts("ignore")), apply))
    return found


def check_named(found: Sequence[Turn], reader: TensorReader, quantized: Sequence[str]) -> None:
    """Refuse rotations that name what is no quantized linear, and matrices that no rotation is for.

    Raises:
        InputError: names it; its weight would be read as one of an input that is not rotated.
    """
    known = set(quantized)
    for name, info in reader.tensors.items():
        module, _, last = name.rpartition(".")
        for turn in found:
            beside = name.removesuffix(f".{turn.part}")
            if beside != name and (
                beside not in known or not any(turn.part == own.part and own.fits(beside) for own in found)
            ):
                raise turn.config.refusal(
                    f"there is '{shown(name)}', and no rotation of a quantized linear's input is for it"
                )
        parent = module.rpartition(".")[0]
        is_matrix = name.endswith(_INPUT_PART) and not name.endswith(tuple(f"_{where}.weight" for where in _FOLDED))
        if is_matrix and parent in known and not any(name == f"{parent}.{turn.part}" for turn in found):
            raise InputError(
                f"tensor '{shown(name)}' rotates the input of a quantized linear, and the config does not say so",
                where=str(reader.folder / reader.tensors[name].file),
                why="'transform_config' has no rotation of that name",
                remedy=TOGETHER,
            )
        if last == "weight" and len(info.shape) == 2 and not known & {module, parent}:
            for turn in found:
                if turn.names(module):
                    raise turn.config.refusal(
                        f"'{shown(module)}' is named, and optc rotates inputs of quantized linears alone"
                    )


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
