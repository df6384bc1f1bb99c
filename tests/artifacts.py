"""A small artifact without an engine, for tests of what is around the engine.

Only what compiles imports torch: processes that are killed at every step write a small artifact, and a fork of a large
process costs 50 ms.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optc.compiler.artifact.folder import finish, write_folder
from optc.compiler.artifact.manifest import (
    DriftRecord,
    FileEntry,
    Manifest,
    PassRecord,
    ProgramEntry,
    Source,
)
from optc.compiler.ir.contract import AttentionFacts, Contract, Input, Output, WeightQuantization

if TYPE_CHECKING:
    from optc.compiler.ir.program import Program

FILES = {"model.onnx": b"graph" * 100, "model.onnx.data": bytes(range(256)) * 40, "ir/00-capture.txt": b"%0"}


def make_manifest(**changes: Any) -> Manifest:
    """A manifest with some of its fields, or of its model's (contract, engine_info), replaced."""
    record = PassRecord(
        name="quantize-rtn",
        options={"bits": 4, "ignore": ["lm_head"], "scale": 1.0, "group_size": None},
        matched=32,
        candidates=33,
        seconds=0.5,
        lossy=True,
        drift=DriftRecord(max_abs_diff=0.25, kl=1e-9),
        since_capture=DriftRecord(max_abs_diff=0.5, kl=2e-9),
        layer_drift=(0.1, 1 / 3),
        nodes=200,
        notes=("group size 64",),
        misses=("lm_head: ignored",),
    )
    contract = Contract(
        kind="decoder",
        inputs=(Input(name="input_ids", role="input_ids", dtype="int64", dims=("batch", 7)),),
        outputs=(Output(name="logits", role="logits"),),
        layers=(AttentionFacts(num_heads=4, num_kv_heads=2, head_dim=8, value_dim=8, scale=0.5, causal=True),),
        quantization={"w": WeightQuantization(method="rtn", bits=4, group_size=64, symmetric=False, source="w")},
    )
    fields: dict[str, Any] = {
        "optc_version": "0.1.0",
        "created": "2026-01-01T00:00:00+00:00",
        "target": "onnx-cpu",
        "engine": "onnx",
        "device": "cpu",
        "needs": {"machine": "x86_64", "isa": ["avx2", "fma"], "opset": 24},
        "dtype": "float32",
        "passes": (record,),
        "weight_bytes": 10,
        "quantization": {"method": "rtn", "bits": [4], "group_size": [64], "symmetric": False, "linears": 1},
        "source": Source(path="/m", config_sha256="", weights_sha256="", parameters=3, dtype="bfloat16"),
        "files": (FileEntry(path="ir/00-capture.txt", size=3, sha256="a" * 64),),
        "seconds": {"total": 1.5},
    }
    info = {"model": "model.onnx", "shape": [1, 2.5], "nested": {"ü": None}}
    program = {"contract": contract, "engine_info": info}
    program |= {name: changes.pop(name) for name in tuple(program) if name in changes}
    return Manifest(**{**fields, "programs": {"model": ProgramEntry(**program)}, **changes})


def make_artifact(folder: Path, *, force: bool = False, **changes: Any) -> Manifest:
    """Write an artifact of `FILES`."""
    with write_folder(folder, force=force) as directory:
        for name, data in FILES.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(data)
        return finish(directory, make_manifest(**changes))


@functools.cache
def captured_folder(model: Path) -> Program:
    """The stage-0 Program of a model folder; treat it as read-only."""
    from optc.compiler.capture import capture_pretrained

    return capture_pretrained(model)[0]


def quick_artifact(target: str, program: Program, folder: Path, *, source: Path | None = None, **options: Any) -> Path:
    """What `optc.compile` writes, without its gate: for tests that compare the numbers themselves."""
    from chosen import chosen

    from optc.compiler.rewriting.passes import PassContext
    from optc.compiler.target.target import ExportRequest, check_legal, obstacle
    from optc.targets import find_target

    found, made = find_target(target), chosen(target, **options)
    for step in found.recipe(program.contract.kind, made):
        if step.applies(program):
            program = step.rewrite.run(program, PassContext(obstacle=functools.partial(obstacle, found.legal))).program
    check_legal(program, found)
    with write_folder(folder, force=False) as directory:
        result = found.export(program, ExportRequest(directory=directory, options=made.own, source=source))
        needs = {"machine": platform.machine(), **result.needs}
        finish(
            directory,
            make_manifest(
                target=found.name,
                engine=result.engine.name,
                engine_info=result.info,
                needs=needs,
                passes=(),
                contract=program.contract,
                weight_bytes=result.weight_bytes,
                quantization={},
                files=(),
            ),
        )
    return folder
