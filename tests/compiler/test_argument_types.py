"""Arguments of the public functions: another type is refused by name, with exit code 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import EXAMPLE
from torch import nn

import optc
from optc.compiler.capture import capture_module
from optc.compiler.diagnostics import UsageError
from optc.compiler.ir.devices import choose_device
from optc.compiler.settings.fields import check_type

LINEAR, INPUTS = nn.Linear(4, 4), (torch.zeros(2, 4),)


@pytest.fixture(scope="module")
def program() -> optc.Program:
    return capture_module(LINEAR, INPUTS)


def capture(*args: Any, **options: Any) -> Callable[[optc.Program], object]:
    return lambda _: optc.capture(*args, **options)


def of_module(inputs: Any = INPUTS, **options: Any) -> Callable[[optc.Program], object]:
    return capture(LINEAR, inputs, **options)


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (capture(5), "model cannot be 5"),
        (capture(EXAMPLE, dtype=16), "dtype cannot be 16"),
        (capture(EXAMPLE, trust_remote_code="no"), "trust_remote_code cannot be 'no'"),
        (of_module(prove=None), "prove cannot be None"),
        (of_module(5), "example_inputs cannot be 5"),
        (of_module("x"), "example_inputs cannot be 'x'"),
        (of_module((5,)), "example_inputs[0] cannot be 5"),
        (of_module(INPUTS[0][None].numpy()), "example_inputs cannot be array("),
        (of_module(input_names="x"), "input_names cannot be 'x'"),
        (of_module(input_names=[1]), "input_names cannot be [1]"),
        (of_module(dynamic=5), "dynamic cannot be 5"),
        (of_module(dynamic={"input_0": 5}), "dynamic cannot be {'input_0': 5}"),
        (of_module(dynamic={"input_0": {"a": "b"}}), "dynamic cannot be {'input_0': {'a': 'b'}}"),
        (lambda _: optc.compile(EXAMPLE, target=5), "target cannot be 5"),  # type: ignore[arg-type]
        (lambda _: optc.compile(EXAMPLE, request=5), "request cannot be 5"),  # type: ignore[arg-type]
        (lambda _: optc.load(5), "folder cannot be 5"),  # type: ignore[arg-type]
        (lambda _: optc.load(EXAMPLE, eager="no"), "eager cannot be 'no'"),
        (lambda _: choose_device(5), "device cannot be 5"),  # type: ignore[arg-type]
        (lambda _: optc.Pipeline(5), "steps cannot be 5"),  # type: ignore[arg-type]
        (lambda _: optc.Pipeline(["quantize-rtn"]), "a step cannot be 'quantize-rtn'"),  # type: ignore[list-item]
        (lambda _: optc.Pipeline([]).run(5), "program cannot be 5"),  # type: ignore[arg-type]
        (lambda program: optc.Pipeline([]).run(program, 5), "options cannot be 5"),  # type: ignore[arg-type]
        (lambda _: optc.apply_rules(5, []), "program cannot be 5"),  # type: ignore[arg-type]
        (lambda program: optc.apply_rules(program, "x"), "rules cannot be 'x'"),  # type: ignore[arg-type]
        (lambda program: optc.apply_rules(program, [5]), "a rule cannot be 5"),  # type: ignore[list-item]
        (lambda _: optc.Program.load(5), "directory cannot be 5"),  # type: ignore[arg-type]
        (lambda program: program.save(5), "directory cannot be 5"),  # type: ignore[arg-type]
    ],
)
def test_another_type(call: Callable[[optc.Program], object], what: str, program: optc.Program) -> None:
    with pytest.raises(UsageError) as caught:
        call(program)
    assert caught.value.what.startswith(what)
    assert str(caught.value.remedy).startswith("give ")
    assert caught.value.exit_code == 2


def test_what_is_of_the_type_is_taken() -> None:
    check_type("names", ["a"], tuple[str, ...], "")
    check_type("axes", {"x": {0: "batch"}}, dict[str, dict[int, str]], "")
    check_type("path", "a", str | None, "")
    check_type("path", None, str | None, "")
