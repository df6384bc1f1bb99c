"""A product is taken from the stage before where input, weight and bias have the same values, and only there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from stages import apply, captured, sequences
from torch import Tensor

from optc.compiler.execution.stage_driver import run_stage
from optc.compiler.ir.program import Program
from optc.compiler.rewriting import known_products
from optc.compiler.rewriting.known_products import KnownProducts, MarkedWeights
from optc.passes.fusion.norm import FuseNorm
from optc.passes.kv_cache.static import StaticKVCache
from optc.passes.legalization.ort import LegalizeOrt
from optc.passes.quantization.rtn import QuantizeRtn

linear = torch.nn.functional.linear


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of each weight that a product was computed of."""
    shapes: list[tuple[int, ...]] = []
    real = known_products._linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shapes.append(tuple(weight.shape))
        made: Tensor = real(x, weight, bias)
        return made

    monkeypatch.setattr(known_products, "_linear", counted)
    return shapes


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def after_a_stage(products: KnownProducts, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> MarkedWeights:
    """The second of two stages, of which the first has computed a product."""
    MarkedWeights(products).linear(x, weight, bias)
    products.next_stage()
    return MarkedWeights(products)


@pytest.mark.parametrize("biased", [False, True])
def test_equal_values_are_computed_once(computed: list[tuple[int, ...]], *, biased: bool) -> None:
    x, weight, bias = numbers(3, 8), numbers(5, 8, seed=1), numbers(5, seed=2) if biased else None
    stage = after_a_stage(KnownProducts(), x, weight, bias)
    copies = None if bias is None else bias.clone()
    assert torch.equal(stage.linear(x.clone(), weight.clone(), copies), linear(x, weight, bias))
    assert computed == [(5, 8)]


def _nothing(x: Tensor, weight: Tensor, bias: Tensor, result: Tensor) -> None:
    pass


def _one_weight(x: Tensor, weight: Tensor, bias: Tensor, result: Tensor) -> None:
    weight.data[2, 3] += 1e-3  # unseen by versions


def _last_bit(x: Tensor, weight: Tensor, bias: Tensor, result: Tensor) -> None:
    weight.data.view(torch.int32)[0, 0] += 1


def _swapped_rows(x: Tensor, weight: Tensor, bias: Tensor, result: Tensor) -> None:
    weight.data[:2] = weight.data[:2].flip(0)


def _swapped_columns(x: Tensor, weight: Tensor, bias: Tensor, result: Tensor) -> None:
    weight.data[:, :2] = weight.data[:, :2].flip(1)


def _bias(x: Tensor, weight: Tensor, bias: Tensor, result: Tensor) -> None:
    bias.data[4] += 1e-6


def _input(x: Tensor, weight: Tensor, bias: Tensor, result: Tensor) -> None:
    x[0, 0] += 1e-6


def _sign_of_zero(x: Tensor, weight: Tensor, bias: Tensor, result: Tensor) -> None:
    x[1, 1] = -0.0


def _result(x: Tensor, weight: Tensor, bias: Tensor, result: Tensor) -> None:
    result += 1


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("change", "again"),
    [
        (_nothing, False),
        (_one_weight, True),
        (_last_bit, True),
        (_swapped_rows, True),
        (_swapped_columns, True),
        (_bias, True),
        (_input, True),
        (_sign_of_zero, True),
        (_result, True),
    ],
)
def test_what_changed_is_computed_again(
    computed: list[tuple[int, ...]], change: Callable[..., None], *, again: bool, in_place: bool
) -> None:
    """Whoever wrote into it, and however; the input may be the one that was kept."""
    x, weight, bias, products = numbers(3, 8), numbers(5, 8, seed=1), numbers(5, seed=2), KnownProducts()
    x[1, 1] = 0.0
    result = MarkedWeights(products).linear(x, weight, bias)
    products.next_stage()
    second = x if in_place else x.clone()
    change(second, weight, bias, result)
    assert torch.equal(MarkedWeights(products).linear(second, weight, bias), linear(second, weight, bias))
    assert len(computed) == 1 + again


@pytest.mark.parametrize("columns", [64, 63])
def test_the_least_change_of_a_weight_is_seen(computed: list[tuple[int, ...]], columns: int) -> None:
    """One too small for the product with random numbers, beside what else is in the row."""
    x, weight = numbers(3, columns), numbers(5, columns, seed=1)
    weight[4, 2] = 1e-12
    stage = after_a_stage(KnownProducts(), x, weight)
    weight.data[4, 2] = 2e-12
    stage.linear(x, weight)
    assert len(computed) == 2


def test_two_calls_of_a_stage_do_not_share_a_result() -> None:
    """What reads one of them may write into it."""
    x, weight, products = numbers(3, 8), numbers(5, 8, seed=1), KnownProducts()
    for _ in range(3):
        marked = MarkedWeights(products)
        first, second = marked.linear(x, weight), marked.linear(x, weight)
        first += 1
        assert torch.equal(second, linear(x, weight))
        products.next_stage()


def test_narrow_types_are_computed_each_time(computed: list[tuple[int, ...]]) -> None:
    """A mark of bfloat16 would not tell weights apart that differ in their last bit."""
    for dtype in (torch.bfloat16, torch.float16):
        x, weight = numbers(3, 8, dtype=dtype), numbers(5, 8, seed=1, dtype=dtype)
        after_a_stage(KnownProducts(), x, weight).linear(x, weight)
    assert len(computed) == 4


def test_memory_has_an_end_and_the_stage_before_the_last_is_forgotten(computed: list[tuple[int, ...]]) -> None:
    x, weight, other = numbers(3, 8), numbers(5, 8, seed=1), numbers(5, 8, seed=2)
    products = KnownProducts(most=4 * (3 * 8 + 3 * 5))
    for stage, again in ((1, 2), (2, 1), (3, 1)):  # there is room for one of two
        marked, before = MarkedWeights(products), len(computed)
        for each in (weight, other):
            marked.linear(x, each)
        products.next_stage()
        assert len(computed) - before == again, stage
    products.next_stage()
    MarkedWeights(products).linear(x, weight)
    assert len(computed) == 5


@pytest.fixture(scope="module")
def stages() -> list[Program]:
    """Stages of one model, of which the second and the last compute what the one before did."""
    plain = captured("llama")
    fused = apply(FuseNorm(), plain).program
    codes = apply(QuantizeRtn(group_size=32), fused).program
    cached = apply(StaticKVCache(), codes).program
    return [plain, fused, codes, cached, apply(LegalizeOrt(), cached).program]


def test_stages_compute_what_they_compute_alone(stages: list[Program], computed: list[tuple[int, ...]]) -> None:
    """Products of packed codes, too, once the weights that they stand for are known."""
    products, counts = KnownProducts(), []
    for stage in stages:
        before = len(computed)
        found = run_stage(stage, sequences(13, 5, 6), products=products)
        counts.append(len(computed) - before)
        products.next_stage()
        assert found.equals(run_stage(stage, sequences(13, 5, 6)))
    linears = 15  # 7 in each of two layers, and the head; the longest row of a prefill is a call of its own
    assert counts == [2 * linears, 0, 2 * linears, (2 + 1 + 3) * linears, 0]
