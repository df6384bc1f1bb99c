"""The C++ kernel of optc.paged_tree_attention_ against its Python reference."""

from __future__ import annotations

from collections.abc import Callable

import bounds
import pytest
import torch
from paged_cases import CASES, Case, compare
from torch import Tensor
from trees import bits_of

import optc.compiler.ir.program  # noqa: F401  (registers the dialect)
from optc.compiler.kernels.cpu.library import build_library
from optc.compiler.kernels.cpu.paged_attention import PAGED_TREE_ATTENTION
from optc.compiler.kernels.kernel import kernels_for
from optc.compiler.ops.dialect.paged_tree import CAUSAL

pytestmark = pytest.mark.slow  # the first build takes 10 s; later ones come from the user's cache


@pytest.fixture(scope="module")
def kernel() -> Callable[..., Tensor]:
    torch.ops.load_library(str(build_library(kernels_for("cpu"))))
    return torch.ops.optc.paged_tree_attention_.default


def trees(case: Case) -> Tensor:
    """A tree of each request of up to 63 new tokens, of random parents; others are none."""
    generator = torch.Generator().manual_seed(5)
    found: list[int] = []
    for count in case.new:
        parents = [-1, *(int(torch.randint(0, token, (1,), generator=generator)) for token in range(1, count))]
        found += bits_of(parents) if count <= 63 else [CAUSAL] * count
    return torch.tensor(found)


def difference(case: Case, kernel: Callable[..., Tensor]) -> float:
    """See `compare`."""
    return compare(case, kernel, "paged_tree_attention_", trees(case))


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_reference(kernel: Callable[..., Tensor], name: str) -> None:
    assert difference(CASES[name], kernel) <= PAGED_TREE_ATTENTION.tolerance


def test_the_largest_tree(kernel: Callable[..., Tensor]) -> None:
    case = Case(new=(63, 1, 62), past=(65, 0, 0), window=70)
    assert difference(case, kernel) <= PAGED_TREE_ATTENTION.tolerance


def test_kernel_in_sixteen_bits(kernel: Callable[..., Tensor]) -> None:
    assert difference(Case(dtype=torch.bfloat16, block_size=16), kernel) <= bounds.MARGIN


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ([2, 3, 5], "token 0 of request 0 sees 2, which does not end with itself"),
        ([1, 1, 5], "token 1 of request 0 sees 1"),
        ([1, 3, 13], "token 2 of request 0 sees 13"),
        ([1, -2, 5], "token 1 of request 0 sees -2"),
    ],
)
def test_what_is_no_tree_is_refused(kernel: Callable[..., Tensor], bits: list[int], message: str) -> None:
    inputs, knobs = Case(new=(3,), past=(4,)).inputs()
    with pytest.raises(RuntimeError, match=message):
        kernel(*inputs, torch.tensor(bits), **knobs)
    with pytest.raises(RuntimeError, match="tree must be int64, one for each token"):
        kernel(*inputs, torch.tensor([1, 3, 7]).int(), **knobs)
