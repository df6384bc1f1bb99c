"""Up to 16 tokens times packed integers, by warps that load what they multiply: against the reference, in the interpreter
and with real types on the GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from interpreted import DEVICE, FLOATS
from linear_cases import FORMATS, OPTIONS, Case, check

from optc.compiler.kernels.cuda.fused_linear import FUSED_LINEAR
from optc.compiler.kernels.cuda.linear import configurations, launch
from optc.compiler.kernels.cuda.linear.configurations import Direct, Product, Shape, Tables
from optc.compiler.kernels.cuda.linear.fragments import load_again, multiply, tl, triton

ALONE = Direct(tiles=2, across=1, warps=4, split=1, depth=1)
SHARED = Direct(tiles=1, across=2, warps=4, split=2, depth=1)
TAKEN = [
    "int8 per row",
    "int8 per row, zero points",
    "int8 g128, zero points",
    "int4 per row",
    "int4 g128",
    "int4 g128, zero points",
]


@triton.jit
def _multiply(a, b, c, WARPS: tl.constexpr, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    lane = tl.arange(0, 32 * WARPS)
    left = load_again(a + lane * 16, NATIVE)
    right = load_again(b + lane * 16, NATIVE)
    zero = lane * 0
    found = multiply(left[0], left[1], left[2], left[3], right[0], right[1], zero, zero, zero, lane, NATIVE)
    for i in tl.static_range(4):
        tl.store(c + 4 * lane + i, found[i])


def test_products_are_spread_as_ptx_says() -> None:
    """Two warps, each with matrices of its own; what is added is added."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-128, 128, (2, 16, 32), dtype=torch.int8, generator=generator)
    b = torch.randint(-128, 128, (2, 32, 8), dtype=torch.int8, generator=generator)
    left, right = torch.empty(2, 32, 16, dtype=torch.int8), torch.zeros(2, 32, 16, dtype=torch.int8)
    expected = torch.empty(2, 32, 4, dtype=torch.int32)
    product = torch.einsum("wik,wkj->wij", a.long(), b.long()).int()
    for thread in range(32):
        g, t = divmod(thread, 4)
        parts = [a[:, row, start : start + 4] for start in (4 * t, 16 + 4 * t) for row in (g, g + 8)]
        left[:, thread] = torch.cat(parts, 1)
        right[:, thread, :8] = torch.cat([b[:, 4 * t : 4 * t + 4, g], b[:, 16 + 4 * t : 20 + 4 * t, g]], 1)
        expected[:, thread] = product[:, [g, g, g + 8, g + 8], [2 * t, 2 * t + 1, 2 * t, 2 * t + 1]]
    expected[:, :, 3] += torch.arange(64).view(2, 32)
    found = torch.empty_like(expected).to(DEVICE)
    _multiply[(1,)](left.to(DEVICE), right.to(DEVICE), found, WARPS=2, NATIVE=found.is_cuda, num_warps=2)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", TAKEN)
def test_formats(name: str, dtype: torch.dtype) -> None:
    """Rows and tokens that fill nothing, blocks of columns that do not come out even."""
    options = {"norm": "rms", "activation": "silu", "gated": True, "residual": True}
    linear = Case(*FORMATS[name], **options, tokens=5, n=12, columns=640, dtype=dtype).linear()
    check(launch.direct(linear, ALONE), linear, FUSED_LINEAR.tolerance)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["int8 per row, zero points", "int4 g128, zero points"])
def test_programs_share_columns(name: str, dtype: torch.dtype) -> None:
    """And warps rows; more than 8 tokens; counters are zero again for a second call."""
    linear = Case(*FORMATS[name], tokens=9, n=20, columns=640, bias=True, dtype=dtype).linear()
    for _ in range(2):
        check(launch.direct(linear, SHARED), linear, FUSED_LINEAR.tolerance)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("option", ["plain", "layer", "everything"])
def test_options(option: str, dtype: torch.dtype) -> None:
    linear = Case(*FORMATS["int4 g128"], **OPTIONS[option], tokens=3, n=20, dtype=dtype).linear()
    check(launch.direct(linear, Direct(tiles=2, across=1, warps=2, split=1, depth=3)), linear, FUSED_LINEAR.tolerance)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_stay_so(value: float) -> None:
    linear = Case(*FORMATS["int4 g128"], tokens=2, n=16).linear()
    linear.x[1, 5] = value
    assert torch.isfinite(launch.direct(linear, ALONE)).all(1).tolist() == [True, False]


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case("int4", 128, tokens=16), None),
        (Case("int8", 0, tokens=16), None),
        (Case("int4", 128, tokens=17), "17 tokens of 16"),
        (Case("int4", 64), "groups of 64 of 256 columns; it takes 128 at a time"),
        (Case("int4", 0, columns=96), "groups of 0 of 96 columns; it takes 128 at a time"),
        (Case("fp8"), "a weight of the format 'fp8'"),
    ],
)
def test_says_what_it_takes(case: Case, reason: str | None) -> None:
    assert launch.direct_obstacle(case.linear()) == reason


def test_the_nearer_table_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what was measured for this product and for that."""
    at_8, at_16 = (Shape(format="int4", n=4096, k=4096, gated=False, m=m) for m in (8, 16))
    product = Product(block_n=64, split=1, stages=4, warps=4)
    made = Tables({}, (), ((at_8, product), (at_16, product)), ((at_16, ALONE),))
    monkeypatch.setattr(configurations, "tables", lambda: made)
    direct_tiles = configurations.direct_tiles.__wrapped__
    assert direct_tiles(at_16) == ALONE
    assert direct_tiles(at_8) is None
    assert direct_tiles(replace(at_16, m=13)) == ALONE
    assert direct_tiles(replace(at_16, m=17)) is None
    assert direct_tiles(replace(at_16, format="int8")) is None
