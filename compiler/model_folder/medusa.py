"""Folders of Medusa heads (Cai et al. 2024, https://arxiv.org/abs/2401.10774), read as hostile input.

The layout is that of the authors' checkpoints: `config.json` and `medusa_lm_head.safetensors` with, of each head k,

    medusa_head.{k}.{j}.linear.weight [H, H], .bias [H]   block j of `medusa_num_layers`: x + SiLU(W x + b)
    medusa_head.{k}.{medusa_num_layers}.weight [V, H]     its linear; absent where it is the base's head

Names may have no `medusa_head.` in front. `draft.json`, a file of optc's own, says which base the heads were trained on.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from optc.compiler.diagnostics import InputError, os_errors
from optc.compiler.files import sha256_of
from optc.compiler.formats.layouts.tensors import TensorReader
from optc.compiler.formats.safetensors_header import TensorInfo, read_header, shown
from optc.compiler.model_folder.checkpoint import CheckpointInfo, weights_digest
from optc.compiler.model_folder.config_file import CONFIG, read_json
from optc.compiler.model_folder.draft_origin import Origin

WEIGHTS = "medusa_lm_head.safetensors"
MOST_HEADS, MOST_LAYERS = 16, 8
_PREFIX = "medusa_head."
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class MedusaConfig(msgspec.Struct, frozen=True, kw_only=True):
    """config.json, as far as it is read.

    Attributes:
        medusa_num_heads: head k says what the token k + 2 places behind is, from 0 on.
        medusa_num_layers: blocks of each.
        base_model_name_or_path: for people.
    """

    medusa_num_heads: Annotated[int, Meta(ge=1, le=MOST_HEADS)]
    medusa_num_layers: Annotated[int, Meta(ge=1, le=MOST_LAYERS)] = 1
    base_model_name_or_path: str = ""


@dataclass(frozen=True)
class MedusaHead:
    """One head.

    Attributes:
        blocks: weight [H, H] and bias [H] of each.
        linear: [V, H]; None where it is the base's head.
    """

    blocks: tuple[tuple[Tensor, Tensor], ...]
    linear: Tensor | None


@dataclass(frozen=True)
class MedusaFolder:
    """A folder that was read.

    Attributes:
        heads: of which all or none have a linear of their own.
        origin: None where nothing is said of it.
    """

    config: MedusaConfig
    heads: tuple[MedusaHead, ...]
    origin: Origin | None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read and check a folder.

        Raises:
            InputError: a file that is missing, malformed or damaged; a tensor that is missing, of another shape or type, or
                not finite. It names file, key or tensor.
        """
        config = _read_config(folder)
        path = folder / WEIGHTS
        if not path.is_file():
            raise InputError("the folder has no Medusa heads", where=str(path), remedy=f"it needs {WEIGHTS}")
        with os_errors("reading Medusa heads", str(path)):
            headers = {name.removeprefix(_PREFIX): info for name, info in read_header(path).items()}
        shapes = _shapes(config, headers, path)
        reader = TensorReader(folder, headers)
        tensors = {name: _finite(reader.read(name, *_FLOATS), name, path) for name in shapes}
        return cls(config, _heads(config, tensors), Origin.read(folder))

    @property
    def hidden_size(self) -> int:
        """H."""
        return len(self.heads[0].blocks[0][1])

    @property
    def vocab_size(self) -> int | None:
        """V, where heads have linears of their own."""
        linear = self.heads[0].linear
        return None if linear is None else len(linear)

    @property
    def numbers(self) -> int:
        """Of all heads together."""
        blocks = sum(item.numel() for head in self.heads for block in head.blocks for item in block)
        return blocks + sum(head.linear.numel() for head in self.heads if head.linear is not None)

    def check_sizes(self, hidden_size: int, vocab_size: int, folder: Path) -> None:
        """Refuse heads for a model of other sizes.

        Args:
            folder: that they are of.

        Raises:
            InputError: see above.
        """
        theirs = {"hidden size": self.hidden_size, "vocabulary": self.vocab_size or vocab_size}
        for (what, size), ours in zip(theirs.items(), (hidden_size, vocab_size), strict=True):
            if size != ours:
                raise InputError(
                    f"the Medusa heads are for a model with a {what} of {size}, this one has {ours}",
                    where=str(folder),
                    remedy="train heads for this model: optc train --recipe medusa",
                )

    def write(self, folder: Path) -> None:
        """Write the files into a folder that is there.

        Raises:
            InputError, ResourceError: they cannot be written.
        """
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {}
        for k, head in enumerate(self.heads):
            for j, (weight, bias) in enumerate(head.blocks):
                tensors |= {f"{_PREFIX}{k}.{j}.linear.weight": weight, f"{_PREFIX}{k}.{j}.linear.bias": bias}
            if head.linear is not None:
                tensors[f"{_PREFIX}{k}.{len(head.blocks)}.weight"] = head.linear
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with os_errors("writing Medusa heads", str(folder)):
            (folder / CONFIG).write_bytes(msgspec.json.format(msgspec.json.encode(self.config)))
            (folder / WEIGHTS).write_bytes(save(kept, metadata={"format": "pt"}))
            if self.origin is not None:
                self.origin.write(folder)


def heads_digest(folder: Path) -> str:
    """sha256 over the weights and the config of a folder of heads.

    Raises:
        InputError: it has none, or they cannot be read.
    """
    digest = hashlib.sha256()
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise InputError(
                "the folder has no Medusa heads",
                where=str(folder),
                why=f"there is no {name}",
                remedy="give a folder that optc train --recipe medusa wrote",
            )
        with os_errors("reading Medusa heads", str(folder / name)):
            digest.update(f"{sha256_of(folder / name)}  {name}\n".encode())
    return digest.hexdigest()


def check_base(heads: Path, info: CheckpointInfo) -> None:
    """Refuse heads that say that they were trained for another model.

    Raises:
        InputError: see above; or draft.json is malformed.
    """
    origin = Origin.read(heads)
    if origin is None:
        return
    ours = weights_digest(info)
    if origin.weights != ours:
        raise InputError(
            "the Medusa heads were trained for another model",
            where=str(heads),
            why=f"for weights with the hash {origin.weights[:12] or 'of none'}, those of {info.path} have {ours[:12]}",
            remedy="train heads for this model (optc train --recipe medusa), or give the model that they are for",
        )


def _read_config(folder: Path) -> MedusaConfig:
    path = folder / CONFIG
    if not path.is_file():
        raise InputError("the folder has no config.json", where=str(folder), remedy="give a folder of Medusa heads")
    try:
        return msgspec.convert(read_json(path), MedusaConfig)
    except msgspec.ValidationError as error:
        raise _unusable(path, str(error)) from error


def _shapes(config: MedusaConfig, headers: Mapping[str, TensorInfo], path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor; that of the first head's bias and linear give the sizes.

    Raises:
        InputError: a tensor that is missing, of another shape, or that has no place.
    """
    layers, last = config.medusa_num_layers, f"0.{config.medusa_num_layers}.weight"
    hidden = _of(headers, "0.0.linear.bias", path).shape[:1]
    own = {} if last not in headers else {f"{layers}.weight": (*headers[last].shape[:1], *hidden)}
    each = {f"{j}.linear.weight": (*hidden, *hidden) for j in range(layers)}
    each |= {f"{j}.linear.bias": hidden for j in range(layers)} | own
    shapes = {f"{k}.{name}": shape for k in range(config.medusa_num_heads) for name, shape in each.items()}
    for name, shape in shapes.items():
        found = _of(headers, name, path).shape
        if found != shape or not math.prod(shape):
            raise _unusable(path, f"tensor '{name}' is {list(found)}, not {list(shape)}")
    spare = sorted(set(headers) - set(shapes))
    if spare:
        raise _unusable(path, f"there is no place for tensor '{shown(spare[0])}'")
    return shapes


def _of(headers: Mapping[str, TensorInfo], name: str, path: Path) -> TensorInfo:
    if name not in headers:
        raise _unusable(path, f"tensor '{name}' is missing")
    return headers[name]


def _heads(config: MedusaConfig, tensors: Mapping[str, Tensor]) -> tuple[MedusaHead, ...]:
    layers = config.medusa_num_layers

    def head(k: int) -> MedusaHead:
        blocks = tuple((tensors[f"{k}.{j}.linear.weight"], tensors[f"{k}.{j}.linear.bias"]) for j in range(layers))
        return MedusaHead(blocks, tensors.get(f"{k}.{layers}.weight"))

    return tuple(head(k) for k in range(config.medusa_num_heads))


def _finite(tensor: Tensor, name: str, path: Path) -> Tensor:
    if not math.isfinite(float(tensor.float().abs().amax())):
        raise _unusable(path, f"tensor '{name}' has values that are not finite")
    return tensor


def _unusable(path: Path, why: str) -> InputError:
    return InputError(
        "the Medusa heads cannot be used",
        where=str(path),
        why=why,
        remedy="check that config.json and the weights belong together, or train heads: optc train --recipe medusa",
    )
