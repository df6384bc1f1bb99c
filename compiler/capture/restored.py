"""Linears of a captured model read the codes of the folder that it came from.

    linear(x, W)  ->  linear(x, optc.dequantize(codes, scale, zero))

with the input put in order, multiplied and rounded, and keys and values rounded, where the folder's layout says so.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.dataflow import aten, peel, value_of
from optc.compiler.analysis.linears import Linear, linear_site
from optc.compiler.capture.renames import ExpertRows
from optc.compiler.diagnostics import CaptureError, InputError
from optc.compiler.formats.layouts import QuantizedWeight
from optc.compiler.formats.layouts.weight import INPUT_ORDER, joined
from optc.compiler.formats.safetensors_header import shown
from optc.compiler.ir.contract import WeightQuantization
from optc.compiler.ir.program import Program
from optc.compiler.ir.provenance import module_path
from optc.compiler.ir.surgery import add_weight, drop_dead, insert_call, replace_call
from optc.compiler.model_folder.checkpoint import match_names
from optc.compiler.model_folder.quantized import QuantizedFolder
from optc.compiler.rewriting.key_values import round_key_values
from optc.compiler.rewriting.rounded_inputs import rotated_input, rounded_input
from optc.compiler.rewriting.weights import prune_contract, record_weight

_optc = torch.ops.optc


def restore_codes(
    program: Program, folder: QuantizedFolder, names: dict[str, str], experts: Mapping[str, ExpertRows]
) -> Program:
    """Let the linears of a captured dense model read the folder's codes.

    Args:
        names: weight of the program -> name in `folder.dense`.
        experts: name in `folder.dense` -> the rows of a stacked weight of the program that it holds.

    Raises:
        CaptureError: a quantized weight that is not read by linears alone, or scales of keys and values of which the
            model has no attention; names it.
        InputError: tensors that are missing or do not fit.
    """
    edited = program.clone()
    modules = {f"{module}.weight" for module in folder.modules}
    pieces = {name: [names[name]] for name in names if names[name] in modules}
    for piece, rows in sorted(experts.items(), key=lambda item: item[1].start):
        if piece in modules:
            pieces.setdefault(_label(rows.weight, rows.expert), []).append(piece)
    made: dict[str, Node] = {}
    inputs: dict[tuple[Node, str, float], Node] = {}
    turned: dict[tuple[Node, int], Node] = {}
    ordered: dict[tuple[Node, bytes], Node] = {}
    with torch.no_grad():
        for node in list(edited.graph.nodes):
            site = linear_site(edited, node)
            held = edited.weight_of(site.placeholder) if site is not None else None
            if site is None or held is None or (name := _label(held, site.index)) not in pieces:
                continue
            if site.transposed or (site.index is not None and not _is_whole(site, name, pieces, experts)):
                raise _unusable(folder, held, "it is stacked or transposed in the model")
            read = [folder.layout.read(piece.removesuffix(".weight")) for piece in pieces[name]]
            weight = joined(read, f"{folder.reader.folder}: {shown(held)}")
            if name not in made:
                made[name] = _dequantized(edited, site, name, held, weight, folder.method)
            _read_codes(edited, site, name, made[name], weight, inputs, ordered, turned)
    left = [name for name in edited.weight_names().values() if names.get(name) in modules and _is_read(edited, name)]
    missing = modules.difference(*(pieces[name] for name in made))
    if left or missing:
        raise _unusable(folder, left[0] if left else min(missing), "the model reads it outside linears too")
    _round_key_values(edited, folder)
    drop_dead(edited)
    return prune_contract(edited.changed())


def _label(weight: str, expert: int | None) -> str:
    """What the parts of a quantized weight are called after, of an expert of a stacked one where there is a number."""
    return weight if expert is None else f"{weight}_{expert}"


def _is_whole(site: Linear, name: str, pieces: Mapping[str, list[str]], experts: Mapping[str, ExpertRows]) -> bool:
    """Whether the quantized pieces of an expert are all of its rows."""
    return site.rows == sum(experts[piece].stop - experts[piece].start for piece in pieces[name])


def _dequantized(program: Program, site: Linear, name: str, source: str, weight: QuantizedWeight, method: str) -> Node:
    """The call that makes the weight of its codes, and the new weights that it reads, called after `name`."""
    scheme, dtype, form = weight.scheme, value_of(site.weight).dtype, weight.format
    scale = form.stored_scale(weight.scale, dtype)
    if not bool(torch.isfinite(scale.float()).all()):
        raise InputError(
            "the scales of a quantized weight are not finite",
            where=name,
            why=f"in {dtype}",
            remedy="choose --dtype fp32 or bf16, or use another copy of the model",
        )
    entry = WeightQuantization(
        method=method,
        bits=scheme.bits,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        source=source,
        format=scheme.format,
        activations=scheme.activations,
    )
    arguments = [
        None if tensor is None else _part(program, name, part, tensor, entry if part == "codes" else None)
        for part, tensor in {**weight.parts(), "scale": scale}.items()
    ]
    knobs = form.keywords(scheme.bits, scheme.group_size, dtype)
    return insert_call(program, site.node, form.spec.op, arguments, knobs)


def _part(program: Program, name: str, suffix: str, tensor: Tensor, entry: WeightQuantization | None = None) -> Node:
    """Add one tensor that belongs to the weight `name`."""
    source = name if entry is None else entry.source
    record_weight(program, f"{name}_{suffix}", program.contract.sources.get(source, (source,)), entry)
    plain = tensor.reshape(-1).view(tensor.shape)  # a transposed row counts as contiguous under odd strides
    return add_weight(program, f"{name}_{suffix}", plain)


def _read_codes(
    program: Program,
    site: Linear,
    name: str,
    weight: Node,
    stored: QuantizedWeight,
    inputs: dict[tuple[Node, str, float], Node],
    ordered: dict[tuple[Node, bytes], Node],
    turned: dict[tuple[Node, int], Node],
) -> None:
    """Let a linear read `weight`, its input put in order, multiplied, rotated and rounded where the layout says so."""
    x, dtype = site.input, value_of(site.input).dtype
    if stored.input_order is not None:
        place = (peel(x), stored.input_order.numpy().tobytes())
        if place not in ordered:  # linears of one input mostly have one order
            order = _part(program, name, INPUT_ORDER, stored.input_order)
            ordered[place] = insert_call(program, site.node, aten.index_select.default, (place[0], -1, order))
        x = ordered[place]
    if stored.input_factor is not None:
        factor = _part(program, name, "input_factor", stored.input_factor.to(dtype))
        x = insert_call(program, site.node, aten.mul.Tensor, (x, factor))
    if size := stored.scheme.rotation:
        turn = (peel(x), size)
        if turn not in turned:
            turned[turn] = rotated_input(program, site.node, turn[0], size)
        x = turned[turn]
    if stored.scheme.activations:
        known = 0.0 if stored.input_scale is None else float(stored.input_scale)
        key = (peel(x), stored.scheme.activations, known)
        if key not in inputs:
            scale = None
            if stored.input_scale is not None:
                scale = _part(program, name, "input_scale", stored.input_scale)
            inputs[key] = rounded_input(program, site.node, key[0], key[1], scale)
        x = inputs[key]
    replace_call(program, site.node, aten.linear.default, (x, weight, site.bias))


def _round_key_values(program: Program, folder: QuantizedFolder) -> None:
    """Round keys and values by the folder's scales: each belongs to the module that the attention is in."""
    kept = folder.key_values
    if kept is None:
        return
    calls = [(module_path(call), call) for call in program.calls(_optc.attention.default)]
    found = match_names(kept.attentions, [path for path, _ in calls])
    missing = set(kept.attentions) - set(found.values())
    if missing:
        name = next(name for name in kept.names(min(missing)) if name in folder.reader)
        raise CaptureError(
            "scales of keys and values do not belong to any attention",
            where=f"{folder.reader.folder}: {shown(name)}",
            why="the model has no attention of this name",
            remedy="use the unquantized model, and --quant",
        )
    for number, (path, call) in enumerate(calls):
        if path not in found:
            continue
        names, scales = kept.names(found[path]), kept.read(folder.reader, found[path])
        heads = int(value_of(call.args[1]).shape[1])
        for name, scale in zip(names, scales, strict=True):
            if scale.numel() not in (1, heads):
                raise folder.reader.wrong_shape(name, f"the attention has {heads} key/value heads")
        sources = [(name,) for name in names]
        round_key_values(program, call, f"kv_cache.{number}", scales, kept.scheme.format, sources)


def _is_read(program: Program, name: str) -> bool:
    return any(node.users for node in program.graph.nodes if program.weight_of(node) == name)


def _unusable(folder: QuantizedFolder, name: str, why: str) -> CaptureError:
    return CaptureError(
        "a quantized weight cannot keep its codes",
        where=f"{folder.reader.folder}: {shown(name)}",
        why=why,
        remedy="use the unquantized model, and --quant",
    )
