"""Write encoder and decoder as the three ONNX files that optimum's ORTModelForSeq2SeqLM loads.

`encoder_model.onnx` makes the states, `decoder_model.onnx` is the first call, which makes keys and values of
cross-attention of them, `decoder_with_past_model.onnx` every later one. The two of the decoder share their weights.
"""

from __future__ import annotations

import collections
from typing import Any

import onnx_ir as ir

from optc.compiler.artifact.engines import ONNX
from optc.compiler.artifact.manifest import ProgramEntry
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.encoder_decoder import first_call, states_alone
from optc.compiler.target.target import ExportRequest, ExportResult
from optc.exporters.companions import copy_companions
from optc.exporters.onnx.export import graph_info, onnx_needs, write_models
from optc.exporters.onnx.table import LOWERINGS
from optc.exporters.onnx.walker import Walker

ENCODER, FIRST, LATER = "encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"


def export_encoder_decoder(encoder: Program, decoder: Program, request: ExportRequest) -> ExportResult:
    """Write the last stages of both for ONNX Runtime.

    Raises:
        ArtifactError: what was read back is not what was written.
        ResourceError, InputError: the disk is full or not writable.
    """
    graphs = {ENCODER: states_alone(encoder), FIRST: first_call(encoder, decoder), LATER: decoder}
    models = {name: Walker(program, LOWERINGS).run() for name, program in graphs.items()}
    sizes = write_models({ENCODER: models[ENCODER]}, request.directory)
    sizes |= write_models({name: models[name] for name in (FIRST, LATER)}, request.directory)
    companions = copy_companions(request.source, request.directory)
    contract = graphs[ENCODER].contract
    info = {name: _info(name, program, models[name]) for name, program in graphs.items()}
    return ExportResult(
        engine=ONNX,
        info={"first": FIRST, **info[LATER], "companions": companions},
        needs={**onnx_needs(encoder), **onnx_needs(decoder)},
        weight_bytes=sum(path.stat().st_size for path in request.directory.glob("*.data")),
        tensor_bytes=sizes,
        encoder=ProgramEntry(contract=contract, engine_info=info[ENCODER]),
        graphs=tuple((info[name], program) for name, program in graphs.items()),
    )


def _info(name: str, program: Program, model: ir.Model) -> dict[str, Any]:
    histogram = collections.Counter(node.op_type for node in model.graph)
    return graph_info(name, f"{ENCODER if name == ENCODER else FIRST}.data", program.contract, histogram)
