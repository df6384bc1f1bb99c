"""Products of 8-bit floats in training: their numbers, the curve beside bf16's, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXAMPLE, ROOT
from torch import Tensor, nn
from training_runs import small_config, small_model, token_file

from optc.compiler.diagnostics import InputError, NoMatchError, UsageError
from optc.training.config import TrainConfig
from optc.training.fp8_linears import Fp8Linear, apply_fp8, rounded
from optc.training.memory_plan import predict
from optc.training.settings import Fp8Config
from optc.training.setup import check_config, prepare
from optc.training.step import train_step
from optc.training.world import World

FP8 = {"fp8": {"enabled": True}, "precision": "bf16"}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("start")
    return small_model(folder / "model"), token_file(folder / "text.jsonl")


def _by_rounding(x: Tensor, form: torch.dtype) -> Tensor:
    """The numbers that codes and scale stand for, by hand: the largest is kept, the others lie on the type's grid."""
    top = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}[form]
    scale = float(x.abs().max()) / top
    return (x / scale).to(form).float() * scale


@pytest.mark.parametrize("rows", [1, 16, 37])
def test_the_three_products(rows: int) -> None:
    torch.manual_seed(rows)
    linear = nn.Linear(32, 48)
    made = Fp8Linear(linear)
    x, slope = torch.randn(rows, 32, requires_grad=True), torch.randn(rows, 48)
    out = made(x)
    out.backward(slope)
    rounded_x, rounded_weight = (_by_rounding(item.detach(), torch.float8_e4m3fn) for item in (x, linear.weight))
    rounded_slope = _by_rounding(slope, torch.float8_e5m2)
    torch.testing.assert_close(out, rounded_x @ rounded_weight.T + linear.bias, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(x.grad, rounded_slope @ rounded_weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(linear.weight.grad, rounded_slope.T @ rounded_x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(linear.bias.grad, slope.sum(0))
    assert made.weight is linear.weight


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_show(value: float) -> None:
    x = torch.ones(16, 16)
    x[3, 5] = value
    assert not torch.isfinite(Fp8Linear(nn.Linear(16, 16))(x)).all()
    assert torch.isnan(rounded(x, torch.float8_e4m3fn)[0].float()).any()


def test_zeros_stay_zeros() -> None:
    codes, scale = rounded(torch.zeros(4, 4), torch.float8_e5m2)
    assert not codes.float().any()
    assert 0 < float(scale) < 1e-30


def test_the_curve_is_within_half_a_percent_of_bf16(tmp_path: Path) -> None:
    def curve(**more: Any) -> list[float]:
        text = ROOT / "examples" / "book.txt"
        config = small_config(EXAMPLE, text, tmp_path, precision="bf16", seq_len=64, optimizer={"lr": 1e-3}, **more)
        run = prepare(config, World())
        assert sum(isinstance(module, Fp8Linear) for module in run.model.modules()) == (7 * 4 if more else 0)
        return [train_step(run, last_good=None).loss or math.nan for _ in range(6)]

    found, expected = curve(fp8={"enabled": True}), curve()
    apart = [abs(one / other - 1) for one, other in zip(found, expected, strict=True)]
    assert 1e-6 < sum(apart) / len(apart) < 5e-3
    assert max(apart) < 1e-2  # a step is 256 tokens here


def test_names_and_notes(start: tuple[Path, Path]) -> None:
    """One head of keys has 8 rows: its projections stay, and the note counts them."""
    run = prepare(small_config(*start, Path("unused"), **FP8), World())
    names = [name for name, module in run.model.named_modules() if isinstance(module, Fp8Linear)]
    assert not any("k_proj" in name or "v_proj" in name or "lm_head" in name for name in names)
    assert "10 linears multiply in E4M3 and E5M2; 4 stay as they are: their sizes are no multiples of 16" in run.notes
    plain = prepare(small_config(*start, Path("unused")), World()).model
    assert list(run.model.state_dict()) == list(plain.state_dict())


def test_ignored_linears_stay(start: tuple[Path, Path]) -> None:
    model = prepare(small_config(*start, Path("unused")), World()).model
    apply_fp8(model, Fp8Config(enabled=True, ignore=("*.down_proj.*",)), torch.device("cpu"))
    left = {name for name, module in model.named_modules() if type(module) is nn.Linear and "down" in name}
    assert left == {f"model.layers.{layer}.mlp.down_proj" for layer in range(2)}
    with pytest.raises(NoMatchError, match="nothing_like_it"):
        apply_fp8(model, Fp8Config(enabled=True, ignore=("nothing_like_it",)), torch.device("cpu"))


def test_a_model_without_such_linears_is_refused() -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def get_output_embeddings(self) -> None:
            return None

    with pytest.raises(InputError, match="no linear that can be multiplied in 8 bits"):
        apply_fp8(Narrow(), Fp8Config(enabled=True), torch.device("cpu"))


@pytest.mark.parametrize(
    "more",
    [
        {"precision": "fp16"},
        {"precision": "fp32"},
        {"lora": {"enabled": True}},
        {"qat": {"enabled": True}},
        {"optimizer": {"name": "sophia"}},
    ],
)
def test_what_does_not_go_with_it(start: tuple[Path, Path], more: dict[str, Any]) -> None:
    config: TrainConfig = small_config(*start, Path("unused"), **{**FP8, **more})
    with pytest.raises(UsageError, match=r"does not go with fp8\.enabled"):
        check_config(config, World())


def test_fewer_bytes_are_kept(start: tuple[Path, Path]) -> None:
    """Inputs of linears are kept as codes of one byte."""
    whole, codes = (
        predict(small_config(*start, Path("unused"), precision="bf16", fp8={"enabled": on}), world_size=1)
        for on in (False, True)
    )
    assert codes.activations < whole.activations


def test_selective_checkpointing_keeps_such_products(start: tuple[Path, Path]) -> None:
    plain, kept = (
        prepare(small_config(*start, Path("unused"), **FP8, checkpointing={"policy": policy}), World())
        for policy in ("none", "selective")
    )
    losses = [[train_step(run, last_good=None).loss for _ in range(3)] for run in (plain, kept)]
    assert losses[0] == losses[1]
