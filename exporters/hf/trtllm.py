"""A model folder for `trtllm-serve`: ModelOpt's layout, hf_quant_config.json and serving options."""

from __future__ import annotations

import dataclasses
import json

from optc.compiler.formats.layouts import modelopt
from optc.compiler.formats.layouts.modelopt.writer import ModelOptWriter
from optc.compiler.ir.program import Program
from optc.compiler.target.target import ExportRequest, ExportResult
from optc.exporters.hf.collect import collect
from optc.exporters.hf.drafts import carry
from optc.exporters.hf.export import write_model
from optc.exporters.hf.modelopt import fit_for_loading
from optc.exporters.hf.serving import FILE, serving_options
from optc.exporters.options.hf import ServeOptions


def export_trtllm(program: Program, request: ExportRequest) -> ExportResult:
    """Write the folder; every tensor is read back and compared with the program, as `export_hf` does.

    Raises:
        TargetError: a weight has no place in a model folder, or TensorRT-LLM has no loader for it; names it.
        UsageError: serving options that contradict each other.
        ArtifactError: what was read back is not what was written.
        ResourceError, InputError: the disk is full or not writable.
    """
    context = program.contract.model.context_length
    options = request.of(ServeOptions)
    options.check()
    plan = fit_for_loading(collect(program, request.source, trust_remote_code=request.trust_remote_code))
    caches = plan.key_values is not None
    writer = ModelOptWriter(embeddings=plan.embeddings)
    draft = carry(options, request.directory)
    texts = {FILE: serving_options(options, context, caches, draft)}
    if plan.quantized or caches:
        schemes = {item.module: item.weight.scheme for item in plan.quantized}
        own = writer.own_config(schemes, plan.linears, caches=caches)
        texts[modelopt.FILE] = json.dumps(own, indent=4) + "\n"
    result = write_model(plan, program.weight, writer, request.directory, request.source, texts)
    info = {**result.info, "serving_options": FILE, "kv_cache_scales": 2 * len(plan.scales)}
    return dataclasses.replace(result, info=info)
