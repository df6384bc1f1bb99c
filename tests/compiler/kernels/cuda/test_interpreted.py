"""What tests put in place of GPU instructions in Triton's interpreter, against the code of the kernels' own functions."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from interpreted import GENERIC_REDUCE, HAS_GPU, InterpretedFunction, ReduceOps, _written

from optc.compiler.kernels.cuda import primitives
from optc.compiler.kernels.cuda.primitives import dot_bytes, nan_maximum, permute_bytes
from optc.compiler.kernels.cuda.sums import _add_two

pytestmark = pytest.mark.skipif(HAS_GPU, reason="the interpreter is for hosts without a GPU")


@triton.jit
def _run(a, b, c, found, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    x, y, z = tl.load(a + at), tl.load(b + at), tl.load(c + at)
    tl.store(found + at, dot_bytes(x, y, z, False))
    tl.store(found + COUNT + at, permute_bytes(x, y, 0x5140, False))
    tl.store(found + 2 * COUNT + at, permute_bytes(x, y, 0x7632, False))
    tl.store(found + 3 * COUNT + at, dot_bytes(x, 0x01010101, z, False))


def test_instructions_are_what_the_functions_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one's arguments differ in shape, which is left to the function as it is written."""
    words = [torch.randint(-(2**31), 2**31, (64,), dtype=torch.int32) for _ in range(3)]
    words[0][0], words[1][0] = -(2**31), -0x7F7F7F80
    fast, slow = torch.empty(256, dtype=torch.int32), torch.empty(256, dtype=torch.int32)
    _run[(1,)](*words, fast, 64)
    calls = []
    for name in ("dot_bytes", "permute_bytes"):
        function = getattr(primitives, name)

        def written(*arguments: object, name: str = name) -> object:
            calls.append(name)
            return _written(name)(*arguments)

        monkeypatch.setitem(InterpretedFunction.rewritten_fn, function.fn, written)
    _run[(1,)](*words, slow, 64)
    assert len(calls) == 4
    assert torch.equal(fast, slow)
    a, b = (word.view(torch.int8).view(64, 4).long() for word in words[:2])
    bytes_ = torch.cat([a, b], 1)[:, [0, 4, 1, 5]].to(torch.int8).contiguous().view(torch.int32)[:, 0]
    assert torch.equal(fast[64:128], bytes_)
    assert torch.equal(fast[:64], ((a * b).sum(1) + words[2]).to(torch.int32))


@triton.jit
def _reduce(a, found):
    rows, columns = tl.arange(0, 8), tl.arange(0, 4)
    block = tl.load(a + rows[:, None] * 4 + columns[None, :])
    tl.store(found + columns, tl.reduce(block, 0, nan_maximum))
    tl.store(found + 8 + rows, tl.reduce(block, 1, nan_maximum))
    left, right = tl.reduce((block, -block), 0, _add_two)
    tl.store(found + 16 + columns, left)
    tl.store(found + 20 + columns, right)
    tl.store(found + 24, tl.reduce(tl.load(a + rows), 0, nan_maximum))
    tl.store(found + 32 + rows[:, None], tl.reduce(block, 1, nan_maximum, keep_dims=True))


def test_reductions_by_halves_are_those_by_single_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.arange(32.0).flip(0).view(8, 4)[torch.randperm(8)]  # sums of whole numbers: equal in any order
    values[3, 2] = float("nan")
    fast, slow = torch.zeros(40), torch.zeros(40)
    _reduce[(1,)](values, fast)
    monkeypatch.setattr(ReduceOps, "generic_reduce", GENERIC_REDUCE)
    _reduce[(1,)](values, slow)
    torch.testing.assert_close(fast, slow, rtol=0, atol=0, equal_nan=True)
    assert fast.isnan().tolist() == [index in (2, 11, 18, 22, 35) for index in range(40)]
    torch.testing.assert_close(fast[:4], values.amax(0), rtol=0, atol=0, equal_nan=True)
