"""Sizes that a config names against those that its weight files have, before any model is made of it.

transformers makes one object per layer, expert and label that `config.json` names, and asks nothing: a file of a line
could keep it busy for hours. Files are held to their sizes already, so a config is held to the files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from optc.compiler.diagnostics import InputError
from optc.compiler.formats.safetensors_header import TensorInfo, shown

_LAYERS = re.compile(r"(^|_)(layers?|blocks|depth)$")
_EXPERTS = re.compile(r"experts$")
_SIZES = re.compile(
    r"(_(size|dim|rank|labels|inner|embd|positions|heads|model)$|^(d_model|d_kv|d_ff|n_embd|n_inner|num_labels)$)"
)
_MOST_LAYERS, _MOST_EXPERTS, _MOST = 4096, 1 << 16, 1 << 24
_PACKED = 32  # elements in one of a tensor at most: bits of a word
_SMALL = 1 << 16  # sizes that cost nothing, and need not be those of a tensor: images, patches, windows
_DEEPEST = 64
_MOST_VALUES = 1 << 17
"""In a config and all that is in it: labels of ImageNet-21k, by number and by name, are 43 682; transformers copies them again
and again."""


def check_sizes(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], path: Path) -> None:
    """Refuse a config with more layers, experts or labels, or larger sizes, than its weights could have.

    Args:
        tensors: of all weight files; none where the weights will be drawn.
        path: of the config, as errors name it.

    Raises:
        InputError: names the key and the bound; or there are too many values.
    """
    values = _count(config)
    if values > _MOST_VALUES:
        raise InputError(
            f"the config holds {values} values",
            where=str(path),
            why=f"{_MOST_VALUES} are allowed",
            remedy="take out what no model reads, such as labels",
        )
    largest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    stacked = max((tensor.shape[0] for tensor in tensors.values() if len(tensor.shape) == 3), default=0)
    layers = len(tensors) or _MOST_LAYERS
    experts = max(stacked, len(tensors)) or _MOST_EXPERTS
    sizes = max(_PACKED * largest, _SMALL) if tensors else _MOST
    for key, value in _integers(config):
        name = key.rpartition(".")[2]
        if _LAYERS.search(name):
            most, why = layers, f"the weights have {len(tensors)} tensors"
        elif _EXPERTS.search(name):
            most, why = experts, f"the weights have {len(tensors)} tensors, and at most {stacked} stacked in one"
        elif name == "num_labels":  # transformers makes two dictionaries of as many
            most, why = max(largest, _SMALL), f"no tensor of the weights has an axis of more than {largest}"
        elif _SIZES.search(name) and "max_position" not in name:
            most, why = sizes, f"no tensor of the weights has an axis of more than {largest}"
        else:
            continue
        if value > most:
            raise InputError(
                f"the config's {shown(key)} is {value if value < 1 << 64 else 'beyond 64 bits'}",
                where=str(path),
                why=why if tensors else f"{most} are allowed",
                remedy="check that config.json and the weights belong together",
            )


def _count(tree: Any) -> int:
    """Values of a tree, those inside of others as well."""
    found, level = 0, [tree]
    while level:
        found += len(level)
        level = [inner for item in level for inner in _inside(item)]
    return found


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list) else ()


def _integers(tree: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, int]]:
    """Dotted key -> value of every integer, and of every number that stands for one."""
    if depth > _DEEPEST:
        return
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _integers(value, f"{prefix}{key}.", depth + 1)
        elif isinstance(value, int | float) and not isinstance(value, bool) and value > _SMALL // 64:
            yield f"{prefix}{key}", int(min(value, 1 << 64))
