"""Model folders that are quantized already: from compressed-tensors, AWQ or GPTQ to the canonical form.

The model is built with dense weights, captured as any other, and each quantized linear then reads its codes:

    linear(x, W)  ->  linear(x, optc.dequantize(codes, scale, zero))

Nothing is quantized anew: the codes are those of the folder, scales are cast to the compute type.
"""

from __future__ import annotations

import dataclasses
import operator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.capture.checkpoint import CheckpointInfo, match_names
from optc.compiler.capture.config_file import CONFIG, read_json
from optc.compiler.contract import WeightQuantization
from optc.compiler.dataflow import aten, peel, value_of
from optc.compiler.diagnostics import CaptureError, InputError, UsageError
from optc.compiler.key_values import module_path, round_key_values
from optc.compiler.layouts import QuantizedWeight, awq, compressed_tensors, gptq
from optc.compiler.layouts.config import KEY, ConfigReader
from optc.compiler.layouts.tensors import TOGETHER, TensorReader
from optc.compiler.linears import Linear, linear_site
from optc.compiler.program import Program
from optc.compiler.safetensors_header import TensorInfo, shown
from optc.compiler.surgery import add_weight, drop_dead, insert_call, replace_call
from optc.compiler.weights import prune_contract, record_weight

_optc = torch.ops.optc


class Layout(Protocol):
    """How a folder keeps the quantized weights of its linears; see `optc.compiler.layouts`."""

    def modules(self) -> list[str]:
        """Linears that the files hold quantized."""

    def parts(self, module: str) -> tuple[str, ...]:
        """Tensors of one linear's weight."""

    def shape(self, module: str) -> tuple[int, int]:
        """[N, K] of one linear."""

    def read(self, module: str) -> QuantizedWeight:
        """One linear's weight in the canonical form."""

    def attentions(self) -> list[str]:
        """Attentions whose keys and values are rounded; each A has A.k_scale and A.v_scale."""


_LAYOUTS: dict[str, Any] = {
    compressed_tensors.METHOD: compressed_tensors.CompressedTensors,
    awq.METHOD: awq.Awq,
    gptq.METHOD: gptq.Gptq,
}


@dataclasses.dataclass(frozen=True)
class QuantizedFolder:
    """The quantized side of a checked model folder.

    Attributes:
        method: compressed-tensors, awq or gptq.
        modules: names of the quantized linears, as in the checkpoint.
        attentions: names of the attentions whose keys and values are rounded.
        dense: the folder as it would be unquantized: `M.weight` [N, K] in place of a linear's parts.
    """

    method: str
    layout: Layout
    reader: TensorReader
    modules: tuple[str, ...]
    attentions: tuple[str, ...]
    dense: CheckpointInfo

    def stored_bytes(self) -> int:
        """Bytes of codes, scales and zero points in the files."""
        names = (name for module in self.modules for name in self.layout.parts(module))
        return sum(self.reader.tensors[name].nbytes for name in names)

    def state(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Every tensor of the dense model; the weights of quantized linears made from codes, in `dtype`."""
        names = {f"{module}.weight": module for module in self.modules}
        return {
            name: self.layout.read(names[name]).dense(dtype) if name in names else self.reader.read(name)
            for name in self.dense.tensors
        }


def quantized_folder(info: CheckpointInfo) -> QuantizedFolder | None:
    """The quantized weights of a folder, or None when its config names no quantization. Weights are not read.

    Raises:
        InputError: a quantization that optc does not read (says which ones it does), tensors that are missing or do
            not fit.
    """
    if KEY not in info.config:
        return None
    path = info.path / CONFIG
    config = ConfigReader(info.config, path, "config").part(KEY)
    method = config.text("quant_method")
    config.choice("quant_method", method, tuple(_LAYOUTS))
    reader = TensorReader(info.path, info.tensors)
    layout: Layout = _LAYOUTS[method](config, reader)
    modules, attentions = tuple(layout.modules()), tuple(layout.attentions())
    if not modules and not attentions:
        raise config.refusal("no linear of the weight files is quantized")
    tensors = dict(info.tensors)
    for name in attentions:
        for part in (f"{name}.k_scale", f"{name}.v_scale"):
            tensors.pop(part, None)
    for module in modules:
        rows, columns = layout.shape(module)
        file = info.path.name
        for name in layout.parts(module):
            if name not in info.tensors:
                raise InputError(
                    f"missing tensor '{shown(name)}'", where=str(info.path),
                    why=f"the linear '{shown(module)}' is quantized", remedy=TOGETHER,
                )  # fmt: skip
            file = tensors.pop(name).file
        tensors[f"{module}.weight"] = TensorInfo(file, "F32", (rows, columns), 0)
    dense = dataclasses.replace(
        info, tensors=tensors, config={k: v for k, v in info.config.items() if k != KEY}
    )
    return QuantizedFolder(method, layout, reader, modules, attentions, dense)


def refuse_quantizing_again(folder: Path) -> None:
    """Refuse to quantize a folder whose config says that it is quantized; weights unread.

    Raises:
        UsageError: it is quantized already.
        InputError: config.json is malformed.
    """
    path = folder / CONFIG
    config = read_json(path) if path.is_file() else {}
    if KEY in config:
        inner = config[KEY]
        method = inner.get("quant_method") if isinstance(inner, dict) else None
        raise UsageError(
            "the model is quantized already", where=str(path), why=f"by {method}" if method else None,
            remedy="leave --quant out: its codes are kept; or give the unquantized model",
        )  # fmt: skip


def restore_codes(program: Program, folder: QuantizedFolder, names: dict[str, str]) -> Program:
    """Let the linears of a captured dense model read the folder's codes.

    Args:
        names: weight of the program -> name in `folder.dense`.

    Raises:
        CaptureError: a quantized weight that is not read by linears alone; names it.
    """
    edited = program.clone()
    modules = {f"{module}.weight" for module in folder.modules}
    made: dict[str, Node] = {}
    inputs: dict[tuple[Node, str], Node] = {}
    with torch.no_grad():
        for node in list(edited.graph.nodes):
            site = linear_site(edited, node)
            name = edited.weight_of(site.placeholder) if site is not None else None
            if site is None or name is None or names.get(name) not in modules:
                continue
            if site.transposed or site.index is not None:
                raise _unusable(folder, name, "it is stacked or transposed in the model")
            weight = folder.layout.read(names[name].removesuffix(".weight"))
            if name not in made:
                made[name] = _dequantized(edited, site, name, weight, folder.method)
            _read_codes(edited, site, made[name], weight.scheme.activations, inputs)
    left = [
        name
        for name in edited.weight_names().values()
        if names.get(name) in modules and _is_read(edited, name)
    ]
    missing = modules - {names[name] for name in made}
    if left or missing:
        raise _unusable(
            folder, left[0] if left else min(missing), "the model does not read it in a linear alone"
        )
    _restore_key_values(edited, folder)
    drop_dead(edited)
    return prune_contract(edited.changed())


def _restore_key_values(program: Program, folder: QuantizedFolder) -> None:
    """Round the keys and values of the attentions that the folder has scales for."""
    if not folder.attentions:
        return
    assert isinstance(folder.layout, compressed_tensors.CompressedTensors)
    calls = {module_path(call): call for call in program.calls(_optc.attention.default)}
    found = match_names(folder.attentions, calls)
    missing = set(folder.attentions) - set(found.values())
    if missing:
        raise CaptureError(
            "scales of keys and values belong to no attention", where=f"{folder.reader.folder}: {shown(min(missing))}",
            why="the model has no attention of this name", remedy="use the unquantized model, and --quant",
        )  # fmt: skip
    for number, (path, call) in enumerate(calls.items()):
        if path not in found:
            continue
        name = found[path]
        scales = folder.layout.scales(name)
        heads = int(value_of(call.args[1]).shape[1])
        if scales.key.numel() not in (1, heads) or scales.value.numel() not in (1, heads):
            raise folder.reader.wrong_shape(f"{name}.k_scale", f"the attention has {heads} key/value heads")
        sources = ((f"{name}.k_scale",), (f"{name}.v_scale",))
        pair = (scales.key, scales.value)
        round_key_values(program, call, f"kv_cache.{number}", pair, scales.scheme.format, sources)


def _dequantized(program: Program, site: Linear, name: str, weight: QuantizedWeight, method: str) -> Node:
    """The call that makes the weight of its codes, and the new weights that it reads."""
    scheme, dtype = weight.scheme, value_of(site.weight).dtype
    scale = weight.scale.to(dtype)
    if not bool(torch.isfinite(scale).all()):
        raise InputError(
            "the scales of a quantized weight are not finite", where=name, why=f"in {dtype}",
            remedy="choose --dtype fp32 or bf16, or use another copy of the model",
        )  # fmt: skip
    entry = WeightQuantization(
        method=method, bits=scheme.bits, group_size=scheme.group_size, symmetric=scheme.symmetric, source=name,
        format=scheme.format, activations=scheme.activations,
    )  # fmt: skip
    sources = program.contract.sources.get(name, (name,))

    def part(suffix: str, tensor: Tensor, entry: WeightQuantization | None = None) -> Node:
        record_weight(program, f"{name}_{suffix}", sources, entry)
        plain = tensor.reshape(-1).view(
            tensor.shape
        )  # a transposed row counts as contiguous under odd strides
        return add_weight(program, f"{name}_{suffix}", plain)

    scale_node = part("scale", scale)
    zero = None if weight.zero is None else part("zero", weight.zero)
    codes = part("codes", weight.codes, entry)
    if scheme.format == "fp8":
        knobs: dict[str, Any] = {"group_size": scheme.group_size}
        return insert_call(program, site.node, _optc.dequantize_float.default, (codes, scale_node), knobs)
    knobs = {"bits": scheme.bits, "group_size": scheme.group_size}
    return insert_call(program, site.node, _optc.dequantize.default, (codes, scale_node, zero), knobs)


def _read_codes(
    program: Program, site: Linear, weight: Node, activations: str, inputs: dict[tuple[Node, str], Node]
) -> None:
    """Replace a linear by one that reads `weight`, its input rounded per token where the scheme says so."""
    x = site.input
    if activations:
        root = peel(x)
        if (root, activations) not in inputs:
            inputs[root, activations] = _rounded(program, site.node, root, activations)
        x = inputs[root, activations]
    replace_call(program, site.node, aten.linear.default, (x, weight, site.bias))


def _rounded(program: Program, before: Node, x: Node, activations: str) -> Node:
    codes = insert_call(program, before, _optc.quantize_dynamic.default, (x,), {"format": activations})
    pair = [insert_call(program, before, operator.getitem, (codes, i)) for i in (0, 1)]
    return insert_call(
        program, before, _optc.dequantize_activation.default, pair, {"dtype": value_of(x).dtype}
    )


def _is_read(program: Program, name: str) -> bool:
    return any(node.users for node in program.graph.nodes if program.weight_of(node) == name)


def _unusable(folder: QuantizedFolder, name: str, why: str) -> CaptureError:
    return CaptureError(
        "a quantized weight cannot keep its codes", where=f"{folder.reader.folder}: {shown(name)}", why=why,
        remedy="use the unquantized model, and --quant",
    )  # fmt: skip
