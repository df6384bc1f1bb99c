"""Every checkpointing policy leaves losses and gradients as they are, and keeps less."""

from __future__ import annotations

import functools

import pytest
import torch
from families import DECODERS, make_model
from torch import Tensor, nn

from optc.compiler.diagnostics import UsageError
from optc.training.activation_checkpointing import CheckpointingConfig, apply_activation_checkpointing
from optc.training.blocks import transformer_blocks
from optc.training.compile import CompileConfig, apply_compile
from optc.training.saved_tensors import LiveTensors, SavedTensors

POLICIES = {
    "full": CheckpointingConfig(policy="full"),
    "every-n": CheckpointingConfig(policy="every-n", every_n=2),
    "products": CheckpointingConfig(policy="selective", keep=("matmul", "attention")),
    "narrow": CheckpointingConfig(policy="selective"),
    "one op": CheckpointingConfig(policy="selective", keep=("aten.mm.default",)),
    "budget": CheckpointingConfig(policy="budget", budget=0.6),
}


def trainable(name: str = "llama") -> nn.Module:
    attention = "eager" if name == "gemma2" else "sdpa"  # transformers has no other for it
    model: nn.Module = make_model(name, attention=attention).train().requires_grad_(True)
    return model


def batch(rows: int = 2, length: int = 32) -> dict[str, Tensor]:
    tokens = torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "labels": tokens}


def loss_and_gradients(model: nn.Module) -> tuple[float, dict[str, Tensor]]:
    torch.manual_seed(7)  # of dropout
    loss = model(**batch()).loss
    loss.backward()
    return loss.item(), {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def kept_bytes(model: nn.Module) -> int:
    with LiveTensors() as live:
        loss = model(**batch(4, 128)).loss
        kept = live.bytes
        del loss
    return kept


@pytest.mark.parametrize("family", DECODERS)
def test_blocks_are_found_in_every_family(family: str) -> None:
    model = make_model(family)
    blocks = transformer_blocks(model)
    assert len(blocks) == 2 == model.config.num_hidden_layers
    assert len({type(block) for block in blocks}) == 1
    inside = sum(parameter.numel() for block in blocks for parameter in block.parameters())
    apart = sum(value.numel() for name, value in model.named_parameters() if ".0." in name or ".1." in name)
    assert inside == apart  # experts are inside a block, not blocks


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UsageError, match="the model has no repeated blocks"):
        transformer_blocks(nn.Linear(4, 4))


@pytest.mark.parametrize("policy", POLICIES)
def test_losses_and_gradients_are_equal(policy: str) -> None:
    expected_loss, expected = loss_and_gradients(trainable())
    model = apply_activation_checkpointing(trainable(), POLICIES[policy])
    loss, gradients = loss_and_gradients(model)
    assert loss == expected_loss
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "mixtral", "opt"])
def test_other_families_are_equal_too(family: str) -> None:
    """GPT-2 and OPT have dropout: its random numbers are replayed."""
    expected_loss, expected = loss_and_gradients(trainable(family))
    for policy in ("full", "products"):
        model = apply_activation_checkpointing(trainable(family), POLICIES[policy])
        loss, gradients = loss_and_gradients(model)
        assert loss == expected_loss
        assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_names_of_parameters_stay() -> None:
    plain, model = trainable(), apply_activation_checkpointing(trainable(), POLICIES["full"])
    assert list(model.state_dict()) == list(plain.state_dict())


def test_policies_keep_less() -> None:
    """Counted as live bytes after the forward pass, without the logits and the loss."""
    head = kept_bytes_of_head()
    kept = {
        name: kept_bytes(apply_activation_checkpointing(trainable(), config)) - head
        for name, config in POLICIES.items()
    }
    none = kept_bytes(trainable()) - head
    assert kept["full"] < 0.15 * none
    assert 0.45 * none < kept["every-n"] < 0.6 * none
    assert kept["full"] < kept["narrow"] < kept["products"] < 0.7 * none
    assert kept["budget"] <= 0.6 * none * 1.02


def kept_bytes_of_head() -> int:
    model = trainable()
    hidden = torch.randn(4, 128, 64, requires_grad=True)
    with LiveTensors() as live:
        loss = model.loss_function(model.lm_head(model.model.norm(hidden)), batch(4, 128)["labels"], vocab_size=128)
        kept = live.bytes
        del loss
    return kept


def test_saved_and_live_bytes_of_a_hand_computed_case() -> None:
    """exp saves its output, sin its input: the same tensor, [8] fp32."""
    x = torch.ones(8, requires_grad=True)
    with SavedTensors() as saved:
        x.exp().sin()
    assert saved.bytes == 32
    with LiveTensors() as live:
        y = x.exp()
        z = y.sin()
        assert live.bytes == 64
        del y
        assert live.bytes == 64  # held by autograd
        del z
        assert live.bytes == 0
    assert live.peak == 64


def test_a_budget_in_bytes_and_one_too_small() -> None:
    model = apply_activation_checkpointing(trainable(), CheckpointingConfig(policy="budget", budget=1e9))
    assert kept_bytes(model) == kept_bytes(trainable())
    model = apply_activation_checkpointing(trainable(), CheckpointingConfig(policy="budget", budget=1000))
    with pytest.raises(UsageError, match=r"budget 1000 is too small\n.*take 262144 bytes per micro-batch"):
        kept_bytes(model)  # two inputs of 4 * 128 * 64 * 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CheckpointingConfig(policy="every-n", every_n=0), "'every-n' cannot be 0"),
        (CheckpointingConfig(policy="budget", budget=-1.0), r"'budget' cannot be -1\.0"),
        (CheckpointingConfig(policy="selective", keep=("matmull",)), "did you mean 'matmul'"),
        (
            CheckpointingConfig(policy="selective", keep=("aten.no_such_op",)),
            "unknown kind of op 'aten.no_such_op'",
        ),
    ],
)
def test_values_out_of_range(config: CheckpointingConfig, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        apply_activation_checkpointing(trainable(), config)


def test_compiled_blocks_give_the_same_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Inductor's graphs and what it recomputes, run eagerly; on a GPU, tests/gpu compiles their code too."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition"))
    expected_loss, expected = loss_and_gradients(trainable())
    model = apply_activation_checkpointing(trainable(), POLICIES["products"])
    loss, gradients = loss_and_gradients(apply_compile(model, CompileConfig(scope="blocks")))
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], atol=1e-5, rtol=1e-4)


def test_a_measured_budget_and_compile_do_not_go_together() -> None:
    model = apply_activation_checkpointing(trainable(), POLICIES["budget"])
    with pytest.raises(Exception, match=r"use compile\.activation_budget"):
        loss_and_gradients(apply_compile(model, CompileConfig(scope="blocks")))
