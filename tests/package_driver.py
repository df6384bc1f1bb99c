"""Compiles Programs to AOTInductor packages and drives them in plain tensors, without optc's sessions."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from chosen import chosen
from families import make_model
from once import once
from stages import captured
from torch import Tensor

from optc.compiler.artifact.folder import finish
from optc.compiler.artifact.manifest import Manifest, ProgramEntry, Source
from optc.compiler.capture import capture_model
from optc.compiler.execution.stage_driver import run_stage
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import PassContext
from optc.compiler.target.target import ExportRequest, ExportResult, check_legal
from optc.compiler.version import version
from optc.runtime.carried.pt2_runner import Package
from optc.targets.inductor_cpu import TARGET


@dataclass(frozen=True)
class Built:
    """A package on disk and the Program that it was made from."""

    folder: Path
    program: Program
    result: ExportResult

    def load(self, **options: Any) -> Package:
        return Package(self.folder, self.result.info, self.result.needs, **options)


def build(program: Program, folder: Path, **options: Any) -> Built:
    """Run the target's recipe without the gate (numbers are compared in the tests) and export."""
    made = chosen(TARGET.name, **options)
    for step in TARGET.recipe(program.contract.kind, made):
        program = step.rewrite.run(program, PassContext()).program
    check_legal(program, TARGET)
    folder.mkdir()
    return Built(folder, program, TARGET.export(program, ExportRequest(directory=folder, options=made.own)))


def _describe(built: Built) -> None:
    """Write the manifest that makes the folder an artifact."""
    program = ProgramEntry(contract=built.program.contract, engine_info=built.result.info)
    manifest = Manifest(
        optc_version=version(),
        created="2026-01-01T00:00:00+00:00",
        target=TARGET.name,
        engine="aotinductor",
        device="cpu",
        needs=built.result.needs,
        dtype="float32",
        programs={"model": program},
        passes=(),
        weight_bytes=built.result.weight_bytes,
        quantization={},
        source=Source(path="", config_sha256="", weights_sha256="", parameters=0, dtype=""),
        seconds={},
    )
    finish(built.folder, manifest)


def drive(package: Package, program: Program, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits [len, V] of every row: ragged prefill, a chunk, single steps, over caches full of garbage."""
    return run_stage(program, rows, engine=package).logits


VARIANTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "gemma2-static": ("gemma2", 2, {}),  # a layer with a window and one without, softcap, grouped heads
    "gpt2-static": ("gpt2", 1, {"max_seq_len": 200}),  # torch's fused attention, learned positions, biases
    "gemma2-paged": ("gemma2", 1, {"kv_cache": "paged"}),  # the window; several layers: tests/runtime/sessions
    "llama-int4": ("llama", 1, {"dtype": "bf16", "quant": "rtn", "group_size": 32}),
    "gpt2-int3": ("gpt2", 1, {"quant": "rtn", "bits": 3, "group_size": 32, "accuracy_level": 0}),
}
"""Family, layers and options: as few layers as show what the variant is for, as each takes a quarter of the compile."""


def model_of(name: str) -> Any:
    """The model of a variant, in float32."""
    family, layers, _ = VARIANTS[name]
    return make_model(family, layers=layers)


@functools.cache
def packaged(name: str) -> Built:
    """A variant, compiled once per run of the tests (10 to 30 s)."""
    place = once(f"package-{name}", functools.partial(_package, name))
    return Built(place / "package", Program.load(place / "program"), pickle.loads((place / "result").read_bytes()))


def _package(name: str, place: Path) -> None:
    family, layers, options = VARIANTS[name]
    program = captured(family, layers)
    if options.get("dtype") == "bf16":
        program = capture_model(model_of(name).to(torch.bfloat16))
    built = build(program, place / "package", **options)
    (place / "program").mkdir()
    built.program.save(place / "program")
    _describe(built)
    (place / "result").write_bytes(pickle.dumps(built.result))
