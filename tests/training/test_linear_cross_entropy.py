"""The loss and its gradients are those of torch's cross-entropy on whole logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from optc.training.linear_cross_entropy import linear_cross_entropy
from optc.training.saved_tensors import LiveTensors


def inputs(tokens: int = 50, width: int = 16, vocabulary: int = 37) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(0, vocabulary, (tokens,))
    labels[::7] = -100
    return (
        torch.randn(tokens, width, requires_grad=True),
        torch.randn(vocabulary, width, requires_grad=True),
        labels,
    )


@pytest.mark.parametrize("chunk", [1, 16, 50, 64])
def test_equal_to_whole_logits(chunk: int) -> None:
    hidden, weight, labels = inputs()
    expected = nn.functional.cross_entropy(hidden @ weight.T, labels, ignore_index=-100, reduction="sum")
    (expected * 0.3).backward()
    wanted = [hidden.grad, weight.grad]
    hidden.grad = weight.grad = None
    found = linear_cross_entropy(hidden, weight, labels, chunk=chunk)
    (found * 0.3).backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close([hidden.grad, weight.grad], wanted, atol=1e-5, rtol=1e-5)


def test_under_autocast_products_are_bf16() -> None:
    hidden, weight, labels = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, labels, chunk=16)
        logits = nn.functional.linear(hidden, weight)
    assert logits.dtype == torch.bfloat16
    expected = nn.functional.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-5)
    found.backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32


def test_no_logits_are_kept() -> None:
    hidden, weight, labels = inputs(tokens=512, width=8, vocabulary=256)
    with LiveTensors() as live:
        loss = linear_cross_entropy(hidden, weight, labels, chunk=64)
        assert live.bytes <= 512 * 8 * 4 + 256 * 8 * 4 + 64  # two gradients and the loss
    assert live.peak < 512 * 256 * 4  # never the whole logits
    loss.backward()
