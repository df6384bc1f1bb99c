"""Keys and values of a linear cache, one tensor of each per layer: their places in a contract, and examples to trace with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from optc.compiler.analysis.dataflow import value_of
from optc.compiler.ir.contract import CACHE_ROLES, Input, Output
from optc.compiler.ir.devices import program_device
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.tokenwise import cache_dtype


def linear_caches(program: Program, length: int | str) -> tuple[list[Input], list[Output]]:
    """The inputs `past_key_values.N.key/value` [batch, kv heads, length, head size], and the outputs `present.N.key/value`."""
    inputs, outputs = [], []
    for i, layer in enumerate(program.contract.layers):
        dtype = str(cache_dtype(program)).removeprefix("torch.")
        for part, width in (("key", layer.head_dim), ("value", layer.value_dim)):
            role: Any = f"{part}_cache"
            dims = ("batch", layer.num_kv_heads, length, width)
            inputs.append(Input(name=f"past_key_values.{i}.{part}", role=role, dtype=dtype, dims=dims))
            outputs.append(Output(name=f"present.{i}.{part}", role=role))
    return inputs, outputs


def example_caches(program: Program, batch: int, length: int) -> list[Tensor]:
    """Zeros for the inputs of `linear_caches`, on the program's device."""
    return [
        torch.zeros(
            (batch, layer.num_kv_heads, length, width),
            dtype=cache_dtype(program),
            device=program_device(program),
        )
        for layer in program.contract.layers
        for width in (layer.head_dim, layer.value_dim)
    ]


def cached_examples(program: Program, dtype: torch.dtype | None = None) -> tuple[list[Tensor], list[dict[int, Any]]]:
    """Inputs of a program with linear caches whose dynamic axes differ in size, and these axes with the ranges that they
    had.

    Args:
        dtype: of the caches, where it is not what it was.
    """
    dims: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    args, shapes = [], []
    for node, spec in zip(program.user_inputs(), program.contract.inputs, strict=True):
        dynamic = {}
        for axis, name in enumerate(spec.dims):
            if not isinstance(name, str):
                continue
            if name not in dims:
                low, high = _range(program, value_of(node).shape[axis])
                dims[name] = Dim(name, min=low, max=high)
                sizes[name] = min(high or 64, (2, 7, 11, 13)[len(sizes) % 4] + 13 * (len(sizes) // 4))
            dynamic[axis] = dims[name]
        shape = [item if isinstance(item, int) else sizes[item] for item in spec.dims]
        kind = dtype if dtype is not None and spec.role in CACHE_ROLES else value_of(node).dtype
        filled = torch.ones if spec.role == "attention_mask" else torch.zeros
        args.append(filled(shape, dtype=kind, device=program_device(program)))
        shapes.append(dynamic)
    return args, shapes


def _range(program: Program, size: Any) -> tuple[int, int | None]:
    """The least and the largest size of a dynamic axis; None: no largest."""
    found = program.exported.range_constraints[size.node.expr]
    import sympy

    low = int(found.lower) if isinstance(found.lower, sympy.Integer) else 0
    return low, int(found.upper) if isinstance(found.upper, sympy.Integer) else None
