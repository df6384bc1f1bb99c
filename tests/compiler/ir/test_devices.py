"""Moving programs: what names a device changes, the numbers stay."""

from __future__ import annotations

import pytest
import torch
from rewrites import stirred

from optc.compiler.ir import devices
from optc.compiler.ir.devices import tensor_float_32, to_device


def test_a_program_that_is_there_is_returned_as_it_is() -> None:
    program = stirred("llama")
    assert to_device(program, torch.device("cpu")) is program


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
    values = [node.meta["val"] for node in moved.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert {value.device.type for value in values} == {"meta"}
    assert {tensor.device.type for _, tensor in program.weights()} == {"cpu"}


def test_precision_is_put_back() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    with tensor_float_32():
        assert torch.backends.cuda.matmul.allow_tf32 is True
    assert torch.backends.cuda.matmul.allow_tf32 is before


def test_products_of_onednn_are_taken_where_they_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    for exact in (True, False):
        monkeypatch.setattr(devices, "_onednn_is_exact", lambda exact=exact: exact)
        with devices.onednn_products():
            assert setting.fp32_precision == ("bf16" if exact else before)
        assert setting.fp32_precision == before


def test_rounded_factors_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bfloat16, as a CPU with units for it would round them."""
    product = torch.Tensor.__matmul__

    def rounded(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if left.dtype is torch.float32:
            left, right = left.bfloat16().float(), right.bfloat16().float()
        return product(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not devices._onednn_is_exact.__wrapped__()
