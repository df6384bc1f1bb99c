"""The Triton kernels of `fused_linear` against the reference: in the interpreter, and with real types on the GPU."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from interpreted import DEVICE, FLOATS, HAS_GPU, ON_GPU
from linear_cases import EXACT, FORMATS, OPTIONS, Case, check, knobs

from optc.compiler.kernels.cuda.fused_linear import FUSED_LINEAR, accepts
from optc.compiler.kernels.cuda.linear import dequantized, launch
from optc.compiler.kernels.cuda.linear.configurations import Gemv, Product, Shape, gemv_tiles, kind_for, tables
from optc.compiler.ops.packed.cuda import dequantize_packed

GEMV_TILES = {
    "one tile": Gemv(block_n=2, steps=3, width=512, depth=2, warps=4),
    "several": Gemv(block_n=2, steps=1, width=128, depth=2, warps=1),
    "unrolled": Gemv(block_n=2, steps=1, width=128, depth=1, warps=1, unrolled=True),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("name", "option", "tiles"),
    [
        *(("floats", option, "one tile") for option in OPTIONS),
        *(("int4 g128, zero points", option, "one tile") for option in ("plain", "layer", "everything")),
        *((name, "everything", "several") for name in ("floats", "int4 g128, zero points")),
        ("int4 g128, zero points", "everything", "unrolled"),
    ],
)
def test_gemv_options(name: str, option: str, tiles: str, dtype: torch.dtype) -> None:
    tokens, columns = (1, 256) if tiles == "one tile" else (2, 5 * 128)
    linear = Case(*FORMATS[name], **OPTIONS[option], tokens=tokens, columns=columns, dtype=dtype).linear()
    check(launch.gemv(linear, GEMV_TILES[tiles]), linear)


MORE = FORMATS if HAS_GPU else ("floats", "fp8", "int8 g32", "int4 g128, zero points")
"""A program is one token's: in the interpreter, where each takes its time, a format of each kernel has two, and several
tiles."""


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("name", "tiles"), [*((name, "one tile") for name in FORMATS), *((name, "several") for name in MORE)]
)
def test_gemv_formats(name: str, tiles: str, dtype: torch.dtype) -> None:
    """Two tokens, or a token in several tiles; a last tile that is not full in either direction."""
    tokens, columns = (2 if name in MORE else 1, 256) if tiles == "one tile" else (1, 5 * 128)
    options = {"norm": "rms", "activation": "silu", "gated": True, "residual": True}
    linear = Case(*FORMATS[name], **options, tokens=tokens, columns=columns, dtype=dtype).linear()
    check(launch.gemv(linear, GEMV_TILES[tiles]), linear, EXACT if columns == 256 else 2 * EXACT)


PRODUCT_TILES = {
    "alone": Product(block_n=32, split=1, stages=2, warps=4, block_k=64),
    "shared": Product(block_n=64, split=2, stages=3, warps=4, block_k=128),
    "joined": Product(block_n=32, split=2, stages=2, warps=4, block_k=64, joined=True),
}
PRODUCTS = [name for name in FORMATS if name not in ("int4 g32", "int4 g32, zero points")]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tiles", PRODUCT_TILES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_product_formats(name: str, tiles: str, dtype: torch.dtype) -> None:
    """Tokens that do not fill a block; counters of programs that share a block are zero again for the second call."""
    case = Case(*FORMATS[name], tokens=19, n=40, norm="rms", activation="silu", gated=True, residual=True, dtype=dtype)
    linear = case.linear()
    for _ in range(2 if PRODUCT_TILES[tiles].split > 1 else 1):
        y = launch.product(linear, PRODUCT_TILES[tiles])
        check(y, linear, FUSED_LINEAR.tolerance, rounded_tokens=linear.format in ("", "fp8"))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["fp8", "int4 g128, zero points"])
def test_product_options(name: str, option: str, dtype: torch.dtype) -> None:
    linear = Case(*FORMATS[name], **OPTIONS[option], tokens=3, dtype=dtype).linear()
    y = launch.product(linear, PRODUCT_TILES["shared"])
    check(y, linear, FUSED_LINEAR.tolerance, rounded_tokens=linear.format in ("", "fp8"))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", FORMATS)
def test_dequantized_for_cublas(name: str, dtype: torch.dtype) -> None:
    """The weight is that of the reference, bit for bit."""
    case = Case(*FORMATS[name], tokens=5, norm="layer", activation="gelu", bias=True, dtype=dtype)
    linear = case.linear()
    if linear.scale is not None:
        args = (linear.weight, linear.scale, linear.zero)
        expected = dequantize_packed(*args, format=linear.format, group_size=linear.group_size, dtype=dtype)
        assert torch.equal(launch.dequantize(linear), expected)
    check(launch.by_cublas(linear), linear, rounded_tokens=True, rounded_product=True)


def test_a_copy_is_taken_as_long_as_its_weight_lives() -> None:
    linear = Case(*FORMATS["int4 g128"], tokens=2).linear()
    copy = torch.full((linear.shape.n, linear.shape.k), 0.5, device=DEVICE)
    dequantized.keep(linear.weight, copy)
    alive = len(dequantized._KEPT)
    assert torch.equal(launch.by_cublas(linear), linear.x @ copy.t())
    assert not torch.equal(launch.by_cublas(linear._replace(weight=linear.weight.clone())), linear.x @ copy.t())
    assert launch.dequantize(linear._replace(x=linear.x.half())).dtype is torch.float16
    del linear
    gc.collect()
    assert len(dequantized._KEPT) == alive - 1


@pytest.mark.parametrize("name", ["floats", "int4 g128", "int8 per row"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_stay_so(name: str, value: float) -> None:
    """Fixed point would make a finite number of them."""
    case = Case(*FORMATS[name], tokens=2, n=2)
    for run, tiles in ((launch.gemv, GEMV_TILES["one tile"]), (launch.product, PRODUCT_TILES["alone"])):
        linear = case.linear()
        linear.x[1, 5] = value
        y = run(linear, tiles)  # type: ignore[arg-type]
        assert torch.isfinite(y).all(1).tolist() == [True, False]


@pytest.mark.parametrize("tokens", [1, 7, 40, 300])
@pytest.mark.parametrize("name", ["floats", "int4 g128"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_number_of_tokens(name: str, tokens: int, dtype: torch.dtype) -> None:
    """Through the choice of kernel; axes in front of K come back; tokens need not be contiguous."""
    linear = Case(*FORMATS[name], tokens=tokens, n=16, columns=128, norm="rms", dtype=dtype).linear()
    args, keywords = knobs(linear)
    x = linear.x.t().contiguous().t()[:, None]
    y = launch.fused_linear(x, *args[1:], **keywords)
    assert y.shape == (tokens, 1, 16)
    check(y[:, 0], linear, FUSED_LINEAR.tolerance, rounded_tokens=True)


def test_no_tokens() -> None:
    linear = Case().linear()
    args, keywords = knobs(linear)
    assert launch.fused_linear(linear.x[:0], *args[1:], **keywords).shape == (0, 3)


@pytest.mark.parametrize(
    ("case", "changes", "reason"),
    [
        (Case(), {}, None),
        (Case("int4", 128), {}, None),
        (Case("int4", 256), {}, None),
        (Case("fp8"), {}, None),
        (Case("int8", 96), {}, "groups of 96 columns; int8 has 32, 64, 128"),
        (Case("fp8"), {"group_size": 128}, "groups of 128 columns; fp8 has none"),
        (Case(), {"group_size": 128}, "groups of 128 columns; a weight without a format has none"),
        (Case("int4", 128), {"group_size": 64}, "2 scales per row of 256 columns in groups of 64"),
        (Case(columns=48), {}, "48 columns; the kernel takes multiples of 32 up to 32768"),
        (Case(columns=32800, n=1), {}, "32800 columns; the kernel takes multiples of 32 up to 32768"),
        (Case(), {"format": "int3"}, "weights of the format 'int3'; the kernel takes int8, int4, fp8"),
        (Case("int8"), {"format": "int4"}, "a weight of type int8 for the format 'int4', which holds uint8"),
        (Case(), {"activation": "mish"}, "no kernel has the norm '' or the activation 'mish'"),
        (Case(), {"norm": "group"}, "no kernel has the norm 'group' or the activation ''"),
        (Case(dtype=torch.float64), {}, "activations of type float64; the kernel takes bfloat16, float16, float32"),
    ],
)
def test_says_what_it_takes(case: Case, changes: dict[str, Any], reason: str | None) -> None:
    args, keywords = knobs(case.linear())
    assert accepts(args, keywords | changes) == reason


def test_short_groups_are_left_to_cublas() -> None:
    """The tensor cores' step is longer than a group of 32 nibbles."""
    linear = Case("int4", 32).linear()
    assert (
        launch.product_obstacle(linear, PRODUCT_TILES["alone"])
        == "groups of 32 columns are shorter than a step of the tensor cores"
    )
    assert launch.product_obstacle(Case("int8", 32).linear(), PRODUCT_TILES["alone"]) is None
    odd = Case("int4", 0, columns=96).linear()
    assert launch.product_obstacle(odd, PRODUCT_TILES["alone"]) == "96 columns are not a multiple of 128"


def test_products_of_floats_are_left_to_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of float32, and where a processor's shared memory is too small for the tiles."""
    tiles = PRODUCT_TILES["shared"]  # three steps of 128 columns of 64 rows, and of the up rows, and 16 tokens
    assert launch.product_obstacle(Case(tokens=3, dtype=torch.float32).linear(), tiles) == "float32 has no tensor cores"
    linear = Case(tokens=3, gated=True, dtype=torch.bfloat16).linear()
    assert launch.product_obstacle(linear, tiles) is None
    monkeypatch.setattr(launch, "_shared_memory", lambda _: 100_000)
    wanted = 3 * 128 * (2 * 64 + 16) * 2
    reason = f"the tiles take {wanted} bytes of shared memory of 100000"
    assert launch.product_obstacle(linear, tiles) == reason


def test_tiles_are_those_of_the_nearest_shape() -> None:
    shape, expected = next(item for item in tables().gemv if item[0].format == "int4" and item[0].gated)
    assert gemv_tiles(shape) == expected
    assert gemv_tiles(replace(shape, n=shape.n - 100, k=shape.k + 32)) == expected
    assert expected.fitted(512).steps == expected.steps
    assert Gemv(block_n=4, steps=7, width=512, depth=2, warps=4).fitted(640).steps == 1
    assert Gemv(block_n=4, steps=7, width=512, depth=2, warps=4).fitted(96).width == 128
    small = Gemv(block_n=4, steps=7, width=512, depth=2, warps=4).fitted(20, launch.WORDS_PER_WARP)
    assert (small.width, small.warps, small.steps) == (128, 1, 7)
    near = Shape(format="int4", n=64, k=4096, gated=False)
    assert [near.distance(replace(near, **change)) for change in ({"n": 128}, {"k": 2048}, {"gated": True})] == [
        1,
        4,
        2,
    ]
    assert [kind_for(replace(shape, m=tokens)) for tokens in (1, 16, 4096)] == ["gemv", "product", None]
    floats = Shape(format="", n=1024, k=512, gated=False)  # a few tokens of a small weight read it once each
    assert [kind_for(replace(floats, m=tokens)) for tokens in (1, 5, 8, 9, 65)] == [*["gemv"] * 3, "product", None]
    assert kind_for(replace(floats, n=4096, k=4096, m=2)) == "product"


@pytest.mark.parametrize("mark", [pytest.param(None, marks=ON_GPU)])
def test_op_runs_the_kernel(mark: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA tensors; what is refused goes to the reference."""
    assert HAS_GPU
    calls: list[str] = []
    monkeypatch.setattr(launch, "gemv", lambda linear, _: calls.append(linear.format) or linear.new_result())
    args, keywords = knobs(Case("int8", dtype=torch.bfloat16).linear())
    torch.ops.optc.fused_linear(*args, **keywords)
    wide, keywords = knobs(Case(dtype=torch.float64).linear())
    torch.ops.optc.fused_linear(*wide, **keywords)
    assert calls == ["int8"]
