"""Keys and values of a linear cache, one tensor of each per layer: their places in a contract, and examples to trace with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optc.compiler.ir.contract import Input, Output
from optc.compiler.ir.devices import program_device
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.tokenwise import cache_dtype


def linear_caches(program: Program, length: int | str) -> tuple[list[Input], list[Output]]:
    """The inputs `past_key_values.N.key/value` [batch, kv heads, length, head size], and the outputs `present.N.key/value`."""
    dtype = str(cache_dtype(program)).removeprefix("torch.")
    inputs, outputs = [], []
    for i, layer in enumerate(program.contract.layers):
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
