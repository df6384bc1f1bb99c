"""The tensors of a saved Program: which ones, stored once each, and checked against the graph on reading."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from optc.compiler import compat
from optc.compiler.diagnostics import InputError
from optc.compiler.ir.lazy_weights import LazyWeight
from optc.compiler.ir.saved.safetensors_file import write_safetensors

_EXAMPLE = re.compile(r"example/([0-9]{1,5})")


def tensors_to_save(
    exported: ExportedProgram, *, examples: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """The state dict, the constants, and aliases (name -> stored name) of an exported program.

    A tensor belongs when a placeholder reads it, or when it is the same memory as one that does (a tied
    weight): then only its first name is stored. With `examples` example inputs are constants named `example/{i}`.

    Raises:
        InputError: an example input is no tensor, or safetensors cannot hold a tensor.
    """
    specs = exported.graph_signature.input_specs
    read = {spec.target for spec in specs if spec.kind is not InputKind.USER_INPUT}
    constants = {name: value for name, value in exported.constants.items() if isinstance(value, Tensor)}
    tables: tuple[Mapping[str, Tensor], ...] = (exported.state_dict, constants)
    places = {memory_of(table[name]) for table in tables for name in read & table.keys()} - {None}
    aliases: dict[str, str] = {}
    stored: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for table, kept in zip(tables, stored, strict=True):
        first: dict[Any, str] = {}
        for name, tensor in table.items():
            place = memory_of(tensor)
            if place in first:
                aliases[name] = first[place]
            elif name in read or place in places:
                kept[name] = tensor
                first.update({place: name} if place is not None else {})
    leaves = pytree.tree_leaves(exported.example_inputs) if examples and exported.example_inputs is not None else []
    stored[1].update({f"example/{i}": leaf for i, leaf in enumerate(leaves)})
    for name, value in (stored[0] | stored[1]).items():
        if not isinstance(value, Tensor) or value.dtype in (torch.complex32, torch.complex128):
            shown = value.dtype if isinstance(value, Tensor) else repr(value)[:60]
            raise InputError(
                "the program cannot be saved",
                where=name,
                why=f"safetensors cannot hold {shown}",
                remedy="convert the tensor to a type that safetensors has",
            )
    return *stored, aliases


def memory_of(tensor: Tensor) -> tuple[Any, ...] | None:
    """What two tensors that are the same memory in the same shape agree in; None for empty ones."""
    if tensor.numel() == 0:
        return None
    if isinstance(tensor, LazyWeight):
        return ("lazy", id(tensor.recipe), tensor.dtype, tuple(tensor.shape), tensor.stride())
    storage = tensor.untyped_storage()
    view = (tensor.storage_offset(), tensor.dtype, tuple(tensor.shape), tensor.stride())
    return (tensor.device, storage.data_ptr(), *view)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; an older file is replaced, not overwritten: a loaded Program may have it mapped.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    part = path.with_suffix(".part")
    write_safetensors(part, tensors)
    part.replace(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped into memory copy-on-write.

    Raises:
        ValueError: the file is missing, truncated or malformed.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def attach_tensors(
    graph: Any, weights: dict[str, Tensor], constants: dict[str, Tensor], aliases: Mapping[str, str]
) -> None:
    """Complete the two tables, as read from files, to what the graph reads, in place.

    Args:
        graph: a checked `compat.graph_schema.ExportedProgram`.

    Raises:
        ValueError: a tensor is missing, is not read, or is not what the graph says; names it.
    """
    expected = dict(expected_tensors(graph))
    stored = weights | constants
    unread = sorted(stored.keys() - expected.keys() - set(aliases.values()))
    if unread:
        raise ValueError(f"tensor '{unread[0]}' is not read by the graph")
    for name, source in aliases.items():
        if source not in stored or name in stored:
            raise ValueError(f"alias '{name}' of '{source}' has no source or is stored itself")
        table = weights if source in weights else constants
        table[name] = stored[source]
    described: dict[int, Tensor] = {}
    for name, (meta, is_parameter) in expected.items():
        table = weights if name in weights else constants
        if name not in table:
            raise ValueError(f"tensor '{name}' is missing")
        tensor = table[name]
        described[id(tensor)] = _as_described(name, tensor, meta, is_parameter)
    for table in (weights, constants):
        table.update({name: described.get(id(tensor), tensor) for name, tensor in table.items()})


def expected_tensors(graph: Any) -> Iterator[tuple[str, tuple[Any, bool]]]:
    """Weight name -> (tensor meta, whether it is a parameter), from the signature."""
    metas = graph.graph_module.graph.tensor_values
    for spec in graph.graph_module.signature.input_specs:
        kind = str(spec.type)
        if kind != "user_input":
            name = getattr(spec.value, f"{kind}_name")
            if spec.value.arg.name not in metas:
                raise ValueError(f"tensor '{name}' has no shape in the graph")
            yield name, (metas[spec.value.arg.name], kind == "parameter")


def _as_described(name: str, tensor: Tensor, meta: Any, is_parameter: bool) -> Tensor:
    """The tensor on the device and with the strides that the graph was traced with."""
    shape, dtype = compat.static_shape(meta.sizes), compat.torch_dtype(meta.dtype)
    if tuple(tensor.shape) != shape or tensor.dtype is not dtype:
        found = f"{tensor.dtype} {list(tensor.shape)}"
        raise ValueError(f"tensor '{name}' is {found}, the graph says {dtype} {list(shape or ())}")
    stride = compat.static_shape(meta.strides)
    if stride is not None and stride != tensor.stride() and _is_permutation(shape, stride):
        order = sorted(range(len(shape)), key=lambda axis: (stride[axis], shape[axis]), reverse=True)
        packed = tensor.permute(order).contiguous()
        tensor = packed.permute([order.index(axis) for axis in range(len(shape))])
    tensor = tensor.to(torch.device(meta.device.type, meta.device.index))
    if is_parameter:
        return torch.nn.Parameter(tensor, requires_grad=meta.requires_grad)
    return tensor


def _is_permutation(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether the strides are those of a contiguous tensor with its axes permuted."""
    size = 1
    for step, length in sorted((s, n) for s, n in zip(stride, shape, strict=True) if n != 1):
        if step != size:
            return False
        size *= length
    return True


def take_examples(graph: Any, constants: dict[str, Tensor]) -> list[Tensor]:
    """Remove the example inputs from the constants and return them in call order, on their devices.

    Raises:
        ValueError: they are not what the graph's inputs are.
    """
    indexed = {int(match[1]): name for name in constants if (match := _EXAMPLE.fullmatch(name))}
    examples = [constants.pop(indexed[i]) for i in sorted(indexed)]
    inputs = [spec.value.arg.value for spec in graph.graph_module.signature.input_specs if spec.type == "user_input"]
    if examples and (len(examples) != len(inputs) or sorted(indexed) != list(range(len(inputs)))):
        raise ValueError(f"{len(examples)} example inputs for {len(inputs)} inputs")
    placed = []
    for i, (example, spec) in enumerate(zip(examples, inputs, strict=False)):
        meta = graph.graph_module.graph.tensor_values.get(getattr(spec, "name", ""))
        if meta is None or example.dtype is not compat.torch_dtype(meta.dtype) or example.dim() != len(meta.sizes):
            raise ValueError(f"example input {i} is not what the graph takes")
        fixed = [size.as_int if size.type == "as_int" else None for size in meta.sizes]
        if any(size not in (None, found) for size, found in zip(fixed, example.shape, strict=True)):
            raise ValueError(f"example input {i} is {list(example.shape)}, the graph takes {fixed}")
        placed.append(example.to(torch.device(meta.device.type, meta.device.index)))
    return placed
