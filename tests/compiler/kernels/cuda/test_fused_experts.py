"""The Triton kernels of `choose_experts` and `fused_experts` against the references: in the interpreter, and with real types on the GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted import DEVICE, FLOATS, HAS_GPU, ON_GPU
from torch import Tensor

from optc.compiler.kernels.cuda.experts import launch
from optc.compiler.kernels.cuda.fused_experts import CHOOSE_EXPERTS, FUSED_EXPERTS, accepts, accepts_choice

EXPERTS, SLOTS = 5, 2
OPTIONS: dict[str, dict[str, Any]] = {
    "silu, gated": {"activation": "silu", "gated": True},
    "gelu": {"activation": "gelu"},
    "nothing": {},
}
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]


def arguments(
    tokens: int, dtype: torch.dtype, *, gated: bool = False, residual: bool = True, columns: int = 96
) -> Arguments:
    """Of the op; the last token has chosen one expert twice."""
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)

    hidden, wide = 21, 37
    up = normal(EXPERTS, 2 * hidden if gated else hidden, columns) * columns**-0.5
    indices = torch.stack([torch.randperm(EXPERTS, generator=generator)[:SLOTS] for _ in range(tokens)])
    indices[-1] = 3
    weights = torch.rand((tokens, SLOTS), generator=generator).to(DEVICE)
    other = normal(tokens, wide) if residual else None
    return normal(tokens, columns), up, normal(EXPERTS, wide, hidden), indices.to(DEVICE), weights, other


def check(found: Tensor, args: Arguments, knobs: dict[str, Any], roundings: int = 1) -> None:
    """Against the reference in float32."""
    wide = [item.float() if item is not None and item.is_floating_point() else item for item in args]
    expected = FUSED_EXPERTS.spec.reference(*wide, **knobs)
    dtype = args[0].dtype
    assert (found.dtype, found.shape) == (dtype, expected.shape)
    rounding = 0.0 if dtype is torch.float32 else torch.finfo(dtype).eps
    bound = (FUSED_EXPERTS.tolerance + roundings * rounding) * float(expected.abs().max())
    assert float((found.float() - expected).abs().max()) <= bound


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("option", OPTIONS)
def test_chosen_experts(option: str, tokens: int, dtype: torch.dtype) -> None:
    knobs = OPTIONS[option]
    args = arguments(tokens, dtype, gated=knobs.get("gated", False))
    check(launch.fused_experts(*args, **knobs), args, knobs)


def test_rows_longer_than_a_tile() -> None:
    args = arguments(1, torch.float32, columns=launch.BLOCK_K + 100, residual=False)
    check(launch.fused_experts(*args), args, {})


def test_experts_that_no_token_has_chosen_are_not_read() -> None:
    args = arguments(1, torch.float32)
    args[1][:3], args[2][4:] = float("nan"), float("nan")
    found = launch.fused_experts(*args)
    assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_expert(option: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """More choices than experts, and more tokens than are multiplied at a time."""
    monkeypatch.setattr(launch, "ROWS", 3)
    knobs = OPTIONS[option]
    args = arguments(7, dtype, gated=knobs.get("gated", False))
    check(launch.fused_experts(*args, **knobs), args, knobs, roundings=4)


def test_no_tokens() -> None:
    x, up, down, indices, weights, _ = arguments(1, torch.float32)
    assert launch.fused_experts(x[:0], up, down, indices[:0], weights[:0], None).shape == (0, 37)


def test_says_what_it_takes() -> None:
    args = arguments(2, torch.float32)
    x, up, down, indices, weights, residual = args
    cases: list[tuple[Any, dict[str, Any], str | None]] = [
        (args, {"activation": "silu"}, None),
        (args, {"activation": "mish"}, "no kernel has the activation 'mish'"),
        ((x.half(), *args[1:]), {}, "weights or a residual of another type than the tokens' torch.float16"),
        ((x, up.mT, *args[2:]), {}, "the weights of experts are not one after the other"),
        ((x, up, down, indices.int(), weights, residual), {}, "experts are chosen by torch.int32; the kernel takes torch.int64"),
        (
            tuple(item.double() if item.is_floating_point() else item for item in (x, up, down, indices, weights, residual)),
            {},
            "tokens of type float64; the kernel takes bfloat16, float16, float32",
        ),
    ]  # fmt: skip
    assert [accepts(given, knobs) for given, knobs, _ in cases] == [reason for *_, reason in cases]


@pytest.mark.parametrize("mark", [pytest.param(None, marks=ON_GPU)])
def test_op_runs_the_kernel(mark: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert HAS_GPU
    called: list[int] = []
    run = launch.chosen
    monkeypatch.setattr(launch, "chosen", lambda *args: called.append(1) or run(*args))
    args = arguments(1, torch.bfloat16)
    check(torch.ops.optc.fused_experts(*args), args, {})
    assert called == [1]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(("experts", "slots"), [(8, 2), (5, 1), (128, 8), (3, 3)])
def test_choice(experts: int, slots: int, normalized: bool, dtype: torch.dtype) -> None:
    """Of rows that are a part of wider ones; no two logits of a token are equal."""
    generator = torch.Generator().manual_seed(experts)
    order = torch.stack([torch.randperm(experts, generator=generator) for _ in range(4)])
    logits = torch.cat([order, order], 1).to(dtype).to(DEVICE)[:, :experts] / 8
    weights, indices = launch.choose_experts(logits, slots=slots, normalized=normalized)
    expected, places = CHOOSE_EXPERTS.spec.reference(logits, slots=slots, normalized=normalized)
    assert torch.equal(indices, places)
    assert weights.dtype is torch.float32
    assert float((weights - expected).abs().max()) <= CHOOSE_EXPERTS.tolerance


def test_choice_among_numbers_that_are_not_finite() -> None:
    """Every index is of an expert: the next kernel reads what it points at."""
    infinity, nan = float("inf"), float("nan")
    logits = torch.tensor(
        [[1.0, nan, 2.0], [nan] * 3, [-infinity, 1.0, -infinity], [infinity, 1.0, 2.0]], device=DEVICE
    )
    weights, indices = launch.choose_experts(logits, slots=2, normalized=True)
    assert bool(((indices >= 0) & (indices < 3)).all())
    assert torch.isfinite(weights).all(1).tolist() == [False, False, True, False]
    assert launch.choose_experts(logits[:0], slots=2, normalized=True)[0].shape == (0, 2)


def test_choice_says_what_it_takes() -> None:
    row = torch.zeros(2, 8)
    found = [
        accepts_choice((row,), {"slots": 2, "normalized": True}),
        accepts_choice((row.new_zeros(2, 1025),), {"slots": 2, "normalized": True}),
        accepts_choice((row.new_zeros(2, 64),), {"slots": 17, "normalized": True}),
        accepts_choice((row.t().contiguous().t(),), {"slots": 2, "normalized": True}),
        accepts_choice((row.double(),), {"slots": 2, "normalized": True}),
    ]
    assert found == [
        None,
        "2 of 1025 experts are chosen; the kernel takes up to 16 of 1024",
        "17 of 64 experts are chosen; the kernel takes up to 16 of 1024",
        "the logits of a token are not neighbours",
        "logits of type float64; the kernel takes bfloat16, float16, float32",
    ]
