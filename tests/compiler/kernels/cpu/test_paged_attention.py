"""The C++ kernel of optc.paged_attention_ against its Python reference."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bounds
import pytest
import torch
from torch import Tensor

import optc.compiler.ir.program  # noqa: F401  (registers the dialect)
from optc.compiler.kernels.cpu.library import build_library
from optc.compiler.kernels.cpu.paged_attention import PAGED_ATTENTION
from optc.compiler.kernels.kernel import kernels_for
from optc.compiler.ops.dialect.paged import PADDING
from optc.compiler.ops.library import reference

KERNELS = kernels_for("cpu")
TOLERANCE = PAGED_ATTENTION.tolerance

pytestmark = pytest.mark.slow  # the first build takes 10 s; later ones come from the user's cache


@pytest.fixture(scope="module")
def kernel() -> Callable[..., Tensor]:
    torch.ops.load_library(str(build_library(KERNELS)))
    return torch.ops.optc.paged_attention_.default


@dataclass
class Case:
    """Ragged requests over shuffled blocks. Slots without a token hold NaN, unused table entries nonsense."""

    new: tuple[int, ...] = (1, 37, 1, 5)
    past: tuple[int, ...] = (200, 0, 3, 64)
    heads: int = 4
    kv_heads: int = 2
    width: int = 16
    value_width: int = 16
    block_size: int = 4
    window: int = 0
    softcap: float = 0.0
    dtype: torch.dtype = torch.float32

    def inputs(self) -> tuple[list[Tensor], dict[str, float]]:
        generator = torch.Generator().manual_seed(7)
        totals = [a + b for a, b in zip(self.new, self.past, strict=True)]
        needed = [-(-n // self.block_size) for n in totals]
        order = torch.randperm(sum(needed) + 2, generator=generator).int()
        tables = torch.full((len(totals), max(needed)), -9, dtype=torch.int32)
        slots, used, start = [], [], 0
        for row, (count, total, past) in enumerate(zip(needed, totals, self.past, strict=True)):
            tables[row, :count] = order[start : start + count]
            start += count
            position = torch.arange(total)
            slot = tables[row, position // self.block_size] * self.block_size + position % self.block_size
            slots.append(slot[past:])
            used.append(slot)
        pools = []
        for width in (self.width, self.value_width):
            pool = torch.randn((len(order), self.block_size, self.kv_heads, width), generator=generator)
            dead = torch.ones(len(order) * self.block_size, dtype=torch.bool)
            dead[torch.cat(used)] = False
            pool.view(-1, self.kv_heads, width)[dead] = float("nan")
            pools.append(pool.to(self.dtype))
        shapes = [(self.heads, self.width), (self.kv_heads, self.width), (self.kv_heads, self.value_width)]
        qkv = [torch.randn((sum(self.new), *s), generator=generator).to(self.dtype) for s in shapes]
        starts = torch.tensor([0, *self.new]).cumsum(0).int()
        lengths = torch.tensor(totals, dtype=torch.int32)
        knobs = {"scale": self.width**-0.5, "window": self.window, "softcap": self.softcap}
        return [*qkv, *pools, torch.cat(slots).long(), tables, lengths, starts], knobs

    def compare(self, kernel: Callable[..., Tensor]) -> float:
        """Largest difference from the reference in float64; both must write the same pools. In 16 bits, as a multiple
        of what rounding the result once makes."""
        inputs, knobs = self.inputs()
        k_pool, v_pool = inputs[3].clone(), inputs[4].clone()
        found = kernel(*inputs[:3], k_pool, v_pool, *inputs[5:], **knobs)
        exact = [item.double() if item.is_floating_point() else item for item in inputs]
        exact[6] = exact[6].clamp(min=0)  # the reference reads the whole table before it cuts it
        expected = reference("paged_attention_")(*exact, **knobs)
        assert found.dtype == self.dtype
        assert found.shape == (sum(self.new), self.heads, self.value_width)
        for pool, wanted in ((k_pool, exact[3]), (v_pool, exact[4])):
            torch.testing.assert_close(pool.double(), wanted, rtol=0, atol=0, equal_nan=True)
        difference = float((found.double() - expected).abs().max())
        if self.dtype is torch.float32:
            return difference
        return difference / float((expected.to(self.dtype).double() - expected).abs().max())


CASES = {
    "plain": Case(),
    "block size 1": Case(block_size=1),
    "block size 16": Case(block_size=16),
    "window 1": Case(window=1),
    "window 8": Case(window=8, block_size=16),
    "window over tiles": Case(window=100),
    "softcap": Case(softcap=5.0),
    "softcap and window": Case(softcap=50.0, window=70),
    "one head per group": Case(heads=2),
    "seven heads per group": Case(heads=14),
    "more heads than a tile has rows": Case(heads=80, kv_heads=2),
    "odd widths": Case(width=20, value_width=12),
    "wide": Case(width=128, value_width=128, heads=8),
    "long prefill": Case(new=(150,), past=(0,)),
    "decode": Case(new=(1,) * 5, past=(0, 1, 63, 64, 130)),
}


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_reference(kernel: Callable[..., Tensor], name: str) -> None:
    assert CASES[name].compare(kernel) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_in_sixteen_bits(kernel: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """One rounding of the result: the arithmetic is in float32."""
    assert Case(dtype=dtype, block_size=16, softcap=30.0).compare(kernel) <= bounds.MARGIN


@pytest.mark.parametrize("padding", [(0,), (40, 41, 42, 43), (0, 3, 38)])
def test_padding_is_not_written(kernel: Callable[..., Tensor], padding: tuple[int, ...]) -> None:
    """Tokens of slot -1: a request of one, a whole request of several, and some of requests with real tokens."""
    inputs, knobs = Case(new=(1, 37, 1, 5), past=(200, 0, 3, 64)).inputs()
    inputs[5][list(padding)] = PADDING
    for request in (0, 3) if padding != (0, 3, 38) else (0,):  # neither length nor blocks of padding are looked at
        if all(token in padding for token in range(int(inputs[8][request]), int(inputs[8][request + 1]))):
            inputs[6][request], inputs[7][request] = -9, 1 << 20
    pools = [pool.clone() for pool in inputs[3:5]]
    found = kernel(*inputs[:3], *pools, *inputs[5:], **knobs)
    wanted = [pool.clone() for pool in inputs[3:5]]
    inputs[6].clamp_(min=0)
    expected = reference("paged_attention_")(*inputs[:3], *wanted, *inputs[5:], **knobs)
    rows = torch.arange(len(found))
    assert torch.equal(found[list(padding)], torch.zeros_like(found[list(padding)]))
    real = [token for token in rows.tolist() if token not in padding]
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=TOLERANCE, equal_nan=True)
    for pool, other, old in zip(pools, wanted, inputs[3:5], strict=True):
        torch.testing.assert_close(pool, other, rtol=0, atol=0, equal_nan=True)
        changed = (pool.nan_to_num(7.0) != old.nan_to_num(7.0)).flatten(2).any(-1)
        assert int(changed.sum()) == len(real)


def test_baseline_instructions(tmp_path: Path) -> None:
    """The code for processors without AVX2 gives the same numbers (in a process of its own)."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, torch; sys.path[:0] = sys.argv[1:]\n"
        "from test_paged_attention import CASES, KERNELS, build_library\n"
        "torch.ops.load_library(str(build_library(KERNELS)))\n"
        "assert torch.backends.cpu.get_cpu_capability() == 'DEFAULT'\n"
        "op = torch.ops.optc.paged_attention_.default\n"
        "print(max(CASES[name].compare(op) for name in ('odd widths', 'softcap and window', 'long prefill')))\n"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    command = [sys.executable, str(script), str(Path(__file__).parent), str(Path(bounds.__file__).parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) <= TOLERANCE


def _broken(index: int, value: Any) -> tuple[list[Tensor], dict[str, float]]:
    inputs, knobs = Case().inputs()
    inputs[index] = value(inputs[index])
    return inputs, knobs


def _set(place: Any, value: int) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[place] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (5, _set(0, 1 << 40), "is outside the pool"),
        (5, _set(0, -2), "slot -2 is outside the pool"),
        (6, _set((0, 0), 1 << 20), "block 1048576 is outside the pool"),
        (6, _set((0, 0), -2), "block -2 is outside the pool"),
        (7, _set(1, 3), "has 37 new tokens, but a context of 3"),
        (7, _set(0, 1 << 20), "exceeds its block table"),
        (8, _set(-1, 99), "cu_seqlens must run from 0"),
        (8, _set(1, 40), "cu_seqlens must not fall"),
        (6, lambda table: table.long(), "block_tables, context_lens and cu_seqlens int32"),
        (3, lambda pool: pool.double(), "differ in type"),
        (4, lambda pool: pool.transpose(0, 1), "the pools"),
        (0, lambda q: q[:, :3], "heads do not divide"),
    ],
)
def test_bad_indices_are_refused(
    kernel: Callable[..., Tensor], index: int, change: Callable[[Tensor], Tensor], message: str
) -> None:
    """They would read or write memory of others."""
    inputs, knobs = _broken(index, change)
    with pytest.raises(RuntimeError, match=message):
        kernel(*inputs, **knobs)
