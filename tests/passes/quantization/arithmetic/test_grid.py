"""Grids: what codes stand for, and that the search finds the least error."""

from __future__ import annotations

import pytest
import torch

import optc.compiler.ops  # noqa: F401  (registers optc.dequantize)
from optc.passes.quantization.arithmetic import grid
from optc.passes.quantization.arithmetic.grid import full_range, search, storable


def _weight(rows: int = 5, columns: int = 64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    weight[0, 3] = 1.0  # an outlier that clipping pays for
    return weight


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [16, 0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_values_are_what_the_dialect_computes(bits: int, group_size: int, symmetric: bool) -> None:
    weight = _weight()
    grid = full_range(weight, bits, group_size, symmetric)
    codes = grid.codes(weight)
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1
    zero = None if symmetric else grid.zero.to(torch.uint8)
    expected = torch.ops.optc.dequantize(codes.to(torch.uint8), grid.scale, zero, bits=bits, group_size=group_size)
    assert torch.equal(grid.values(codes), expected)
    step = grid.scale.repeat_interleave(weight.shape[1] // grid.scale.shape[1], 1)
    # The full range clips nothing: every weight is within half a step (scales are rounded to float16).
    assert bool(((expected - weight).abs() <= step * 0.502 + 1e-3 * weight.abs()).all())


def test_hand_computed() -> None:
    weight = torch.tensor([[7.0, -3.4, 0.4, -0.6]])
    grid = full_range(weight, 4, 0, True)
    assert grid.scale.tolist() == [[1.0]]
    assert grid.codes(weight).tolist() == [[15, 5, 8, 7]]
    grid = full_range(torch.tensor([[14.0, -1.0, 0.4, 3.6]]), 4, 0, False)
    assert grid.scale.tolist() == [[1.0]]
    assert grid.zero.tolist() == [[1.0]]
    # The symmetric grid has one step more below zero than above.
    assert full_range(torch.tensor([[-8.0, 6.9]]), 4, 0, True).scale.tolist() == [[1.0]]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_no_tried_ratio_is_better(symmetric: bool, weighted: bool) -> None:
    weight = _weight(columns=32)
    x = torch.randn(99, 32, generator=torch.Generator().manual_seed(1))
    gram = x.t() @ x if weighted else None

    def errors(values: torch.Tensor) -> torch.Tensor:
        gap = (values - weight).reshape(5, 2, 16)
        if not weighted:
            return gap.square().sum(-1)
        return torch.stack([(gap[:, g] @ x[:, 16 * g : 16 * g + 16].t()).square().sum(-1) for g in range(2)], 1)

    def error(ratio: float) -> torch.Tensor:
        grid = search(weight, 3, 16, symmetric, gram, steps=2, least=ratio)
        return errors(grid.values(grid.codes(weight)))

    found = search(weight, 3, 16, symmetric, gram, steps=13, least=0.4)
    best = errors(found.values(found.codes(weight)))
    for step in range(13):  # a search of two steps is the better of the full range and this ratio
        assert bool((best <= error(1 - step * 0.05) * 1.0001 + 1e-9).all())
    full = full_range(weight, 3, 16, symmetric)
    assert bool((found.scale <= full.scale * 1.001).all())
    assert bool((found.scale < full.scale * 0.95).any())


def test_zeros_and_tiny_groups() -> None:
    weight = torch.zeros(2, 32)
    weight[1, 0] = 1e-7
    for symmetric in (True, False):
        grid = search(weight, 4, 16, symmetric)
        assert torch.equal(grid.values(grid.codes(weight))[0], torch.zeros(32))
        assert bool((grid.scale > 0).all())


def test_scales_fit_sixteen_bits() -> None:
    scale = torch.tensor([0.1, 1e-3, 1e-6, 1e6])
    found = storable(scale)
    assert torch.equal(found[:2], scale[:2].half().float())
    assert torch.equal(found[2:], scale[2:])  # below float16's normal numbers and above its largest
    grid = search(_weight(), 4, 16, True)
    assert torch.equal(grid.scale, grid.scale.half().float())


def test_other_scales_are_made_storable_and_the_rest_stays() -> None:
    grid = full_range(_weight(), 3, 16, False)
    other = grid.with_scale(grid.scale * 1.1)
    assert torch.equal(other.scale, storable(grid.scale * 1.1))
    assert not torch.equal(other.scale, grid.scale * 1.1)
    assert torch.equal(other.zero, grid.zero)
    assert (other.bits, other.group_size, other.symmetric) == (3, 16, False)


@pytest.mark.parametrize("symmetric", [True, False])
def test_grids_say_whether_they_are_symmetric(symmetric: bool) -> None:
    assert full_range(_weight(), 4, 16, symmetric).symmetric is symmetric
    assert search(_weight(), 4, 16, symmetric).symmetric is symmetric
    assert search(_weight(), 4, 16, symmetric, steps=1).symmetric is symmetric


def test_zero_stays_in_the_range_of_positive_weights() -> None:
    grid = full_range(torch.tensor([[3.0, 7.5]]), 4, 0, False)
    assert (grid.scale.tolist(), grid.zero.tolist()) == ([[0.5]], [[0.0]])


def test_codes_stay_in_range_on_a_grid_that_clips() -> None:
    grid = full_range(_weight(), 4, 16, True).with_scale(full_range(_weight(), 4, 16, True).scale * 0.3)
    codes = grid.codes(-_weight())
    assert (codes.min(), codes.max()) == (0, 15)


def test_a_whole_row_is_one_group() -> None:
    assert search(_weight(), 4, 0, True).scale.shape == (5, 1)


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_are_searched_block_by_block(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _weight(rows=7) * torch.arange(1.0, 8)[:, None]
    whole = search(weight, 4, 16, symmetric)
    monkeypatch.setattr(grid, "row_blocks", lambda *_: [(0, 3), (3, 7)])
    found = search(weight, 4, 16, symmetric)
    assert torch.equal(found.scale, whole.scale)
    assert torch.equal(found.zero, whole.zero)
    assert (found.bits, found.group_size, found.symmetric) == (4, 16, symmetric)


@pytest.mark.parametrize(
    ("symmetric", "weights", "gaps"),
    [
        (True, [-9.0, -8.2, 0.4, 7.4, 9.0], [1.0, 0.2, -0.4, -0.4, -2.0]),  # codes stand for -8 to 7
        (False, [-5.0, -3.0, 0.4, 12.0, 20.0], [2.0, 0.0, -0.4, 0.0, -8.0]),  # for -3 to 12
    ],
)
def test_what_rounding_adds(symmetric: bool, weights: list[float], gaps: list[float]) -> None:
    one = torch.ones(1, 1)
    held = grid.Grid(one, one * (8 if symmetric else 3), 4, 5, symmetric)
    groups = torch.tensor(weights)[None, None]
    found = grid._rounding(groups, held, torch.empty_like(groups))
    torch.testing.assert_close(found, torch.tensor(gaps)[None, None], atol=1e-6, rtol=0)


def test_signed_scales_put_the_code_without_a_counterpart_where_the_largest_weight_is() -> None:
    """Of 4 bits: -8 to 7 steps, or -7 to 8 of a negative scale. Which of them fits is exact, the other is not."""
    row = 0.5 * torch.tensor([[8.0, -7.0, 3.0, 0.0], [-8.0, 7.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    for signed, scales, exact in ((True, [-0.5, 0.5, 1.0], [True] * 3), (False, [None, 0.5, 1.0], [False, True, True])):
        found = search(row, 4, 4, True, steps=10, least=0.65, signed=signed)
        values = found.values(found.codes(row))
        assert [torch.equal(one, other) for one, other in zip(values, row, strict=True)] == exact
        assert all(wanted in (None, scale) for wanted, scale in zip(scales, found.scale[:, 0].tolist(), strict=True))
        assert bool((found.scale > 0).all()) is not signed


def test_signed_scales_lose_a_tenth_less() -> None:
    weight = torch.randn((64, 512), generator=torch.Generator().manual_seed(0))
    errors = []
    for signed in (True, False):
        grid = search(weight, 4, 32, True, steps=10, least=0.65, signed=signed)
        errors.append(float((grid.values(grid.codes(weight)) - weight).square().sum()))
    assert 0.85 < errors[0] / errors[1] < 0.92
