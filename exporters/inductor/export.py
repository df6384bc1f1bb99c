"""Write a legalized Program as model.pt2 with model.safetensors beside it, load it and run it once."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from optc.compiler import compat
from optc.compiler.artifact.engines import AOTINDUCTOR
from optc.compiler.artifact.manifest import ProgramEntry
from optc.compiler.diagnostics import TargetError, os_errors
from optc.compiler.formats.safetensors_header import read_header
from optc.compiler.ir.asserts import ASSERTS
from optc.compiler.ir.contract import Contract
from optc.compiler.ir.program import Program
from optc.compiler.ir.saved.tensors import write_tensors
from optc.compiler.ir.surgery import drop_dead
from optc.compiler.kernels.cpu.library import FILE_NAME, build_library
from optc.compiler.kernels.cpu.toolchain import InstructionSet, check_space, find_compiler, instruction_set
from optc.compiler.kernels.kernel import Kernel, needs_of, used_kernels
from optc.compiler.target.target import ExportRequest, ExportResult
from optc.compiler.version import version_of
from optc.exporters.companions import copy_companions
from optc.exporters.inductor.selfcheck import check_package
from optc.exporters.options.inductor import InductorOptions

MODEL, ENCODER = "model.pt2", "encoder.pt2"


def runner_name(contract: Contract) -> str:
    """The file that runs a package without optc: a decoder generates, all else is run on inputs."""
    return "generate.py" if contract.kind == "decoder" and contract.kv_cache.kind != "none" else "run.py"


def export_inductor(program: Program, request: ExportRequest) -> ExportResult:
    """Write the last stage for AOTInductor.

    Files: `model.pt2` (native code without weights), `model.safetensors` (weights under their names),
    `liboptc_ops.so` when the program uses an op of the library, `generate.py` or `run.py` (a runner that needs torch
    and safetensors alone) and the model's tokenizer and config. The package is loaded through that
    runner and compared with the program before anything is published.

    Raises:
        TargetError: no C++ compiler, or it fails.
        GateError: the package computes other numbers than the program.
        ResourceError, InputError: the disk is full or not writable.
    """
    directory = request.directory
    find_compiler()
    program = _contiguous(program.in_memory())
    instructions = instruction_set()
    kernels = used_kernels(program, "cpu")
    library = _add_library(kernels, directory)
    package = write_package(program, request, MODEL, library, instructions)
    with os_errors("writing the runner", str(directory)):
        runner = resources.files("optc.runtime.carried") / "pt2_runner.py"
        (directory / runner_name(program.contract)).write_bytes(runner.read_bytes())
    companions = copy_companions(request.source, directory)
    info = {**package.info, "runner": runner_name(program.contract), "companions": companions}
    needs = _needs(instructions, kernels)
    opened = check_package(program, info, needs, request)
    if not request.runner:
        (directory / info["runner"]).unlink()
        info["runner"] = None
    return ExportResult(
        engine=AOTINDUCTOR,
        info=info,
        needs=needs,
        opened=opened,
        weight_bytes=package.weight_bytes,
        tensor_bytes=package.tensor_bytes,
    )


def export_encoder_decoder(encoder: Program, decoder: Program, request: ExportRequest) -> ExportResult:
    """Write the last stages of a model of two programs: `encoder.pt2` and `model.pt2`, each with its weights beside it.

    The encoder's package makes keys and values of cross-attention too, once per request. There is no runner beside them.

    Raises:
        TargetError, ResourceError, InputError: as `export_inductor`.
    """
    find_compiler()
    instructions, companions = instruction_set(), copy_companions(request.source, request.directory)
    programs = {ENCODER: _contiguous(encoder.in_memory()), MODEL: _contiguous(decoder.in_memory())}
    kernels = list(dict.fromkeys(item for program in programs.values() for item in used_kernels(program, "cpu")))
    library = _add_library(kernels, request.directory)
    written = {name: write_package(item, request, name, library, instructions) for name, item in programs.items()}
    infos = {name: {**item.info, "runner": None, "companions": companions} for name, item in written.items()}
    return ExportResult(
        engine=AOTINDUCTOR,
        info=infos[MODEL],
        needs=_needs(instructions, kernels),
        weight_bytes=sum(item.weight_bytes for item in written.values()),
        tensor_bytes={**written[ENCODER].tensor_bytes, **written[MODEL].tensor_bytes},
        encoder=ProgramEntry(contract=encoder.contract, engine_info=infos[ENCODER]),
        graphs=tuple((infos[name], program) for name, program in programs.items()),
    )


@dataclass(frozen=True)
class WrittenPackage:
    """A package and its weights on the disk, and what the manifest says of them."""

    info: dict[str, Any]
    weight_bytes: int
    tensor_bytes: dict[str, int]


def write_package(
    program: Program, request: ExportRequest, name: str, library: str | None, instructions: InstructionSet
) -> WrittenPackage:
    """Compile a program, contiguous and in memory, into `name`, and write its weights beside it.

    Raises:
        TargetError, ResourceError, InputError: as `export_inductor`.
    """
    path, weights = request.directory / name, Path(name).with_suffix(".safetensors").name
    _compile(program, path, instructions)
    constants = _constants(program, path)
    with os_errors("writing the weights", str(request.directory / weights)):
        write_tensors(request.directory / weights, constants)
    return WrittenPackage(
        info={"model": name, "weights": weights, **_info(program, request, library, constants)},
        weight_bytes=sum(tensor.nbytes for tensor in constants.values()),
        tensor_bytes={key: item.nbytes for key, item in read_header(request.directory / weights).items()},
    )


def _contiguous(program: Program) -> Program:
    """The program with every weight contiguous, as a file holds it: packages assume the strides they saw."""
    odd = [name for name, tensor in program.weights() if not tensor.is_contiguous()]
    if not odd:
        return program
    edited = program.clone()
    names = edited.weight_names()
    for table in (edited.exported.state_dict, edited.exported.constants):
        table.update({name: _like(table[name].contiguous(), table[name]) for name in odd if name in table})
    for node in edited.graph.nodes:
        if names.get(node.name) in odd:
            node.meta["val"] = node.meta["val"].contiguous()
    return edited.changed()


def _like(value: torch.Tensor, old: object) -> torch.Tensor:
    """A tensor as the Parameter that it stands in for, or as it is."""
    return torch.nn.Parameter(value, requires_grad=False) if isinstance(old, torch.nn.Parameter) else value


def _add_library(kernels: Sequence[Kernel], directory: Path) -> str | None:
    """Put the op library of the kernels that the graph calls beside the package; its file name, None without any."""
    if not kernels:
        return None
    source = build_library(kernels)
    with os_errors("copying the op library", str(directory)):
        shutil.copyfile(source, directory / FILE_NAME)
    return FILE_NAME


def _compile(program: Program, path: Path, instructions: InstructionSet) -> None:
    configs: dict[str, Any] = {"aot_inductor.package_constants_in_so": False, "compile_threads": 1}
    if instructions.march:
        configs["cpp.march"] = instructions.march
    try:
        with warnings.catch_warnings(), torch.no_grad(), os_errors("compiling the package", str(path)):
            warnings.simplefilter("ignore")
            package = compat.aoti_compile(_without_asserts(program).exported, configs)
    except (*compat.aoti_errors(), *compat.aoti_limits()) as error:
        raise _compile_error(error, path) from error
    with os_errors("writing the package", str(path)):
        path.write_bytes(package)


def _compile_error(error: Exception, path: Path) -> TargetError:
    """What a failed compilation is to a user: a C++ compiler that fails, or a graph that Inductor does not take."""
    inner = getattr(error, "inner_exception", error)
    check_space(str(inner))
    if isinstance(inner, compat.aoti_errors()):
        return TargetError(
            "AOTInductor's C++ compiler failed",
            where=str(path),
            why=_first_error(str(inner)),
            remedy="use g++ 12 or newer; name it in $CXX",
        )
    return TargetError(
        "AOTInductor cannot compile the program",
        where=str(path),
        why=f"{type(inner).__name__}: {(str(inner).strip().splitlines() or ['no message'])[0][:300]}",
        remedy="choose --target onnx-cpu, or another release of torch",
    )


def _without_asserts(program: Program) -> Program:
    """The program without asserts on types: they repeat what its own tracing saw, and Inductor types some values anew."""
    if not program.calls(*ASSERTS):
        return program
    edited = program.clone()
    drop_dead(edited)
    return edited.changed()


def _first_error(text: str) -> str:
    lines = [line for line in text.splitlines() if "error" in line] or text.splitlines()
    return (lines or ["no output"])[0][:300]


def _constants(program: Program, path: Path) -> dict[str, torch.Tensor]:
    """The tensors that the package asks for by name. Inductor inlines tiny ones."""
    weights, found = dict(program.weights()), {}
    for name in sorted(compat.aoti_constant_names(str(path))):
        assert name in weights, f"{name} is not a weight of the program"
        found[name] = weights[name]
    return found


def _info(
    program: Program,
    request: ExportRequest,
    library: str | None,
    constants: dict[str, torch.Tensor],
) -> dict[str, Any]:
    """What the runner needs to know; everything it checks before native code runs."""
    contract = program.contract
    limits = [size for size in (contract.model.context_length, request.of(InductorOptions).max_seq_len) if size]
    return {
        "library": library,
        "kind": contract.kind,
        "kv_cache": contract.kv_cache.kind,
        "block_size": contract.kv_cache.block_size,
        "vocab_size": contract.model.vocab_size,
        "context_length": min(limits, default=0),
        "eos_token_ids": list(contract.model.eos_token_ids),
        "inputs": [
            {"name": spec.name, "role": spec.role, "dtype": spec.dtype, "dims": list(spec.dims)}
            for spec in contract.inputs
        ],
        "outputs": [spec.name for spec in contract.outputs],
        "constants": {
            name: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
            for name, tensor in constants.items()
        },
    }


def _needs(instructions: InstructionSet, kernels: Sequence[Kernel]) -> dict[str, Any]:
    """What a host must have: for the package itself, and for the kernels beside it."""
    needs = needs_of(kernels, version_of)
    flags = sorted({*instructions.flags, *needs.pop("cpu_flags", ())})
    return {"torch": ".".join(torch.__version__.split(".")[:2]), **needs, "cpu_flags": flags}
