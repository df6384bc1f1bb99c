"""The C++ kernel of optc.paged_attention_ against its Python reference."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bounds
import pytest
import torch
from paged_cases import CASES, Case, compare
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


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_reference(kernel: Callable[..., Tensor], name: str) -> None:
    assert compare(CASES[name], kernel) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_in_sixteen_bits(kernel: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """One rounding of the result: the arithmetic is in float32."""
    assert compare(Case(dtype=dtype, block_size=16, softcap=30.0), kernel) <= bounds.MARGIN


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
        "from test_paged_attention import CASES, KERNELS, build_library, compare\n"
        "torch.ops.load_library(str(build_library(KERNELS)))\n"
        "assert torch.backends.cpu.get_cpu_capability() == 'DEFAULT'\n"
        "op = torch.ops.optc.paged_attention_.default\n"
        "print(max(compare(CASES[name], op) for name in ('odd widths', 'softcap and window', 'long prefill')))\n"
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
