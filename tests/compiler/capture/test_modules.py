"""Capture of plain modules: what is refused, and what the refusal names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optc.compiler.capture import capture_module
from optc.compiler.capture.facts import stated_context
from optc.compiler.diagnostics import CaptureError


class Returns(nn.Module):
    """x + 1, and something else."""

    def __init__(self, other: str) -> None:
        super().__init__()
        self.other = other
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> Any:
        others = {"nothing": None, "a size": x.shape[1], "a weight": self.scale, "text": "yes"}
        return x * self.scale + 1, others[self.other]


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ("nothing", "output 1 is None, not a tensor"),
        ("a size", "output 1 is a number, not a tensor"),
        ("a weight", "output 1 is a weight of the module itself"),
        ("text", "output 1 is 'yes', not a tensor"),
    ],
)
def test_outputs_that_are_not_computed_tensors(other: str, why: str) -> None:
    with pytest.raises(CaptureError, match="something else than tensors") as caught:
        capture_module(Returns(other), (torch.randn(2, 5, 8),), input_names=["x"], dynamic={"x": {0: "b", 1: "s"}})
    assert caught.value.why == why


def test_axes_that_cannot_be_dynamic_are_named() -> None:
    """torch.export's reasons and suggestions, for each axis: what follows takes even sizes alone."""

    class Pairs(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :, ::2, ::2] + x[:, :, 1::2, 1::2]

    with pytest.raises(CaptureError, match="for all shapes") as caught:
        capture_module(Pairs(), (torch.randn(2, 3, 16, 18),), input_names=["x"], dynamic={"x": {2: "h", 3: "w"}})
    assert "Not all values of h" in str(caught.value.why)
    assert "Not all values of w" in str(caught.value.why)
    with pytest.raises(CaptureError) as caught:
        capture_module(nn.Linear(4, 4), (torch.randn(1, 4),), input_names=["x"], dynamic={"x": {0: "batch"}})
    assert "suggested: batch = 1" in str(caught.value.why)


def test_axes_whose_conditions_hold_for_all_sizes_are_dynamic() -> None:
    """torch.export would have them by single sizes; small and odd ones are computed as the module does."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    image = torch.randn(2, 3, 16, 18)
    program = capture_module(net, (image,), input_names=["x"], dynamic={"x": {2: "h", 3: "w"}})
    for height, width in ((1, 1), (2, 7), (17, 18), (31, 2)):
        other = torch.randn(2, 3, height, width)
        torch.testing.assert_close(program(other), net(other))


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        (64, 64),
        (-1, 0),
        (None, 0),
        (float("inf"), 0),
        (float("nan"), 0),
        (10**30, 0),
        (10**400, 0),
    ],
)
def test_contexts_without_a_limit(stated: float | None, expected: int) -> None:
    class Config:
        max_position_embeddings = stated

    assert stated_context(Config()) == expected


def test_training_flags_are_left_as_they_were() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    module[0].eval()
    capture_module(module, (torch.ones(1, 2),))
    assert [inner.training for inner in module.modules()] == [True, False, True]
    module.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        capture_module(module, (torch.ones(1, 2),))
    assert module.training
