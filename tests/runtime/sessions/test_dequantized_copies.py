"""Copies of packed weights, made by the kernel in the interpreter."""

from __future__ import annotations

import pytest
import torch
from interpreted import HAS_GPU
from rewrites import stirred
from stages import apply

from optc.compiler.ir.program import Program
from optc.compiler.kernels.cuda.linear import dequantized
from optc.compiler.ops.packed.cuda import dequantize_packed
from optc.passes.fusion.decode import FuseDecode
from optc.passes.fusion.rotary import FuseRotary
from optc.passes.kv_cache.paged import PageKVCache
from optc.passes.legalization.cuda import LegalizeCuda
from optc.passes.quantization.rtn import QuantizeRtn
from optc.runtime.sessions.dequantized_copies import keep_copies

pytestmark = pytest.mark.skipif(HAS_GPU, reason="the program is on the CPU, where kernels are interpreted")


@pytest.fixture(scope="module")
def program() -> Program:
    """One layer with 4-bit weights in groups of 32."""
    found = stirred("llama", layers=1)
    for step in (FuseRotary(), QuantizeRtn(bits=4, group_size=32), PageKVCache(), FuseDecode(), LegalizeCuda()):
        found = apply(step, found).program
    return found


def packed(program: Program) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """Packed weights, what they stand for in fp32, and its bytes."""
    found = []
    for node in program.calls(torch.ops.optc.fused_linear.default):
        if node.kwargs.get("format"):
            weight, scale, zero = (program.weight_of(item) for item in node.args[1:4])
            assert weight is not None
            assert scale is not None
            tensors = (program.weight(weight), program.weight(scale), None if zero is None else program.weight(zero))
            options = {"format": node.kwargs["format"], "group_size": node.kwargs.get("group_size", 0)}
            dense = dequantize_packed(*tensors, **options, dtype=torch.float32)
            found.append((tensors[0], dense, dense.nbytes))
    return found


def test_as_many_as_there_is_room_for(program: Program) -> None:
    weights = packed(program)
    assert len(weights) > 2
    assert keep_copies(program, 0) == 0
    room = weights[0][2] + weights[1][2]
    assert keep_copies(program, room + 4) <= room + 4
    assert all(weight not in dequantized._KEPT for weight, _, size in weights if size > room)
    total = sum(size for _, _, size in weights)
    assert keep_copies(program, total) == total
    for weight, dense, _ in weights:
        assert torch.equal(dequantized._KEPT[weight], dense)
