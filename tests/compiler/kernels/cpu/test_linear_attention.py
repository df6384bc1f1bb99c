"""The C++ kernel of optc.cached_linear_attention against its Python reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import optc.compiler.ir.program  # noqa: F401  (registers the dialect)
from optc.compiler.kernels.cpu.library import build_library
from optc.compiler.kernels.cpu.linear_attention import LINEAR_ATTENTION, accepts
from optc.compiler.kernels.kernel import kernels_for
from optc.compiler.ops.library import reference

pytestmark = pytest.mark.slow  # the first build takes 10 s; later ones come from the user's cache
B, S, H, K, V = 2, 9, 3, 8, 5


@pytest.fixture(scope="module", autouse=True)
def kernel() -> None:
    torch.ops.load_library(str(build_library(kernels_for("cpu"))))


def _f(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("per_key", [False, True])
@pytest.mark.parametrize("beta", [None, torch.rand(B, S, H)])
@pytest.mark.parametrize("width", [1, V])
def test_kernel_equals_reference(per_key: bool, beta: Tensor | None, width: int) -> None:
    """Queries are expanded over heads, keys lie across: strides are read."""
    query = _f(B, S, 1, K).expand(B, S, H, K)
    key, value = _f(B, K, S, H).permute(0, 2, 3, 1) / 2, _f(B, H, S, width).transpose(1, 2)
    decay = -_f(B, S, H, K).abs() if per_key else -_f(B, S, H).abs()
    given = (query, key, value, decay, beta, _f(B, H, K, width))
    before = given[-1].clone()
    found = torch.ops.optc.cached_linear_attention(*given)
    for item, expected in zip(found, reference("cached_linear_attention")(*given), strict=True):
        assert float((item - expected).abs().max() / expected.abs().max()) <= LINEAR_ATTENTION.tolerance
    assert torch.equal(given[-1], before)


def test_what_it_takes() -> None:
    given = [_f(B, S, H, K), _f(B, S, H, K), _f(B, S, H, V), _f(B, S, H), None, _f(B, H, K, V)]
    assert accepts(given, {}) is None
    assert accepts([given[0].half(), *given[1:]], {}) == "argument 0 is torch.float16; the kernel takes torch.float32"
    with pytest.raises(RuntimeError, match="the state must be"):
        torch.ops.optc.cached_linear_attention(*given[:5], _f(B, H, V, K))
