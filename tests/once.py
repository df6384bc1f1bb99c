"""What takes long to make and several files need: made once per run of the tests, by whichever worker comes first."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import EXAMPLE
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.export import ExportedProgram

import optc
from optc.compiler import compat

_PLACE: list[Path] = []


def set_place(folder: Path) -> None:
    """Where this run's things are kept, the same for all workers."""
    _PLACE[:] = [folder]


def once(name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make(folder)` filled, by the first caller of this name; read-only."""
    place = _PLACE[0] / name
    done = place.with_name(f"{name}.done")
    with open(place.with_name(f"{name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(place, ignore_errors=True)  # left by a maker that failed
            place.mkdir()
            make(place)
            done.touch()
    return place


def example_artifact(target: str, **options: Any) -> Path:
    """The example model, compiled as `optc compile` does; read-only: what edits it takes a copy."""
    name = "-".join(["example", target, *(f"{key}={value}" for key, value in sorted(options.items()))])
    make = functools.partial(_compile, EXAMPLE, target=target, **options)
    return once(name, make) / "artifact"


def short_example(layers: int = 2) -> Path:
    """The first layers of the example model, with its tokenizer: native code for it takes less time to compile, and what
    it says is not text. A model folder, read-only."""
    return once(f"short-{layers}", functools.partial(_shorten, layers=layers)) / "model"


def short_artifact(target: str, **options: Any) -> Path:
    """`short_example`, compiled as `optc compile` does; read-only."""
    name = "-".join(["short", target, *(f"{key}={value}" for key, value in sorted(options.items()))])
    make = functools.partial(_compile, short_example(), target=target, **options)
    return once(name, make) / "artifact"


def _compile(model: Path, folder: Path, **options: Any) -> None:
    optc.compile(model, output=folder / "artifact", **options)


def _shorten(folder: Path, layers: int) -> None:
    made = Path(shutil.copytree(EXAMPLE, folder / "model", copy_function=shutil.copyfile))
    config = json.loads((made / "config.json").read_text())
    config["num_hidden_layers"] = layers
    (made / "config.json").write_text(json.dumps(config))
    left = tuple(f"model.layers.{layer}." for layer in range(layers))
    tensors = load_file(made / "model.safetensors")
    kept = {name: item for name, item in tensors.items() if ".layers." not in name or name.startswith(left)}
    save_file(kept, made / "model.safetensors", metadata={"format": "pt"})


def packages_of_equal_graphs_once(patch: pytest.MonkeyPatch) -> list[str]:
    """While the patch holds, AOTInductor compiles equal graphs once: code follows from the graph, the options and the few
    numbers that Inductor writes into it. The list grows by what each package was compiled for."""
    compiled, kept, asked = compat.aoti_compile, dict[str, bytes](), list[str]()

    def compile_once(exported: ExportedProgram, configs: dict[str, Any]) -> bytes:
        graph = exported.graph_module.print_readable(print_output=False, include_stride=True)
        tensors = sorted({**exported.state_dict, **exported.constants}.items())
        small = [(name, item.tolist()) for name, item in tensors if isinstance(item, Tensor) and item.numel() <= 64]
        told = repr((graph, exported.graph_signature, exported.range_constraints, small, configs))
        key = hashlib.sha256(told.encode()).hexdigest()
        if key not in kept:
            kept[key] = compiled(exported, configs)
        asked.append(key)
        return kept[key]

    patch.setattr(compat, "aoti_compile", compile_once)
    return asked
