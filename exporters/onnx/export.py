"""Write a legalized Program as model.onnx with its weights beside it, and read it back."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import onnx_ir as ir
import torch
from torch.fx import Node

from optc.compiler.analysis.dataflow import value_of
from optc.compiler.artifact.engines import ONNX, ONNX_CUDA, Engine
from optc.compiler.artifact.genai_config import FILE_NAME
from optc.compiler.artifact.onnx_check import check_onnx
from optc.compiler.diagnostics import TargetError, os_errors
from optc.compiler.ir.contract import CACHE_ROLES, Contract
from optc.compiler.ir.lazy_weights import materialized
from optc.compiler.ir.program import Program
from optc.compiler.target.target import ExportRequest, ExportResult
from optc.compiler.version import version_of
from optc.exporters.companions import copy_companions
from optc.exporters.onnx.external_data import compare_data, write_data
from optc.exporters.onnx.genai import differing_layers, genai_config
from optc.exporters.onnx.table import LOWERINGS
from optc.exporters.onnx.walker import OPSET, Walker

MODEL, DATA = "model.onnx", "model.onnx.data"


CUDA_NEEDS = {"onnxruntime-gpu": ">=1.31", "cuda_driver": ">=12.0"}
"""Of a host: the release whose CUDA provider was seen to run these graphs. Its builds are for CUDA 12 or 13."""


def export_onnx(program: Program, request: ExportRequest) -> ExportResult:
    """Write the last stage for ONNX Runtime on the CPU: `model.onnx`, `model.onnx.data` and companions.

    Decoders with a linear KV cache also get `genai_config.json`, where it can say what their layers are. Every weight is
    read back and compared with the program's.

    Raises:
        ArtifactError: what was read back is not what was written.
        ResourceError, InputError: the disk is full or not writable.
    """
    return _export(program, request, ONNX, onnx_needs(program))


def export_onnx_cuda(program: Program, request: ExportRequest) -> ExportResult:
    """The same for ONNX Runtime's CUDA provider.

    Raises:
        TargetError: the program was captured in fp32. ArtifactError, ResourceError, InputError: as `export_onnx`.
    """
    wide = [spec.name for spec in program.contract.inputs if spec.role in CACHE_ROLES and spec.dtype == "float32"]
    if wide:
        raise TargetError(
            "ONNX Runtime's CUDA provider has no GroupQueryAttention in fp32",
            where=wide[0],
            why="the program was captured in fp32",
            remedy="capture the model in torch.float16 or torch.bfloat16, or compile its folder with --dtype fp16 or bf16",
        )
    return _export(program, request, ONNX_CUDA, dict(CUDA_NEEDS))


def _export(program: Program, request: ExportRequest, engine: Engine, needs: dict[str, Any]) -> ExportResult:
    directory, contract = request.directory, program.contract
    model = Walker(program, LOWERINGS).run()
    histogram = collections.Counter(node.op_type for node in model.graph)
    sizes = write_model(model, directory)
    companions = copy_companions(request.source, directory)
    decoder = contract.kind == "decoder" and contract.kv_cache.kind == "linear"
    differing = differing_layers(contract) if decoder else ""
    if decoder and not differing:
        config = (
            msgspec.json.format(msgspec.json.encode(genai_config(contract, MODEL, cuda=engine is ONNX_CUDA)), indent=2)
            + b"\n"
        )
        with os_errors(f"writing {FILE_NAME}", str(directory)):
            (directory / FILE_NAME).write_bytes(config)
    return ExportResult(
        engine=engine,
        info={
            **graph_info(MODEL, DATA, contract, histogram),
            "companions": companions,
            "genai": decoder and not differing,
            "notes": [f"no {FILE_NAME}, which onnxruntime-genai needs: {differing}"] if differing else [],
        },
        needs=needs,
        weight_bytes=sum(sizes.values()),
        tensor_bytes=sizes,
    )


def write_model(model: ir.Model, directory: Path) -> dict[str, int]:
    """Write `model.onnx` and `model.onnx.data` and compare every weight on disk; bytes of each weight, by name.

    Raises:
        ArtifactError: what was read back is not what was written.
        ResourceError, InputError: the disk is full or not writable.
    """
    return write_models({MODEL: model}, directory)


def write_models(models: Mapping[str, ir.Model], directory: Path) -> dict[str, int]:
    """Write models by file name, their weights in one file beside them, called as the first is and `.data`.

    Raises:
        ArtifactError, ResourceError, InputError: as `write_model`.
    """
    data = directory / f"{next(iter(models))}.data"
    with os_errors("writing the ONNX model", str(data)):
        digests = write_data(list(models.values()), data)
        for name, model in models.items():
            ir.save(model, directory / name)
    sizes: dict[str, int] = {}
    for name, expected in zip(models, digests, strict=True):
        check_onnx(directory, name)
        sizes |= compare_data(directory / name, expected)
    return sizes


def onnx_needs(program: Program) -> dict[str, Any]:
    """What the host must have; the product of unsigned codes and signed weights saturates without VNNI on x86."""
    version = version_of(ONNX.package)  # "" where the model is only written here
    needs: dict[str, Any] = {ONNX.package: f">={version}"} if version else {}
    products = program.calls(torch.ops.optc.matmul_integer.default)
    static = program.calls(torch.ops.optc.dequantize_channels.default)
    if any(value_of(call.args[1]).dtype is torch.int8 for call in products) or any(
        _saturates(program, call) for call in static
    ):
        needs["x86_flags_any"] = ["avx512_vnni", "avx_vnni"]
    return needs


def _saturates(program: Program, call: Node) -> bool:
    """Whether two products of a weight's codes with 255 may be beyond 16 bits, in which x86 without VNNI adds them."""
    name = program.weight_of(call.args[0])
    assert name is not None, "codes are weights"
    return int(materialized(program.weight(name).detach()).to(torch.int16).abs().max()) * 2 * 255 >= 1 << 15


def graph_info(name: str, data: str, contract: Contract, histogram: Mapping[str, int]) -> dict[str, Any]:
    """What the manifest says of one graph."""
    return {
        "model": name,
        "data": data,
        "opset": OPSET,
        "inputs": [spec.name for spec in contract.inputs],
        "outputs": [spec.name for spec in contract.outputs],
        "operators": dict(sorted(histogram.items())),
    }
