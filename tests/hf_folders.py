"""Model folders of tiny families, and quantized ones written from their Programs."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from families import make_model
from safetensors import safe_open
from stages import apply, captured
from torch import Tensor

from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import Pass
from optc.compiler.target.target import ExportRequest, ExportResult
from optc.exporters.hf import FolderOptions, export_hf
from optc.passes.quantization.activations import QuantizeActivations
from optc.passes.quantization.fp8 import QuantizeFp8
from optc.passes.quantization.round_scales import RoundScales
from optc.passes.quantization.rtn import QuantizeRtn

RECIPES: dict[str, tuple[Pass, ...]] = {
    "int4": (QuantizeRtn(group_size=32),),
    "int4-asym": (QuantizeRtn(group_size=32, symmetric=False),),
    "int4-channel": (QuantizeRtn(group_size=0, symmetric=False),),
    "int8": (QuantizeRtn(bits=8, group_size=0),),
    "w8a8": (QuantizeRtn(bits=8, group_size=0), QuantizeActivations()),
    "fp8": (QuantizeFp8(), QuantizeActivations(format="fp8")),
    "fp8-weights": (QuantizeFp8(),),
    "none": (),
}


def source(name: str, layers: int = 2) -> Path:
    """The folder of a tiny family as transformers saves it; read-only."""
    return _source(name, layers)


@functools.cache
def _source(name: str, layers: int) -> Path:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make_model(name, layers=layers).save_pretrained(folder)
    return folder


@functools.cache
def quantized(name: str, recipe: str, half: bool = False) -> Program:
    """The Program of a tiny family after a recipe; with `half` its scales are float16 numbers. Read-only."""
    program = captured(name)
    for rewrite in RECIPES[recipe] + ((RoundScales(),) if half else ()):
        program = apply(rewrite, program).program
    return program


def write(program: Program, folder: Path | None, out: Path, layout: str | None = None) -> ExportResult:
    """Export into a new folder."""
    out.mkdir(exist_ok=True)
    return export_hf(program, ExportRequest(directory=out, options=FolderOptions(layout=layout), source=folder))


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's weight files."""
    out: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            out |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return out


def config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def codes_of(program: Program) -> dict[str, Tensor]:
    """Codes, scales and zero points of a Program by name."""
    names = [name for name, _ in program.weights() if name.endswith(("_codes", "_scale", "_zero"))]
    return {name: program.weight(name).detach() for name in names}


def logits(program: Program, ids: Tensor) -> Tensor:
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    out = program(ids, positions)
    return out[0] if isinstance(out, tuple | list) else out


def rename_token(path: Path, number: int) -> None:
    """Let an id of a `tokenizer.json` mean the token "changed"."""
    found = json.loads(path.read_text())
    model = found["model"]
    (old,) = [token for token, place in model["vocab"].items() if place == number]
    model["vocab"] = {("changed" if token == old else token): place for token, place in model["vocab"].items()}
    model["merges"] = [pair for pair in model["merges"] if old not in (*pair, "".join(pair))]
    path.write_text(json.dumps(found))
