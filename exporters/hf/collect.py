"""From a Program back to the tensors of a checkpoint: which name each weight has there, and how it is quantized."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.fx import Node

from optc.compiler.capture.checkpoint import CheckpointInfo, check_folder, match_names, tied_names
from optc.compiler.capture.pretrained import meta_model
from optc.compiler.capture.quantized import quantized_folder
from optc.compiler.capture.renames import renamed_tensors
from optc.compiler.dataflow import aten, value_of
from optc.compiler.diagnostics import TargetError
from optc.compiler.key_values import key_value_scales, module_path, rounded
from optc.compiler.layouts import QuantizedWeight, Scheme
from optc.compiler.layouts.key_values import KeyValueScheme
from optc.compiler.linears import DEQUANTIZERS, linear_site, quantized_activation
from optc.compiler.program import Program

_optc = torch.ops.optc


@dataclass(frozen=True)
class Quantized:
    """The weight of one linear module.

    Attributes:
        stem: what its tensors are called in the program, without `_codes` and so on.
        weight: tensors of the program, not copies.
    """

    module: str
    stem: str
    weight: QuantizedWeight


@dataclass(frozen=True)
class FolderPlan:
    """What a model folder will hold.

    Attributes:
        info: the source folder.
        plain: checkpoint name -> weight of the program.
        quantized: in graph order.
        copied: tensors of the source that the program does not read.
        linears: every `nn.Linear` of the model, by module name, and by its name in the checkpoint where that differs.
        untied: a quantized head has codes of its own where the source model shares the embedding's tensor.
        key_values: how keys and values are rounded; their scales are among `plain`.
    """

    info: CheckpointInfo
    plain: dict[str, str]
    quantized: tuple[Quantized, ...]
    copied: tuple[str, ...]
    linears: tuple[str, ...]
    untied: bool
    key_values: KeyValueScheme | None = None


def collect(program: Program, source: Path | None) -> FolderPlan:
    """Find the place of every weight of a program in the folder that it was captured from.

    Raises:
        TargetError: there is no such folder, or a weight has no place of its own; names the weight.
    """
    if source is None:
        raise TargetError(
            "a module in memory has no model folder to write back", why="config and tensor names come from it",
            remedy="save the model first (model.save_pretrained), and compile the folder",
        )  # fmt: skip
    info = check_folder(source)
    folder = quantized_folder(info)
    dense = folder.dense if folder else info
    skeleton = meta_model(info)
    state = skeleton.state_dict(keep_vars=True)
    found = match_names(dense.tensors, state)
    renamed = renamed_tensors(skeleton, set(dense.tensors) - set(found.values()))
    places = _Places(program, skeleton, state, {**renamed, **found})
    quantized, parts = places.quantized()
    modules = {item.module for item in quantized}
    key_values, scales = places.key_values()
    plain = places.plain(parts | set(scales.values()))
    written = {*plain, *(f"{module}.weight" for module in modules)}
    owners = places.tied
    held = {owners.get(name, name) for name in written}
    stored = set(places.found.values())
    copied = [name for name in dense.tensors if name not in stored]
    copied += [source for name, source in places.found.items() if owners.get(name, name) not in held]
    linears = [name for name, module in skeleton.named_modules() if type(module) is torch.nn.Linear]
    old = [renamed[f"{name}.weight"] for name in linears if f"{name}.weight" in renamed]
    linears += [name.removesuffix(".weight") for name in old]
    untied = any((places.shared(name) - {name}) & written for name in written)
    kept = {renamed.get(name, name): weight for name, weight in plain.items()} | scales
    return FolderPlan(info, kept, quantized, tuple(dict.fromkeys(copied)), tuple(linears), untied, key_values)


class _Places:
    def __init__(
        self, program: Program, skeleton: Any, state: dict[str, Tensor], found: dict[str, str]
    ) -> None:
        self.program, self.skeleton, self.state, self.found = program, skeleton, state, found
        self.tied = tied_names(state)

    def shared(self, name: str) -> set[str]:
        """The names that share the tensor of a name, itself included."""
        owner = self.tied.get(name, name)
        return {owner, *(other for other, first in self.tied.items() if first == owner)}

    def quantized(self) -> tuple[tuple[Quantized, ...], set[str]]:
        """The quantized weights, and the names of all tensors that they are made of."""
        calls: dict[Node, str] = {}
        for node in self.program.graph.nodes:
            site = linear_site(self.program, node)
            if site is None or site.placeholder is not None:
                continue
            kind = self._activations(site.input)
            name = self._name(site.weight.args[0])
            if calls.setdefault(site.weight, kind) != kind:
                raise _refusal(name, "two linears read it, and only one rounds its input")
            if site.transposed:
                raise _refusal(name, "a product reads it transposed")
        items, parts = [], set()
        for call in self.program.graph.nodes:
            if call.target not in DEQUANTIZERS:
                continue
            if call not in calls or any(user.target is not aten.linear.default for user in call.users):
                raise _refusal(self._name(call.args[0]), "something else than a linear reads it")
            items.append(self._item(call, calls[call]))
            parts |= {self._name(node) for node in call.all_input_nodes}
        return tuple(items), parts

    def key_values(self) -> tuple[KeyValueScheme | None, dict[str, str]]:
        """How keys and values are rounded, and checkpoint name -> weight of their scales."""
        calls = [call for call in self.program.calls(_optc.attention.default) if rounded(call)]
        scales: dict[str, str] = {}
        schemes: set[KeyValueScheme] = set()
        for call in calls:
            found, path = key_value_scales(self.program, call), module_path(call)
            if found is None or not path:
                raise _refusal(call.name, "a folder keeps one format and fixed scales for keys and values")
            format, names = found
            shapes = {tuple(self.program.weight(name).shape) for name in names}
            granularity = _granularity(shapes, int(value_of(call.args[1]).shape[1]))
            if granularity is None:
                raise _refusal(names[0], "a folder keeps one scale per layer or per head for keys and values")
            schemes.add(KeyValueScheme(format, granularity))
            scales |= {f"{path}.k_scale": names[0], f"{path}.v_scale": names[1]}
        if len(schemes) > 1:
            raise _refusal(calls[0].name, "attentions round their keys and values in different ways")
        return (schemes.pop() if schemes else None), scales

    def plain(self, parts: set[str]) -> dict[str, str]:
        """Checkpoint name -> weight, of everything that is not quantized."""
        out: dict[str, str] = {}
        for spec in self.program.exported.graph_signature.input_specs:
            name = spec.target
            if name is None or spec.kind is InputKind.USER_INPUT or name in parts:
                continue
            if spec.kind is not InputKind.PARAMETER and not spec.persistent and name not in self.state:
                continue  # the model computes it when it is built: rotary frequencies, for one
            if name not in self.found and not (self.shared(name) & set(self.found)):
                raise _refusal(
                    name, "the checkpoint has no tensor of this name: a pass, or the loader, made it"
                )
            if tuple(self.program.weight(name).shape) != tuple(self.state[name].shape):
                raise _refusal(name, "its shape is not that of the checkpoint's tensor")
            owner = self.tied.get(name, name)
            alike = owner not in out or torch.equal(
                self.program.weight(out[owner]), self.program.weight(name)
            )
            out[owner if alike else name] = name
        return out

    def _item(self, call: Node, activations: str) -> Quantized:
        codes_name = self._name(call.args[0])
        entry = self.program.contract.quantization.get(codes_name)
        if entry is None:
            raise _refusal(codes_name, "the contract does not say which weight its codes stand for")
        weight = self._weight(call, codes_name, activations)
        sources = self.program.contract.sources.get(codes_name, ())
        if len(sources) > 1 or entry.source not in self.state:
            raise _refusal(codes_name, f"it is made of {', '.join(sources) or entry.source}")
        for name in sorted(self.shared(entry.source)):
            module = self.skeleton.get_submodule(name.rpartition(".")[0])
            if type(module) is torch.nn.Linear and name.endswith(".weight"):
                if tuple(module.weight.shape) != weight.shape:
                    raise _refusal(
                        codes_name, f"the checkpoint's tensor has shape {list(module.weight.shape)}"
                    )
                return Quantized(name.removesuffix(".weight"), codes_name.removesuffix("_codes"), weight)
        kind = type(self.skeleton.get_submodule(entry.source.rpartition(".")[0])).__name__
        raise _refusal(
            codes_name, f"{entry.source} belongs to a {kind}, and quantized layouts replace nn.Linear alone"
        )

    def _weight(self, call: Node, name: str, activations: str) -> QuantizedWeight:
        if call.target is _optc.dequantize_codebook.default:
            raise _refusal(name, "no layout holds codes of a table (nf4)")
        tensors = [
            None if node is None else self.program.weight(self._name(node)).detach() for node in call.args
        ]
        codes, scale = tensors[0], tensors[1]
        assert codes is not None
        assert scale is not None
        knobs = call.kwargs
        size = int(knobs.get("group_size", 0))
        size = 0 if size == codes.shape[1] and activations else size
        fp8 = call.target is _optc.dequantize_float.default
        zero = None if fp8 else tensors[2]
        scheme = Scheme(
            bits=8 if fp8 else int(knobs["bits"]), group_size=size, symmetric=zero is None,
            format="fp8" if fp8 else "int", activations=activations,  # type: ignore[arg-type]
            per_tensor=fp8 and tuple(scale.shape) == (1, 1) and codes.shape[0] > 1,
        )  # fmt: skip
        return QuantizedWeight(scheme, codes, scale, zero)

    def _activations(self, x: Node) -> str:
        call = quantized_activation(x)
        if call is None:
            return ""
        if call.target is not _optc.quantize_dynamic.default:
            raise _refusal(
                x.name, "its scales are calibrated ones; folders are written with scales per token"
            )
        return str(call.kwargs["format"])

    def _name(self, node: object) -> str:
        name = self.program.weight_of(node)
        if name is None:
            raise _refusal(str(node), "a dequantization reads something that is no weight")
        return name


def _granularity(shapes: set[tuple[int, ...]], heads: int) -> Literal["layer", "head"] | None:
    if shapes == {(1,)}:
        return "layer"
    return "head" if shapes == {(heads, 1, 1)} else None


def _refusal(name: str, why: str) -> TargetError:
    return TargetError(
        "the program cannot be written back as a model folder", where=name, why=why,
        remedy="compile a model folder with quantization passes alone, or choose another target (optc targets)",
    )  # fmt: skip
