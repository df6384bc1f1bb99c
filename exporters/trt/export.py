"""Write a legalized Program as model.onnx, engine.json and what builds and runs a plan; build the plan."""

from __future__ import annotations

import collections
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx

from optc.compiler.artifact.engines import TENSORRT
from optc.compiler.diagnostics import OptcError, ResourceError, TargetError, os_errors
from optc.compiler.ir.contract import Contract
from optc.compiler.ir.program import Program
from optc.compiler.ir.verification import VerificationError
from optc.compiler.target.target import ExportRequest, ExportResult, check_lowered
from optc.exporters.companions import copy_companions
from optc.exporters.onnx.export import DATA, MODEL, write_model
from optc.exporters.onnx.walker import Walker
from optc.exporters.options.trt import TrtOptions
from optc.exporters.trt.builders import PORTABLE, Choice, choose
from optc.exporters.trt.companions import write_companions
from optc.exporters.trt.facts import engine_facts
from optc.exporters.trt.table import OP_SETS

ENGINE, BUILDER = "engine.json", "build_plan.py"
_SCRIPT = Path(__file__).with_name(BUILDER)


def export_trt(program: Program, request: ExportRequest) -> ExportResult:
    """Write the last stage for TensorRT; the builder runs in a process of its own.

    Raises:
        TargetError: no builder for it here, an operator that the op set lacks, layers of different shapes, or
            TensorRT refuses the model.
        VerificationError: TensorRT's parser read another network than was written.
        ArtifactError: what was read back is not what was written.
        ResourceError, InputError: out of memory; the disk is full or not writable.
    """
    options = request.of(TrtOptions)
    directory, contract, choice = request.directory, program.contract, choose(options)
    _check_uniform(contract)
    ops = OP_SETS[choice.ops]
    check_lowered(program, ops.legal, f"the op set '{ops.name}'")
    walker = Walker(program, ops.table, opset=ops.opset, ir_version=ops.ir_version, microsoft=False)
    model = walker.run()
    histogram = collections.Counter(node.op_type for node in model.graph)
    sizes = write_model(model, directory)
    del model, walker
    onnx.checker.check_model(str(directory / MODEL))  # no operator or attribute newer than the opset
    facts = engine_facts(program, options, choice)
    companions = [*copy_companions(request.source, directory), *write_companions(directory, facts), BUILDER]
    with os_errors("writing the files of the plan", str(directory)):
        (directory / ENGINE).write_text(json.dumps(facts, indent=2) + "\n")
        shutil.copyfile(_SCRIPT, directory / BUILDER)
    built = {} if choice.runtime == "none" else build_plan(directory, choice)
    return ExportResult(
        engine=TENSORRT,
        info={
            "model": MODEL,
            "data": DATA,
            "engine": ENGINE,
            "ops": ops.name,
            "opset": ops.opset,
            "plan": None,
            **built,
            "profiles": facts["profiles"],
            "capacity": contract.kv_cache.capacity,
            "operators": dict(sorted(histogram.items())),
            "inputs": [spec.name for spec in contract.inputs],
            "outputs": [spec.name for spec in contract.outputs],
            "companions": companions,
        },
        needs=_needs(choice, built),
        weight_bytes=(directory / DATA).stat().st_size,
        tensor_bytes=sizes,
    )


def build_plan(directory: Path, choice: Choice) -> dict[str, Any]:
    """Run build_plan.py on a folder; what it says of the plan.

    Raises:
        OptcError: as its exit code says.
    """
    command = [sys.executable, "-I", BUILDER, ".", "--json", "--runtime", choice.runtime]
    if choice.architectures:
        command += ["--arch", ",".join(choice.architectures)]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        built: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return built
    if done.returncode < 0:
        raise ResourceError(
            f"TensorRT's builder was ended by signal {-done.returncode}",
            why=done.stderr.strip()[-1000:] or None,
            remedy="signal 9 usually means that the system ran out of memory: use a smaller model or a larger machine",
        )
    raise _error(done.stdout, done.stderr)


def _error(output: str, errors: str) -> OptcError:
    """What a builder that failed reported."""
    try:
        said = json.loads(output.splitlines()[-1])
        what, why, remedy, code = said["error"], said["why"] or None, said["remedy"] or None, said["code"]
    except (ValueError, KeyError, IndexError):
        what, why, remedy, code = "TensorRT's builder failed", errors.strip()[-2000:], None, 1
    kind = {4: TargetError, 7: VerificationError, 8: ResourceError}.get(code, TargetError)
    return kind(what, where=MODEL, why=why, remedy=remedy or "report a bug with --dump-ir")


def _needs(choice: Choice, built: dict[str, Any]) -> dict[str, Any]:
    """A plan runs in the TensorRT that built it; RTX's on the architectures that it was built for."""
    if not built:
        return {"tensorrt": ">=10.15, or TensorRT for RTX" if choice.ops == "fused" else ">=8.6"}
    needs: dict[str, Any] = {built["runtime"]: f"=={built['runtime_version']}"}
    if choice.runtime == "rtx":
        needs["compute_capabilities"] = list(choice.architectures) or [PORTABLE]
    return needs


def _check_uniform(contract: Contract) -> None:
    """engine.json names one shape of cache for all layers."""
    shapes = {(layer.num_kv_heads, layer.head_dim, layer.value_dim) for layer in contract.layers}
    if len(shapes) > 1 or any(size != value for _, size, value in shapes):
        raise TargetError(
            "layers with different KV heads or head sizes are not written for TensorRT",
            where=", ".join(map(str, sorted(shapes))),
            remedy="choose --target onnx-cpu or inductor-cpu",
        )
