"""The weights of a Program in the modules of a transformers model: plain ones, quantized ones, scales of a KV cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.fx import Node

from optc.compiler.analysis.dataflow import aten, peel, value_of
from optc.compiler.analysis.linears import (
    Linear,
    activation_format,
    chooses_experts,
    linear_site,
    quantized_activation,
)
from optc.compiler.capture.renames import ExpertRows
from optc.compiler.diagnostics import TargetError
from optc.compiler.formats.layouts import QuantizedWeight, Scheme
from optc.compiler.formats.layouts.key_values import KeyValueScheme
from optc.compiler.formats.layouts.weight import INPUT_ORDER
from optc.compiler.formats.weight_format import WeightFormat, format_of
from optc.compiler.ir.contract import WeightQuantization
from optc.compiler.ir.program import Program
from optc.compiler.ir.provenance import module_path
from optc.compiler.model_folder.checkpoint import tied_names
from optc.compiler.ops.library import makes_weight
from optc.compiler.rewriting.key_values import key_value_scales, rounded
from optc.compiler.rewriting.rounded_inputs import rotation_size

_optc = torch.ops.optc


@dataclass(frozen=True)
class Quantized:
    """The weight of one linear module.

    Attributes:
        stem: what its tensors are called in the program, without `_codes` and so on.
        weight: tensors of the program, not copies.
        beside: the other linears of its input, by module name.
    """

    module: str
    stem: str
    weight: QuantizedWeight
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Input:
    """What happens to the input of a linear: the format it is rounded to, the scale and the factor by name.

    Attributes:
        rotation: the channels of a block by which it is rotated, 0 where it is not; `matrix` is the weight that does it.
    """

    format: str = ""
    scale: str | None = None
    factor: str | None = None
    rotation: int = 0
    matrix: str | None = None


class Places:
    """Where the weights of a program stand in a model.

    Args:
        skeleton: the model on the meta device; `state` is its state.
        found: name in `state` -> name in the checkpoint.
        experts: name in the checkpoint -> the rows of a stacked weight in `state` that it holds.
    """

    def __init__(
        self,
        program: Program,
        skeleton: Any,
        state: dict[str, Tensor],
        found: dict[str, str],
        experts: Mapping[str, ExpertRows],
    ) -> None:
        self.program, self.skeleton, self.state, self.found, self.experts = program, skeleton, state, found, experts
        self.stacks = {rows.weight for rows in experts.values()}
        self.tied = tied_names(state)

    def shared(self, name: str) -> set[str]:
        """The names that share the tensor of a name, itself included."""
        owner = self.tied.get(name, name)
        return {owner, *(other for other, first in self.tied.items() if first == owner)}

    def quantized(self) -> tuple[tuple[Quantized, ...], set[str]]:
        """The quantized weights, and the names of all tensors that they are made of."""
        calls: dict[Node, _Input] = {}
        readers: dict[Node, list[str]] = {}
        for node in self.program.graph.nodes:
            site = linear_site(self.program, node)
            if site is None:
                continue
            source = self._input(site)
            if source.rotation:
                self._check_rotated(site)
            if not chooses_experts(self.program, node) and not self._is_expert(site):
                readers.setdefault(self._root(site), []).append(self._module(site))
            if site.placeholder is not None:
                continue
            name = self._name(site.weight.args[0])
            if calls.setdefault(site.weight, source) != source:
                raise _refusal(name, "two linears read it, and only one rounds its input")
            if site.transposed:
                raise _refusal(name, "a product reads it transposed")
        items, parts = [], set()
        for call in self.program.graph.nodes:
            if not makes_weight(call.target) or quantized_activation(call) is not None:
                continue
            if call not in calls or any(user.target is not aten.linear.default for user in call.users):
                raise _refusal(self._name(call.args[0]), "something other than a linear reads it")
            made = self._items(call, calls[call])
            fused = {item.module for item in made}
            for item in made:
                beside = fused.union(*(names for names in readers.values() if item.module in names))
                items.append(dataclasses.replace(item, beside=tuple(sorted(beside - {item.module}))))
            found = calls[call]
            parts |= {self._name(node) for node in call.all_input_nodes}
            parts |= {name for name in (found.scale, found.factor, found.matrix) if name is not None}
        return tuple(items), parts

    def routers(self) -> list[str]:
        """Names in the checkpoint of the weights that choose experts."""
        sites = (linear_site(self.program, node) for node in self.program.graph.nodes)
        names = [
            self.program.weight_of(site.placeholder)
            for site in sites
            if site is not None and chooses_experts(self.program, site.node)
        ]
        return [self.found[name] for name in names if name in self.found and name.endswith(".weight")]

    def key_values(self) -> tuple[KeyValueScheme | None, dict[str, tuple[str, str]]]:
        """How keys and values are rounded, and attention module -> the weights that are their scales."""
        scales: dict[str, tuple[str, str]] = {}
        schemes: set[KeyValueScheme] = set()
        for call in self.program.calls(_optc.attention.default):
            if not rounded(call):
                continue
            found, path = key_value_scales(self.program, call), module_path(call)
            if found is None or not path or path in scales:
                raise _refusal(call.name, "a folder keeps one format and fixed scales for keys and values")
            format, names = found
            shapes = {tuple(self.program.weight(name).shape) for name in names}
            granularity = _granularity(shapes, int(value_of(call.args[1]).shape[1]))
            if granularity is None:
                raise _refusal(names[0], "a folder keeps one scale per layer or per head for keys and values")
            schemes.add(KeyValueScheme(format, granularity))
            scales[path] = names
        if len(schemes) > 1:
            where = next(iter(scales))
            raise _refusal(where, "attentions round their keys and values in different ways")
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
            if name in self.stacks:
                out |= {piece: piece for piece, rows in self.experts.items() if rows.weight == name}
                continue
            if name not in self.found and not (self.shared(name) & set(self.found)):
                raise _refusal(name, "the checkpoint has no tensor of this name: a pass, or the loader, made it")
            if tuple(self.program.weight(name).shape) != tuple(self.state[name].shape):
                raise _refusal(name, "its shape is not that of the checkpoint's tensor")
            owner = self.tied.get(name, name)
            held = out.get(owner)
            if held is None or torch.equal(self.program.weight(held), self.program.weight(name)):
                out[owner] = name
            else:  # no longer tied: each under its own name
                out |= {held: held, owner: owner} if name == owner else {name: name}
        return out

    def _items(self, call: Node, source: _Input) -> list[Quantized]:
        """The linear that a call makes the weight of, or the linears of one expert, whose rows they are."""
        codes_name = self._name(call.args[0])
        entry = self.program.contract.quantization.get(codes_name)
        if entry is None:
            raise _refusal(codes_name, "the contract does not say which weight its codes stand for")
        weight = self._weight(call, codes_name, source)
        sources = self.program.contract.sources.get(codes_name, ())
        origin = _origin(entry)
        if len(sources) > 1 or origin not in self.state:
            raise _refusal(codes_name, f"it is made of {', '.join(sources) or entry.source}")
        stem = codes_name.removesuffix("_codes")
        if origin in self.stacks:
            return self._of_expert(weight, origin, stem)
        for name in sorted(self.shared(origin)):
            if self._is_linear(name):
                module = self.skeleton.get_submodule(name.rpartition(".")[0])
                if tuple(module.weight.shape) != weight.shape:
                    raise _refusal(codes_name, f"the checkpoint's tensor has shape {list(module.weight.shape)}")
                return [Quantized(name.removesuffix(".weight"), stem, weight)]
        kind = type(self.skeleton.get_submodule(origin.rpartition(".")[0])).__name__
        raise _refusal(codes_name, f"{origin} belongs to a {kind}, and quantized layouts replace only nn.Linear")

    def _of_expert(self, weight: QuantizedWeight, stack: str, stem: str) -> list[Quantized]:
        expert = int(stem.removeprefix(f"{stack}_"))
        found = [(name, rows) for name, rows in self.experts.items() if (rows.weight, rows.expert) == (stack, expert)]
        if sum(rows.stop - rows.start for _, rows in found) != weight.shape[0]:
            raise _refusal(stem, "the checkpoint does not hold all of its rows")
        return [
            Quantized(name.removesuffix(".weight"), stem, weight.rows(rows.start, rows.stop)) for name, rows in found
        ]

    def _is_expert(self, site: Linear) -> bool:
        """Whether a linear is one of an expert: these share their input with all others, and are fused with none."""
        if site.placeholder is not None:
            return site.index is not None
        entry = self.program.contract.quantization.get(self._name(site.weight.args[0]))
        return entry is not None and _origin(entry) in self.stacks

    def _weight(self, call: Node, name: str, source: _Input) -> QuantizedWeight:
        form = format_of(call.target)
        assert form is not None, call.name
        if not form.in_folders:
            raise _refusal(name, f"no layout holds weights of the format {form.name}")
        parts = {
            part: self.program.weight(self._name(node)).detach()
            for part, node in form.parts_of(call.args).items()
            if node is not None
        }
        scheme = _scheme(form, call, parts, source)
        return QuantizedWeight(
            scheme, **parts, input_scale=self._tensor(source.scale), input_factor=self._tensor(source.factor)
        )

    def _tensor(self, name: str | None) -> Tensor | None:
        return None if name is None else self.program.weight(name).detach()

    def _check_rotated(self, site: Linear) -> None:
        """Refuse what vLLM does not rotate: experts, linears that are not quantized, those with a bias."""
        name = self._module(site)
        if site.placeholder is not None or self._is_expert(site):
            raise _refusal(name, "its input is rotated, which is done for quantized linears outside of experts")
        if site.bias is not None:
            raise _refusal(name, "its input is rotated, and vLLM adds no bias behind a rotation")

    def _input(self, site: Linear) -> _Input:
        x, call = site.input, quantized_activation(site.input)
        format, scale, factor = "", None, None
        rotation, matrix = 0, None
        if call is not None:
            x, format = call.args[0], activation_format(call)
            scale = None if call.target is _optc.quantize_dynamic.default else self._name(call.args[1])
        product = peel(x)
        if product.target is _optc.rotate_blocks.default:
            rotation, matrix = rotation_size(self.program, product), self._name(product.args[1])
            if not rotation:
                raise _refusal(matrix, "the input is rotated by another matrix than Hadamard's")
            product = peel(product.args[0])
        if product.target is aten.index_select.default and site.placeholder is None:
            order = self.program.weight_of(product.args[2])
            if order is not None and order.endswith(INPUT_ORDER):
                raise _refusal(order, "its columns are in an order of their own (GPTQ's act-order)")
        if product.target is aten.mul.Tensor and site.placeholder is None:
            name = self.program.weight_of(product.args[1])
            factor = name if name is not None and name.endswith("_input_factor") else None
        return _Input(format, scale, factor, rotation, matrix)

    def _root(self, site: Linear) -> Node:
        """The node that a linear's input is, before it is multiplied and rounded."""
        call = quantized_activation(site.input)
        root, found = peel(call.args[0] if call is not None else site.input), self._input(site)
        for turned in (found.matrix, found.factor):
            root = root if turned is None else peel(root.args[0])
        return root

    def _module(self, site: Linear) -> str:
        """The module that a linear's weight belongs to; "" where none of the checkpoint's does."""
        if site.placeholder is None:
            entry = self.program.contract.quantization.get(self._name(site.weight.args[0]))
            name = entry.source if entry is not None else ""
        else:
            name = self._name(site.placeholder)
        names = [other for other in sorted(self.shared(name)) if self._is_linear(other)]
        return names[0].removesuffix(".weight") if names else name

    def _is_linear(self, name: str) -> bool:
        module, _, last = name.rpartition(".")
        return last == "weight" and name in self.state and type(self.skeleton.get_submodule(module)) is torch.nn.Linear

    def _name(self, node: object) -> str:
        name = self.program.weight_of(node)
        if name is None:
            raise _refusal(str(node), "a dequantization reads something that is not a weight")
        return name


def _origin(entry: WeightQuantization) -> str:
    """The weight that codes were made of; of an expert, the whole stack, whose number some methods note in brackets."""
    return entry.source.partition("[")[0]


def _scheme(form: WeightFormat, call: Node, parts: dict[str, Tensor], source: _Input) -> Scheme:
    """How the weight of a dequantization is stored."""
    codes, scale = parts["codes"], parts["scale"]
    activations: Any = source.format
    size = form.group_size or int(call.kwargs.get("group_size", 0))
    bits, blocks = int(call.kwargs.get("bits", form.bits[0])), source.format == "fp8-128"
    # 8 bits with rounded inputs have a scale for each row; of 4 bits a group may be as long as a row.
    by_row = form.group_size is None and bits == 8 and source.format and not blocks
    whole_rows = size == codes.shape[1] and by_row
    return Scheme(
        bits=bits,
        group_size=0 if whole_rows else size,
        symmetric="zero" not in parts,
        format=form.name,
        per_tensor=tuple(scale.shape) == (1, 1) and codes.shape[0] > 1,
        activations=activations,
        static=source.scale is not None,
        rotation=source.rotation,
    )


def _granularity(shapes: set[tuple[int, ...]], heads: int) -> Literal["layer", "head"] | None:
    if shapes == {(1,)}:
        return "layer"
    return "head" if shapes == {(heads, 1, 1)} else None


def _refusal(name: str, why: str) -> TargetError:
    return TargetError(
        "the program cannot be written back as a model folder",
        where=name,
        why=why,
        remedy="compile a model folder with quantization passes only, or choose another target (optc targets)",
    )
