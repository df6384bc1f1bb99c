"""Moving programs: what names a device changes, the numbers stay."""

from __future__ import annotations

import torch
from rewrites import difference, stirred

from optc.compiler.ir.devices import tensor_float_32, to_device


def test_a_moved_program_computes_the_same() -> None:
    program = stirred("gemma2")
    moved = to_device(program, torch.device("cpu"))
    assert difference(program, moved) == 0
    assert moved.graph is not program.graph


def test_every_tensor_and_constant_device_moves() -> None:
    program = stirred("llama")
    moved = to_device(program, torch.device("meta"))
    assert {tensor.device.type for _, tensor in moved.weights()} == {"meta"}
    found = {
        str(item)
        for node in moved.graph.nodes
        for item in (*node.args, *node.kwargs.values())
        if isinstance(item, torch.device)
    }
    assert found == {"meta"}
    values = [
        node.meta["val"] for node in moved.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)
    ]
    assert {value.device.type for value in values} == {"meta"}
    assert {tensor.device.type for _, tensor in program.weights()} == {"cpu"}


def test_precision_is_put_back() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    with tensor_float_32():
        assert torch.backends.cuda.matmul.allow_tf32 is True
    assert torch.backends.cuda.matmul.allow_tf32 is before
