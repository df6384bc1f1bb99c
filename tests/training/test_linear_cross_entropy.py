"""The loss and its gradients are those of torch's cross-entropy on whole logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from optc.training.linear_cross_entropy import Teacher, linear_cross_entropy
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
    found = linear_cross_entropy(hidden, weight, labels, chunk=chunk).total
    (found * 0.3).backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close([hidden.grad, weight.grad], wanted, atol=1e-5, rtol=1e-5)


def test_under_autocast_products_are_bf16() -> None:
    hidden, weight, labels = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, labels, chunk=16).total
        logits = nn.functional.linear(hidden, weight)
    assert logits.dtype == torch.bfloat16
    expected = nn.functional.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-5)
    found.backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("chunk", [16, 64])
def test_a_teacher_has_its_share(chunk: int, temperature: float) -> None:
    """Of whole logits, by torch's own functions."""
    hidden, weight, labels = inputs()
    other, table = torch.randn(50, 24), torch.randn(37, 24)
    kept = labels != -100
    student, target = (hidden @ weight.T)[kept], (other @ table.T)[kept]
    entropy = nn.functional.cross_entropy(student, labels[kept], reduction="sum")
    divergence = nn.functional.kl_div(
        (student / temperature).log_softmax(-1),
        (target / temperature).log_softmax(-1),
        log_target=True,
        reduction="sum",
    )
    total = 0.7 * entropy + 0.3 * temperature**2 * divergence
    total.backward()
    wanted = [hidden.grad, weight.grad]
    hidden.grad = weight.grad = None
    found = linear_cross_entropy(hidden, weight, labels, chunk=chunk, teacher=Teacher(other, table, 0.3, temperature))
    found.total.backward()
    torch.testing.assert_close(tuple(found), (total, entropy, divergence))
    torch.testing.assert_close([hidden.grad, weight.grad], wanted, atol=1e-5, rtol=1e-5)


def test_gradients_in_fp16_are_finite_where_their_sums_are_beyond_it() -> None:
    """2048 tokens of one label, each with a state of 100: the sum by the label's row is below -100 000."""
    hidden = torch.full((2048, 4), 100.0, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(8, 4, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        linear_cross_entropy(hidden, weight, torch.zeros(2048, dtype=torch.int64)).total.backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[0], torch.full((4,), -2048 * 100 * 7 / 8))


def test_no_logits_are_kept() -> None:
    hidden, weight, labels = inputs(tokens=512, width=8, vocabulary=256)
    with LiveTensors():  # what torch keeps of the first call of a process is not the loss's
        linear_cross_entropy(hidden, weight, labels, chunk=64)
    with LiveTensors() as live:
        loss = linear_cross_entropy(hidden, weight, labels, chunk=64).total
        assert live.bytes <= 512 * 8 * 4 + 256 * 8 * 4 + 64  # two gradients and the loss
    assert live.peak < 512 * 256 * 4  # never the whole logits
    loss.backward()
