"""Recipes, --set, and what is said about a typo."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from optc.compiler.diagnostics import InputError, UsageError
from optc.compiler.settings.fields import Given
from optc.training.config import TrainConfig
from optc.training.recipe import RECIPES, load_config


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_that_ships_is_valid(name: str) -> None:
    config = load_config(name)
    assert config.from_scratch == (name == "pretrain")
    assert config.lora.enabled == (name in ("lora", "qlora"))
    assert config.qat.enabled == (name == "qat")
    assert config.lora.base == ("nf4" if name == "qlora" else "dense")


def test_later_settings_win_and_take_the_fields_type(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("recipe: finetune\nmax_steps: 7\noptimizer: {weight_decay: 0.5}\n")
    config = load_config(
        str(path),
        values={
            "max_steps": Given(value="8", where="the command line, --max-steps", text=True),
            "data.text": Given(value=("a.txt",), where="the command line, --text", text=True),
        },
        settings=["optimizer.lr=3e-4", "seed=5", "optimizer.betas=[0.8, 0.9]", "data.shuffle=false", "max_steps=9"],
    )
    assert config.optimizer.lr == 3e-4
    assert config.optimizer.weight_decay == 0.5
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.schedule.warmup_steps == 10  # of the recipe it changes
    assert (config.max_steps, config.seed, config.data.shuffle) == (9, 5, False)
    assert config.data.text == ("a.txt",)


@pytest.mark.parametrize("text", [True, False], ids=["a flag's", "a value"])
def test_one_text_is_a_list_of_one(text: bool) -> None:
    """From Python as from a command line: `optc.train("lora", text="book.txt")`."""
    given = Given(value="a.txt", where="the command line, --text", text=text)
    assert load_config("lora", values={"data.text": given}).data.text == ("a.txt",)


def test_a_config_survives_json() -> None:
    config = load_config("qat", settings=["data.text=[a.txt, b.txt]"])
    assert msgspec.json.decode(msgspec.json.encode(config), type=TrainConfig) == config


@pytest.mark.parametrize(
    ("setting", "message", "hint"),
    [
        ("optimiser.lr=1", "unknown key 'optimiser'", "did you mean 'optimizer"),
        ("optimizer.lrr=1", "unknown key 'optimizer.lrr'", "did you mean 'optimizer.lr'?"),
        ("batchsize=4", "unknown key 'batchsize'", "did you mean 'batch_size'?"),
        ("learning_rate=1", "unknown key 'learning_rate'", "docs/train.md"),
        ("warmup_steps=4", "unknown key 'warmup_steps'", "did you mean 'schedule.warmup_steps'?"),
    ],
)
def test_an_unknown_key_names_the_nearest(setting: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as found:
        load_config("finetune", settings=[setting])
    assert found.value.exit_code == 2
    assert hint in str(found.value.remedy)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("max_steps=many", "'max_steps' cannot be 'many'"),
        ("optimizer.name=adam", "unknown optimizer.name 'adam'"),
        ("precision=fp8", "unknown precision 'fp8'"),
        ("batch_size=0", "'batch_size' cannot be 0"),
        ("optimizer.lr=-1", "'optimizer.lr' cannot be -1"),
        ("distill.weight=2", "'distill.weight' cannot be 2"),
        ("gradient_accumulation=0", "'gradient_accumulation' cannot be 0"),
        ("max_steps.x=1", "'max_steps' is not a group of keys"),
        ("optimizer=3", "'optimizer' is a group of keys, not 3"),
        ("max_steps='5'", "'max_steps' cannot be '5'"),
        ("max_steps=true", "'max_steps' cannot be True"),
        ("tensorboard=1", "'tensorboard' cannot be 1"),
        ("max_steps=", "'max_steps' cannot be None"),
        ("lora.rank=0", "'lora.rank' cannot be 0"),
        ("qat.bits=9", "'qat.bits' cannot be 9"),
        ("parallel.zero_stage=4", "'parallel.zero_stage' cannot be 4"),
        ("checkpointing.every_n=0", "'checkpointing.every_n' cannot be 0"),
        ("compile.activation_budget=1.5", "'compile.activation_budget' cannot be 1.5"),
        ("optimizer.betas=0.9", "'optimizer.betas' cannot be 0.9"),
        ("max_steps", "cannot read --set 'max_steps'"),
        ("seed=[", "cannot read --set 'seed=['"),
    ],
)
def test_a_bad_value_names_its_key(setting: str, message: str) -> None:
    with pytest.raises(UsageError, match="^" + message.replace("[", r"\[")):
        load_config("finetune", settings=[setting])


def test_a_flag_that_does_not_fit_names_the_flag() -> None:
    given = Given(value="x", where="the command line, --max-steps", text=True)
    with pytest.raises(UsageError) as found:
        load_config("finetune", values={"max_steps": given})
    assert (found.value.where, found.value.remedy) == ("the command line, --max-steps", "give an integer, 1 or more")


def test_no_value_takes_back_what_a_recipe_says(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("recipe: distill\ndistill: {teacher: a}\noptimizer: {betas: [0.5, 0.5], lr: 3e-5}\n")
    config = load_config(str(path), settings=["distill.teacher=", "optimizer.betas=null"])
    assert (config.distill.teacher, config.optimizer.betas) == (None, None)
    assert config.optimizer.lr == 3e-5  # a number without a point, which YAML 1.1 takes for text


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown recipe 'finetun'") as found:
        load_config("finetun")
    assert "did you mean 'finetune'?" in str(found.value.remedy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "the recipe is not a mapping"),
        ("a: [", "the recipe is not YAML"),
        ("recipe: qta\n", "unknown recipe 'qta'"),
        ("1: 2\n", "the recipe is not a mapping"),
    ],
)
def test_a_malformed_recipe(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises((InputError, UsageError), match=message):
        load_config(str(path))


def test_a_missing_recipe_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="failed while reading the recipe"):
        load_config(str(tmp_path / "none.yaml"))
