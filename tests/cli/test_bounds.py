"""A number has the same bounds as a flag and in a call from Python: both are made of one type."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Annotated, Any

import msgspec
import numpy as np
import pytest
from msgspec import Meta

from optc.cli.bench import BenchOptions
from optc.cli.evaluate import EvalOptions
from optc.cli.run import RunOptions
from optc.compiler.diagnostics import UsageError
from optc.compiler.settings.fields import Given, check_range, check_struct, fields_of
from optc.runtime.generation.generate import generate
from optc.runtime.measuring.benchmark import benchmark
from optc.runtime.measuring.evaluate import compare
from optc.runtime.measuring.tasks import run_tasks
from optc.runtime.sampling import Sampling
from optc.training.activation_checkpointing import CheckpointingConfig

SESSION: Any = SimpleNamespace(vocab_size=8, context_length=4)
Call = Callable[[int], object]


def _bench(name: str) -> Call:
    return lambda value: benchmark(SESSION, **{name: value})


CALLS: dict[tuple[type[msgspec.Struct], str], Call] = {
    (RunOptions, "max_new_tokens"): lambda value: generate(SESSION, [], max_new_tokens=value),
    (BenchOptions, "batch"): _bench("batch"),
    (BenchOptions, "samples"): _bench("samples"),
    (BenchOptions, "warmup"): _bench("warmup"),
    (BenchOptions, "new_tokens"): _bench("new_tokens"),
    (EvalOptions, "windows"): lambda value: compare([SESSION], [0, 1], None, windows=value),
    (EvalOptions, "limit"): lambda value: run_tasks(SESSION, ["task"], limit=value),
    (EvalOptions, "num_fewshot"): lambda value: run_tasks(SESSION, ["task"], num_fewshot=value),
}


@pytest.mark.parametrize(("options", "name"), list(CALLS))
@pytest.mark.parametrize("end", [0, 2])
def test_calls_and_flags_refuse_the_same(options: type[msgspec.Struct], name: str, end: int) -> None:
    field = fields_of(options)[name]
    bound = field.bounds[end]
    assert bound is not None
    beyond = int(bound) + (1 if end else -1)
    with pytest.raises(UsageError, match=f"'{field.key}' cannot be '{beyond}'") as flag:
        field.read(Given(value=str(beyond), where="the command line", text=True))
    with pytest.raises(UsageError, match=f"{field.key} {beyond} is out of range") as call:
        CALLS[options, name](beyond)
    assert call.value.remedy == flag.value.remedy


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_k", 2**31 + 1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("seed", -1),
    ],
)
def test_sampling_and_its_flags_refuse_the_same(name: str, value: float) -> None:
    field = fields_of(RunOptions)[name]
    with pytest.raises(UsageError, match=f"'{field.key}' cannot be ") as flag:
        field.read(Given(value=str(value), where="the command line", text=True))
    with pytest.raises(UsageError, match=f"{field.key} {value} is out of range") as call:
        Sampling(**{"temperature": 1.0, name: value})
    assert call.value.remedy == flag.value.remedy


@pytest.mark.parametrize(
    ("kind", "value", "remedy"),
    [
        (Annotated[int, Meta(ge=2, le=4)], 5, "give an integer from 2 to 4"),
        (Annotated[float, Meta(gt=0, le=1)], 0.0, "give a number, more than 0, 1 or less"),
        (Annotated[float, Meta(gt=0, lt=1)], 1.0, "give a number, more than 0, less than 1"),
        (Annotated[float, Meta(ge=0)], float("nan"), "give a number, 0 or more"),
        (Annotated[float, Meta(ge=0)], float("inf"), "give a number, 0 or more"),
    ],
)
def test_a_number_out_of_its_range(kind: Any, value: float, remedy: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_range("key", value, kind)
    assert (caught.value.what, caught.value.remedy) == (f"key {value} is out of range", remedy)


@pytest.mark.parametrize(
    ("kind", "value"),
    [(int, "3"), (int, None), (int, 3.0), (int, True), (float, "0.5"), (float, None), (float, True), (float, 1j)],
)
def test_what_is_no_such_number_is_named(kind: type, value: Any) -> None:
    with pytest.raises(UsageError, match=re.escape(f"key cannot be {value!r}")) as caught:
        check_range("key", value, Annotated[kind, Meta(ge=0)])
    assert caught.value.remedy == f"give {'an integer' if kind is int else 'a number'}, 0 or more"


@pytest.mark.parametrize(
    ("kind", "value"),
    [(int, np.int64(3)), (int, 10**400), (float, 10**400), (float, 1), (float, np.float32(0.5)), (float, np.int32(2))],
)
def test_numbers_of_numpy_and_large_integers_are_numbers(kind: type, value: Any) -> None:
    check_range("key", value, Annotated[kind, Meta(ge=0)])


@pytest.mark.parametrize("value", [2, 3, 4])
def test_bounds_belong_to_the_range(value: int) -> None:
    check_range("key", value, Annotated[int, Meta(ge=2, le=4)])


def test_a_struct_made_by_hand_is_read_like_a_recipe() -> None:
    check_struct(CheckpointingConfig(every_n=3))
    with pytest.raises(UsageError) as caught:
        check_struct(CheckpointingConfig(every_n=0))
    assert caught.value.where == "CheckpointingConfig(every_n=...)"
