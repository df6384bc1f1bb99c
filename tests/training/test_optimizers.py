"""Optimizers against their papers' formulas, and what they may not be combined with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import small_config, small_model, token_file

from optc.compiler.diagnostics import InputError, UsageError
from optc.training.config import OptimizerConfig
from optc.training.optimizers import (
    estimate_hessian,
    make_optimizer,
    parameter_groups,
    plain_values,
    restore_groups,
    set_learning_rate,
)
from optc.training.setup import check_config, prepare
from optc.training.step import train_step
from optc.training.world import World


class Weights(torch.nn.Module):
    """A matrix, which decays, and a vector, which does not."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = torch.nn.Parameter(torch.randn(3, 4, generator=generator, dtype=torch.float64))
        self.vector = torch.nn.Parameter(torch.randn(4, generator=generator, dtype=torch.float64))

    def gradients(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step + 1)
        for item in self.parameters():
            item.grad = torch.randn(item.shape, generator=generator, dtype=torch.float64)


def follow(config: OptimizerConfig, update: Any, steps: int = 5, hessian: Any = None) -> None:
    """Step the library's optimizer and the formula side by side."""
    model = Weights()
    optimizer = make_optimizer(model, config)
    values = {name: item.detach().clone() for name, item in model.named_parameters()}
    state: dict[str, Any] = {name: {} for name in values}
    for step in range(steps):
        model.gradients(step)
        share = 1 - step / 10
        set_learning_rate(optimizer, share)
        more = {} if hessian is None else hessian(model, step)
        for name, item in model.named_parameters():
            decay = config.weight_decay if item.dim() == 2 else 0.0
            values[name] = values[name] * (1 - config.lr * share * decay)
            found = more.get("hessian")
            index = [name for name, _ in model.named_parameters()].index(name)
            values[name] = values[name] - config.lr * share * update(
                state[name], item.grad, step, None if found is None else found[index]
            )
        optimizer.step(**more)
        for name, item in model.named_parameters():
            torch.testing.assert_close(item.detach(), values[name], rtol=1e-9, atol=1e-12)


def test_adamw() -> None:
    def update(state: dict[str, Any], grad: torch.Tensor, step: int, _: Any) -> torch.Tensor:
        state["m"] = 0.9 * state.get("m", 0) + 0.1 * grad
        state["v"] = 0.95 * state.get("v", 0) + 0.05 * grad**2
        return (state["m"] / (1 - 0.9 ** (step + 1))) / ((state["v"] / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)

    follow(OptimizerConfig(name="adamw", lr=0.01, weight_decay=0.1), update)


def test_lion() -> None:
    def update(state: dict[str, Any], grad: torch.Tensor, step: int, _: Any) -> torch.Tensor:
        moment = state.get("m", torch.zeros_like(grad))
        state["m"] = 0.99 * moment + 0.01 * grad
        return (0.9 * moment + 0.1 * grad).sign()

    follow(OptimizerConfig(name="lion", lr=0.01, weight_decay=0.1), update)


def test_sophia() -> None:
    """theta -= lr * clip(m / max(gamma * h, eps), 1), h updated where an estimate is given (algorithm 3)."""

    def update(state: dict[str, Any], grad: torch.Tensor, step: int, hessian: Any) -> torch.Tensor:
        state["m"] = 0.965 * state.get("m", 0) + 0.035 * grad
        if hessian is not None:
            state["h"] = 0.99 * state.get("h", 0) + 0.01 * hessian
        return (state["m"] / (0.05 * state["h"]).clamp(min=0.05 * 1e-8)).clamp(-1, 1)

    def hessian(model: Weights, step: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(100 + step)
        draw = [20 * torch.rand(item.shape, generator=generator, dtype=torch.float64) for item in model.parameters()]
        return {"hessian": draw} if step % 2 == 0 else {}

    follow(OptimizerConfig(name="sophia", lr=0.01, weight_decay=0.1, gamma=0.05), update, hessian=hessian)


def test_the_hessian_estimate_of_a_quadratic() -> None:
    """For the loss 1/2 sum(a x^2) the estimate is a z^2: its mean over draws is a, the exact diagonal."""
    weights = torch.nn.Parameter(torch.randn(6, dtype=torch.float64))
    idle = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    scales = torch.linspace(0.5, 3, 6, dtype=torch.float64)
    optimizer = torch.optim.SGD([weights, idle], lr=1.0)

    def loss() -> torch.Tensor:
        return 0.5 * (scales * weights**2).sum()

    z = torch.randn(6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = estimate_hessian(optimizer, loss, torch.Generator().manual_seed(5))
    torch.testing.assert_close(found[0], scales * z**2)
    assert found[1].tolist() == [0, 0]
    generator = torch.Generator().manual_seed(1)
    mean = torch.stack([estimate_hessian(optimizer, loss, generator)[0] for _ in range(2000)]).mean(0)
    torch.testing.assert_close(mean, scales, rtol=0.15, atol=0)


def test_groups_leave_vectors_without_decay() -> None:
    groups = parameter_groups(Weights(), OptimizerConfig(weight_decay=0.1))
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.1), (1, 0.0)]


def test_nothing_to_train() -> None:
    with pytest.raises(InputError, match="no trainable parameter"):
        parameter_groups(Weights().requires_grad_(False), OptimizerConfig())


@pytest.mark.parametrize(("name", "lr"), [("adamw", 1e-2), ("lion", 3e-3), ("sophia", 1e-2)])
def test_each_optimizer_learns(tmp_path: Path, name: str, lr: float) -> None:
    model, text = small_model(tmp_path / "model"), token_file(tmp_path / "text.jsonl")
    config = small_config(model, text, tmp_path / "out", max_steps=30, optimizer={"name": name, "lr": lr})
    run = prepare(config, World())
    found = [train_step(run, last_good=None).loss for _ in range(30)]
    assert found[0] == pytest.approx(4.16, abs=0.2)  # log 64
    assert found[-1] < 3.6  # type: ignore[operator]


@pytest.mark.parametrize(
    ("more", "world", "message"),
    [
        (
            {"batch_size": 4, "gradient_accumulation": 3},
            1,
            r"batch_size 4 does not divide into 1 rank\(s\) x 3 micro-batch",
        ),
        ({"batch_size": 4, "parallel": {"kind": "ddp"}}, 3, r"batch_size 4 does not divide into 3 rank\(s\) x 1"),
        ({"batch_size": 4}, 2, "2 processes, but parallel.kind is none"),
        ({"optimizer": {"name": "sophia"}, "precision": "fp16"}, 1, "sophia does not work with a loss scale"),
        ({"optimizer": {"name": "sophia"}, "parallel": {"kind": "fsdp"}}, 1, "sophia does not work on shards"),
    ],
)
def test_contradictions_are_refused_first(tmp_path: Path, more: dict[str, Any], world: int, message: str) -> None:
    config = small_config(tmp_path, tmp_path / "text.jsonl", tmp_path / "out", **more)
    with pytest.raises(UsageError, match=message):
        check_config(config, World(world))


def test_the_remedy_is_a_batch_that_divides(tmp_path: Path) -> None:
    config = small_config(tmp_path, tmp_path / "t", tmp_path / "out", batch_size=4, gradient_accumulation=3)
    with pytest.raises(UsageError) as found:
        check_config(config, World(2))
    assert found.value.remedy == "use --set batch_size=6"


GROUPS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "none": ([], "0 groups of parameters, the optimizer has 1"),
    "text": ([{"lr": "0.1"}], "'lr' of a group is '0.1'"),
    "an object": ([{"weight_decay": {"a": 1}}], "'weight_decay' of a group is {'a': 1}"),
    "a value that is missing": ([{"lr": None}], "'lr' of a group is None"),
    "another flag": ([{"amsgrad": True}], "'amsgrad' of a group is True, the optimizer's is False"),
    "a flag that is a number": ([{"amsgrad": 0}], "'amsgrad' of a group is 0"),
    "a number that is a flag": ([{"lr": True}], "'lr' of a group is True"),
    "parameters": ([{"params": 1}], "a group holds what is no number: params"),
    "pairs of numbers": ([{"betas": 1.0}], "a group holds what is no number: betas"),
    "more than numbers": ([{"peak_lr": [1]}], "a group holds what is no number"),
}


@pytest.mark.parametrize("case", GROUPS)
def test_groups_of_a_checkpoint(case: str) -> None:
    optimizer = torch.optim.AdamW([torch.zeros(2, requires_grad=True)], lr=0.5)
    changes, why = GROUPS[case]
    before = dict(optimizer.param_groups[0])
    with pytest.raises(ValueError, match=why):
        restore_groups(optimizer, [{**plain_values(optimizer.param_groups[0]), **item} for item in changes])
    assert optimizer.param_groups[0] == before


def test_groups_get_the_numbers_of_a_checkpoint() -> None:
    optimizer = torch.optim.AdamW([torch.zeros(2, requires_grad=True)], lr=0.5)
    kept = {**plain_values(optimizer.param_groups[0]), "lr": 1, "peak_lr": 0.25}
    restore_groups(optimizer, [kept])
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["peak_lr"]) == (1, 0.25)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
