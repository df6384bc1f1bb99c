"""Rounding to nearest: cases computed by hand, and bounds for any weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import optc.compiler.ops  # noqa: F401  (registers optc.dequantize)
from optc.compiler.diagnostics import InputError, UsageError
from optc.compiler.formats import integer
from optc.compiler.formats.group_sizes import BITS, check_group_size, default_group_size
from optc.compiler.formats.integer import _stored_scale, check_finite_weight, quantize_groups

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _restore(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> Tensor:
    codes, scale, zero = quantize_groups(weight, bits, group_size, symmetric)
    return torch.ops.optc.dequantize(codes, scale, zero, bits=bits, group_size=group_size)


def _excess(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> float:
    """By how much the largest error exceeds its bound, in units of the scale; without the rounding of the product.

    The bound is half a step; asymmetric, all steps together may fall short of the range by the scale's rounding as
    well: by half the distance to the next scale each, and among float16's subnormals by half a step at most.
    """
    codes, scale, zero = quantize_groups(weight, bits, group_size, symmetric)
    assert scale.dtype is weight.dtype
    assert int(codes.max()) < 2**bits
    size = group_size or weight.shape[1]
    middle = 2 ** (bits - 1) if zero is None else zero.double().repeat_interleave(size, 1)
    step = scale.double().repeat_interleave(size, 1)
    facts = torch.finfo(weight.dtype)
    spacing = facts.smallest_normal * facts.eps
    top = 2**bits - 1
    short = top * (spacing / step).clamp(max=1 / top).clamp(min=facts.eps) / 2
    most = 0.501 + (torch.zeros_like(short) if symmetric else short)
    return float(((codes.double() - middle - weight.double() / step).abs() - most).max())


def test_symmetric_by_hand() -> None:
    weight = torch.tensor([[7.0, -3.4, 0.5, -7.0], [1.4, 0.0, -0.1, 0.3]])
    codes, scale, zero = quantize_groups(weight, 4, 0, True)
    assert zero is None
    torch.testing.assert_close(scale, torch.tensor([[1.0], [0.2]]))
    # 0.5 rounds to even; 0.3 / 0.2 = 1.5 in real numbers, and just above in float32.
    assert codes.tolist() == [[15, 5, 8, 1], [15, 8, 8, 10]]
    assert codes.dtype is torch.uint8


def test_asymmetric_by_hand() -> None:
    weight = torch.tensor([[-1.0, 0.0, 2.0, 0.4], [1.0, 2.0, 3.0, 3.0]])
    codes, scale, zero = quantize_groups(weight, 2, 0, False)
    assert zero is not None
    assert scale.tolist() == [[1.0], [1.0]]
    assert zero.tolist() == [[1], [0]]  # the range of a positive row starts at 0
    assert codes.tolist() == [[0, 1, 3, 1], [1, 2, 3, 3]]


def test_two_bits_symmetric_is_ternary() -> None:
    codes, scale, _ = quantize_groups(torch.tensor([[3.0, -1.4, 1.6, -3.0]]), 2, 0, True)
    assert (scale.tolist(), codes.tolist()) == ([[3.0]], [[3, 2, 3, 1]])


def test_groups_run_along_columns() -> None:
    weight = torch.tensor([[1.0, 1.0, 127.0, 0.0]])
    codes, scale, _ = quantize_groups(weight, 8, 2, True)
    torch.testing.assert_close(scale, torch.tensor([[1 / 127, 1.0]]))
    assert codes.tolist() == [[255, 255, 255, 128]]
    _, whole, _ = quantize_groups(weight, 8, 0, True)
    assert whole.tolist() == [[1.0]]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_zeros_stay_zero(symmetric: bool, dtype: torch.dtype) -> None:
    weight = torch.zeros((2, 8), dtype=dtype)
    _, scale, _ = quantize_groups(weight, 4, 4, symmetric)
    assert scale.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert torch.equal(_restore(weight, 4, 4, symmetric), weight)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_magnitudes(dtype: torch.dtype, bits: int, symmetric: bool) -> None:
    facts = torch.finfo(dtype)
    # Half of the largest: an integer zero point may reach a third beyond the range it covers.
    for size in (facts.max / 2, facts.smallest_normal, facts.smallest_normal * facts.eps):
        weight = torch.tensor([[size, -size, 0.0, size]], dtype=dtype)
        assert bool(torch.isfinite(_restore(weight, bits, 0, symmetric)).all())
        assert _excess(weight, bits, 0, symmetric) <= 0


def test_a_subnormal_scale_falls_short_by_hand() -> None:
    """The range is 255 steps of 200.28 spacings; 255 of 200 are short of it by 0.36, and the zero point is 0.44 off."""
    spacing = 2.0**-24
    weight = torch.tensor([[-20112.0, 30960.0]]) * spacing
    codes, scale, zero = quantize_groups(weight.half(), 8, 0, False)
    assert zero is not None
    assert (float(scale) / spacing, zero.tolist(), codes.tolist()) == (200, [[101]], [[0, 255]])  # 154.8 becomes 154
    assert -0.3 < _excess(weight.half(), 8, 0, False) <= 0


def test_small_fp16_groups_do_not_clip() -> None:
    weight = torch.full((1, 32), 6.1e-5, dtype=torch.float16)
    codes, scale, _ = quantize_groups(weight, 8, 0, True)
    # 6.1e-5 / 127 is 8.06 spacings of float16's subnormals; 8 would leave 128 steps for 127 codes.
    assert float(scale) == 9 * 2.0**-24
    assert codes.unique().tolist() == [128 + 114]


def test_one_column_and_one_row() -> None:
    weight = torch.tensor([[-2.0], [3.0], [0.0]])
    assert torch.equal(_restore(weight, 4, 0, True), weight)
    assert torch.equal(_restore(weight, 4, 1, False), weight)
    assert _restore(torch.rand(1, 64), 4, 32, True).shape == (1, 64)


def test_the_scale_is_rounded_before_the_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((64, 128), generator=generator).bfloat16()
    codes, scale, _ = quantize_groups(weight, 8, 128, True)
    assert scale.dtype is torch.bfloat16
    expected = torch.round(weight.float() / scale.float()).clamp(-127, 127) + 128
    assert torch.equal(codes.float(), expected)


@st.composite
def _weights(draw: st.DrawFn) -> tuple[Tensor, int]:
    rows, groups = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    size = draw(st.sampled_from([1, 2, 5, 32]))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn((rows, groups * size), generator=generator) * 10.0 ** draw(st.integers(-4, 3))
    return (weight + draw(st.sampled_from([0.0, 1.0, -3.0]))).to(draw(st.sampled_from(DTYPES))), size


@settings(max_examples=60, deadline=None)
@given(_weights(), st.sampled_from(BITS), st.booleans())
def test_error_of_any_weight(case: tuple[Tensor, int], bits: int, symmetric: bool) -> None:
    weight, size = case
    assert _excess(weight, bits, size, symmetric) <= 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(value: float) -> None:
    weight = torch.ones((2, 4))
    weight[1, 2] = value
    with pytest.raises(InputError) as caught:
        quantize_groups(weight, 4, 0, True)
    assert str(caught.value) == "the weight holds NaN or infinity\n  remedy: repair the checkpoint"
    with pytest.raises(InputError) as caught:
        check_finite_weight(weight, where="w")
    assert caught.value.where == "w"


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_are_rounded_block_by_block(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As all at once: of three blocks, of rows that differ."""
    weight = torch.randn(7, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 8)[:, None]
    whole = quantize_groups(weight, 3, 4, symmetric)
    monkeypatch.setattr(integer, "row_blocks", lambda *_: [(0, 3), (3, 6), (6, 7)])
    for found, expected in zip(quantize_groups(weight, 3, 4, symmetric), whole, strict=True):
        assert found is expected is None or torch.equal(found, expected)


def test_refusals() -> None:
    with pytest.raises(UsageError) as unknown:
        quantize_groups(torch.ones(2, 4), 5, 0, True)
    assert str(unknown.value) == "5-bit weights are not supported\n  remedy: choose 2, 3, 4 or 8 bits"
    with pytest.raises(InputError) as caught:
        quantize_groups(torch.ones(4), 4, 0, True)
    assert str(caught.value) == "only matrices are quantized, this has 1 axes\n  remedy: leave it out"
    with pytest.raises(InputError) as caught:
        check_group_size(-1, [64])
    assert str(caught.value) == "group size -1 is negative\n  remedy: use 0 for one group per row"
    with pytest.raises(InputError) as caught:
        check_group_size(128, [192])
    assert caught.value.where is None
    with pytest.raises(InputError) as caught:
        check_group_size(128, [256, 192], ["a.weight", "b.weight"])
    assert str(caught.value) == (
        "group size 128 does not divide every weight\n  where: b.weight\n  cause: it has K = 192\n"
        "  remedy: use 64, the nearest that divides every weight, or leave this weight out: --ignore b.weight"
    )


@pytest.mark.parametrize(
    ("size", "columns", "sizes", "remedy"),
    [
        (
            128,
            [192, 320],
            (0, 16, 32, 64),
            "use 64, the nearest that divides every weight, or leave this weight out: --ignore",
        ),
        (
            32,
            [64, 48],
            (0, 16, 32),
            "use 16, the nearest that divides every weight, or leave this weight out: --ignore",
        ),
        (32, [64, 48], (0, 32, 64), "use 0, one group per row, or leave this weight out: --ignore"),
        (48, [64], (32, 64), "use 64, the nearest that divides every weight, or leave this weight out: --ignore"),
        (32, [60, 100], (0, 16, 32), "use 0, one group per row, or leave this weight out: --ignore"),
        (128, [96], (64, 128), "leave this weight out: --ignore"),
    ],
)
def test_the_size_that_is_proposed_fits(size: int, columns: list[int], sizes: tuple[int, ...], remedy: str) -> None:
    """The weights, and what may be chosen: it is not refused again."""
    with pytest.raises(InputError) as caught:
        check_group_size(size, columns, sizes=sizes)
    assert caught.value.remedy == remedy


def test_default_group_size() -> None:
    assert default_group_size([256, 384]) == 128
    assert default_group_size([256, 192]) == 64
    assert default_group_size([96, 128]) == 32
    with pytest.raises(InputError) as caught:
        default_group_size([256, 48], ["a.weight", "b.weight"])
    assert (caught.value.where, caught.value.why) == ("b.weight", "it has K = 48")
    assert caught.value.what == "none of the group sizes 128, 64 and 32 divides every weight"
    assert caught.value.remedy == (
        "use 16, the nearest that divides every weight, or leave this weight out: --ignore b.weight"
    )
    with pytest.raises(InputError) as caught:  # 32 divides the first, 64 and 128 do not
        default_group_size([96, 48])
    assert (caught.value.where, caught.value.why) == (None, "it has K = 48")
    with pytest.raises(InputError) as caught:  # 33 divides it, and no engine has groups of 33
        default_group_size([3 * 5 * 11 * 13])
    assert caught.value.remedy == "use 0, one group per row, or leave this weight out: --ignore"
    with pytest.raises(InputError) as caught:
        default_group_size([48], sizes=(32, 64, 128))
    assert caught.value.remedy == "leave this weight out: --ignore"
    with pytest.raises(InputError) as caught:  # both divide it, and 24 is nearer to the smallest default, 32
        default_group_size([72], sizes=(24, 72))
    assert caught.value.remedy is not None
    assert caught.value.remedy.startswith("use 24,")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_asymmetric_codes_span_all_bits(bits: int) -> None:
    """-1 to 3 takes every code, the lowest and the highest among them, and 0 is exact."""
    top = 2**bits - 1
    codes, scale, zero = quantize_groups(torch.tensor([[-1.0, 0.0, 3.0]]), bits, 0, False)
    assert scale.item() == pytest.approx(4 / top)
    assert zero is not None
    assert zero.dtype == torch.uint8
    assert codes.tolist() == [[0, zero.item(), top]] if bits > 2 else codes.tolist() == [[0, 1, 3]]


@pytest.mark.parametrize(("steps", "stored"), [(125.49, 125), (10.49, 11), (10.02, 10), (3.0, 3)])
def test_scales_among_subnormals_go_up_when_the_range_would_fall_short(steps: float, stored: int) -> None:
    """127 steps of a scale that was rounded down by 0.49 of 10 fall short by more than half a step, of 125 they do not."""
    spacing = 2.0**-24
    scale = _stored_scale(torch.tensor([steps * spacing]), 127, torch.float16)
    assert scale.item() == stored * spacing
