"""What a compile would do, from config and tensor headers alone: no weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch

from optc.compiler.artifact.sizes import Sizes
from optc.compiler.capture.facts import generates_from_an_encoder, stated_context, text_config
from optc.compiler.formats.group_sizes import size_for
from optc.compiler.model_folder.checkpoint import CheckpointInfo, check_folder
from optc.compiler.model_folder.dtypes import DTYPES, dtype_name
from optc.compiler.model_folder.medusa import MedusaFolder, check_base
from optc.compiler.model_folder.plain_decoder import plain_decoder
from optc.compiler.model_folder.quantized import quantized_folder, refuse_quantizing_again
from optc.compiler.model_folder.sentence import SentenceModules, sentence_modules
from optc.compiler.target.options import CompileOptions, drafted_by
from optc.compiler.target.target import check_context
from optc.encoder_decoder import RECIPE, check_encoder_decoder
from optc.hub import local_model
from optc.predicted_sizes import predicted_sizes, quantizable
from optc.request import Request
from optc.resolving import Resolved, recipe_steps, resolve, with_group_size


def make_plan(model: Path, request: Request) -> dict[str, Any]:
    """Check the request and predict sizes.

    Returns a JSON-able dict: `passes` in order, `sizes` of the weights by parts, as `optc compile` will write them,
    `weight_bytes`, their sum, `group_size` (a list where each linear gets the first that divides it), `left`, the
    linears that none divides, `kv_cache_bytes_per_token`, `linears`, `draft`, the same of a model that drafts, `medusa`,
    what heads are compiled in.

    Raises:
        UsageError, TargetError, InputError, CaptureError: as the compile itself would.
    """
    resolve(request)  # what is wrong with the request is said before the model is read
    folder = local_model(model)
    info = check_folder(folder, trust_remote_code=request.what.trust_remote_code)
    resolved = resolve(request, dtype_name(info.dtype))
    target, options = resolved.target, resolved.options
    modules = sentence_modules(folder, request.what.pooling)
    plain = plain_decoder(info) if modules is None and request.what.pooling is None else None
    skeleton = plain or _model(info, modules, options)
    decoder = plain is not None or hasattr(skeleton, "generate")
    words = text_config(skeleton.config)
    context = stated_context(words)
    check_context(getattr(options.own, "max_seq_len", None), context)
    linears = quantizable(skeleton, () if options.quantization is None else options.quantization.ignore)
    resolved = with_group_size(resolved, [columns for _, columns in linears.values()], list(linears))
    pair = generates_from_an_encoder(type(skeleton))
    options, steps = resolved.options, recipe_steps(resolved, "decoder" if decoder and not pair else RECIPE)
    if pair:
        check_encoder_decoder(resolved, steps)
    chosen = options.quantization
    sizes = predicted_sizes(skeleton, target, options, steps, info.weight_bytes)
    sizes_of = chosen.group_size if chosen is not None and isinstance(chosen.group_size, tuple) else (0,)
    left = [name for name, (_, columns) in linears.items() if size_for(columns, sizes_of) is None]
    held = quantized_folder(info)
    note = target.quant[chosen.method].note if chosen is not None else ""
    if held is not None:
        if chosen is not None:
            refuse_quantizing_again(folder)
        shapes = [held.layout.shape(module) for module in held.modules]
        dense = sum(rows * columns for rows, columns in shapes) * _width(options)
        sizes = msgspec.structs.replace(sizes, linears=sizes.linears + held.stored_bytes() - dense)
        note = f"quantized already ({held.method}): {len(shapes)} linears keep their codes"
    heads = None if options.medusa is None else _heads_plan(options.medusa, info, words, options)
    if heads is not None:
        sizes = msgspec.structs.replace(sizes, rest=sizes.rest + heads["bytes"])
    draft = None if drafted_by(options.own) is None else _draft_plan(folder, resolved)
    if draft is not None:
        sizes = sizes.with_draft(Sizes.read(draft["sizes"]))
    return {
        "model": str(model),
        "target": target.name,
        "dtype": options.dtype,
        "quant": None if chosen is None else chosen.method,
        "passes": [
            {"name": step.rewrite.name, "optional": step.optional}
            for step in steps
            if step.when is None or held is not None  # such steps are for what a quantized folder can hold
        ],
        "parameters": sum(parameter.numel() for parameter in skeleton.parameters()),
        "linears": len(linears),
        "group_size": None if chosen is None else chosen.group_size,
        "left": left,
        "weight_bytes": sizes.total,
        "sizes": sizes.to_dict(),
        "kv_cache_bytes_per_token": _cache_bytes(words, options) if decoder else 0,
        "draft": draft,
        "medusa": heads,
        "note": note,
    }


def _model(info: CheckpointInfo, modules: SentenceModules | None, options: CompileOptions) -> Any:
    """The model of transformers on the meta device, with the modules that make embeddings behind it.

    Raises:
        InputError, CaptureError: as the capture of the folder.
    """
    from optc.compiler.capture.embedding import EmbeddingHead
    from optc.compiler.capture.loading import meta_model

    skeleton = meta_model(info, bare=modules is not None)
    if modules is not None:
        skeleton.add_module("embedding_head", EmbeddingHead(modules, DTYPES[options.dtype]))
    return skeleton


def _heads_plan(folder: Path, info: CheckpointInfo, config: Any, options: CompileOptions) -> dict[str, Any]:
    """What Medusa heads take, which no method quantizes.

    Raises:
        InputError: they cannot be read, have other sizes, or were trained for another model.
    """
    check_base(folder, info)
    found = MedusaFolder.read(folder)
    found.check_sizes(int(config.hidden_size), int(config.vocab_size), folder)
    return {
        "folder": str(folder),
        "heads": found.config.medusa_num_heads,
        "layers": found.config.medusa_num_layers,
        "bytes": found.numbers * _width(options),
    }


def _draft_plan(folder: Path, resolved: Resolved) -> dict[str, Any]:
    """The plan of the model that drafts for another; of one that reads hidden states its sizes alone.

    Raises:
        InputError, UsageError: as `DraftFolder.of`.
    """
    from optc.compiler.capture.eagle3_model import Eagle3
    from optc.compiler.model_folder.eagle3 import is_eagle3, read_eagle3_config
    from optc.drafted import DraftFolder, for_draft

    draft, resolved = DraftFolder.of(folder, resolved), for_draft(resolved)
    assert draft is not None, "one was asked for"
    if not is_eagle3(draft.path):
        return make_plan(draft.path, resolved.request)
    with torch.device("meta"):
        skeleton = Eagle3(read_eagle3_config(draft.path))
    linears = quantizable(skeleton)
    resolved = with_group_size(resolved, [columns for _, columns in linears.values()], list(linears))
    steps, source = recipe_steps(resolved, "decoder"), check_folder(draft.path).weight_bytes
    sizes = predicted_sizes(skeleton, resolved.target, resolved.options, steps, source)
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    return {"model": str(draft.path), "parameters": parameters, "weight_bytes": sizes.total, "sizes": sizes.to_dict()}


def _cache_bytes(config: Any, options: CompileOptions) -> int:
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads)
    width = 1 if getattr(options.own, "kv_cache_dtype", None) in ("fp8", "int8") else _width(options)
    return 2 * int(config.num_hidden_layers) * kv_heads * head_dim * width


def _width(options: CompileOptions) -> int:
    """Bytes of a number of the compute type."""
    return DTYPES[options.dtype].itemsize
