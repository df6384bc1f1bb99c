"""The product of few rows against torch's, and against itself: what a row gives does not depend on the others."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from optc.compiler.kernels.cpu.library import build_library
from optc.compiler.kernels.cpu.linear_few import LINEAR_FEW, accepts

ROWS = (*range(1, 10), 16, 17, 20, 21)
"""Of activations: up to eight at a time, up to twenty in parts, and more by BLAS."""
SIZES = ((40, 64), (33, 37), (1, 8), (7, 3))
"""Rows and columns of the weight: whole vectors, and what is left of them."""


@functools.cache
def kernel() -> Callable[..., Tensor]:
    torch.ops.load_library(str(build_library([LINEAR_FEW])))
    return torch.ops.optc.linear_few.default


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def largest_error(op: Callable[..., Tensor]) -> float:
    """Over rows and sizes, as a share of the largest output."""
    found = 0.0
    for (count, columns), rows, biased in itertools.product(SIZES, ROWS, (False, True)):
        x, weight, bias = drawn(rows, columns), drawn(count, columns), drawn(count) if biased else None
        wanted = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
        found = max(found, float((op(x, weight, bias) - wanted).abs().max() / wanted.abs().max()))
    return found


def test_products_are_those_of_torch() -> None:
    assert largest_error(kernel()) <= 3e-6


def test_a_row_gives_the_same_bits_whatever_is_beside_it() -> None:
    for count, columns in SIZES:
        x, weight, bias = drawn(20, columns), drawn(count, columns), drawn(count)
        alone = torch.cat([kernel()(row[None], weight, bias) for row in x])
        for rows in ROWS[1:-1]:
            assert torch.equal(kernel()(x[:rows], weight, bias), alone[:rows])


def test_shapes() -> None:
    """More than two dimensions, no rows, and weights and activations that are no neighbours in memory."""
    x, weight = drawn(2, 3, 16), drawn(16, 20)
    wanted = torch.nn.functional.linear(x, weight.t())
    torch.testing.assert_close(kernel()(x, weight.t(), None), wanted)
    torch.testing.assert_close(kernel()(x[:, ::2], weight.t(), None), wanted[:, ::2])
    assert kernel()(x[:0], weight.t(), None).shape == (0, 3, 20)


def test_other_instruction_sets() -> None:
    """The code for lesser processors (in a process of its own)."""
    script = (
        "import sys, torch; sys.path[:0] = sys.argv[1:]\n"
        "import test_linear_few as t\n"
        "print(torch.backends.cpu.get_cpu_capability(), t.largest_error(t.kernel()))\n"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    command = [sys.executable, "-c", script, os.path.dirname(__file__)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    name, error = done.stdout.split()
    assert name == "DEFAULT"
    assert float(error) <= 3e-6


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(4, 5), None), "x must end in 5 columns"),
        ((torch.zeros(2, 5), torch.zeros(4, 5), torch.zeros(3)), r"bias must be float32 \[4\]"),
        ((torch.zeros(2, 5).half(), torch.zeros(4, 5).half(), None), "takes float32"),
    ],
)
def test_what_does_not_fit_is_refused(args: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        kernel()(*args)


def test_types() -> None:
    assert accepts((torch.zeros(1), torch.zeros(1), None), {}) is None
    assert accepts((torch.zeros(1), torch.zeros(1).half(), None), {}) is not None
