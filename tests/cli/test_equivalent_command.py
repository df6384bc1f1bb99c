"""The command of a compile, as manifest and report show it: it asks for the same again."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from conftest import EXAMPLE

from optc.cli.request_flags import merge_recipe, request_flags, request_of
from optc.equivalent_command import command_of
from optc.passes.fusion.norm import FuseNorm
from optc.request import SECTIONS, Request, from_python


def read_back(words: list[str]) -> tuple[str, Request]:
    """The model and the request of the words of a command line, as `optc compile` reads them."""
    found: list[tuple[str, Request]] = []

    @click.command()
    @click.argument("model")
    @request_flags(SECTIONS)
    def compile_(model: str, **flags: Any) -> None:
        merged = merge_recipe(flags)
        found.append((model, request_of(merged, merged["target"].value)))

    compile_.main(words, standalone_mode=False)
    return found[0]


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("onnx-cpu", {"quant": "rtn", "output": "out/it's here", "force": True}),
        (
            "onnx-cpu",
            {"quant": "gptq", "bits": 4, "group_size": 64, "symmetric": False, "ignore": ["*.down_proj.*", "lm head"]},
        ),
        (
            "onnx-cpu",
            {"passes": ["fuse-norm", "fuse-rotary"], "pass_option": ["fuse-norm.x=1"], "max_kl": 0.5, "head_bits": 4},
        ),
        (
            "inductor-cpu",
            {"kv_cache": "paged", "expose_hidden": [1, 2, 3], "text": "book.txt", "seed": 3, "device": "cpu"},
        ),
    ],
)
def test_it_is_read_back_as_the_same_request(target: str, options: dict[str, Any]) -> None:
    request = from_python(target, **options)
    words = shlex.split(command_of(Path("models/a b"), request))
    assert words[:3] == ["optc", "compile", "models/a b"]
    assert read_back(words[2:]) == ("models/a b", request)


def test_only_what_differs_from_the_defaults_is_in_it() -> None:
    request = from_python("vllm", output="out/folder", bits=4, quant="rtn", dtype=None)
    assert command_of("m", request) == "optc compile m --target vllm --quant rtn --bits 4 -o out/folder"


def test_what_no_command_line_can_name_is_a_call() -> None:
    module, tokens = torch.nn.Linear(2, 2), torch.ones(1, 8, dtype=torch.int64)
    request = from_python("onnx-cpu", quant="gptq", calibration=tokens, output="out")
    assert command_of(module, request) == (
        "optc.compile(<Linear>, target='onnx-cpu', quant='gptq', calibration=..., output='out')"
    )
    own = from_python("onnx-cpu", passes=[{"quantize-rtn": {"bits": 3}}])
    assert command_of("m", own) == "optc.compile('m', target='onnx-cpu', passes=[{'quantize-rtn': {'bits': 3}}])"
    assert command_of(EXAMPLE, from_python("onnx-cpu", passes=[FuseNorm()])).endswith("passes=...)")
