"""What a target refuses before any weight is read, and the nearest that it names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from optc.compiler.diagnostics import TargetError
from optc.compiler.ir.program import Program
from optc.compiler.target.options import CompileOptions, Quantization
from optc.compiler.target.target import (
    ExportRequest,
    ExportResult,
    QuantSupport,
    Step,
    Target,
    check_options,
)


def _export(program: Program, request: ExportRequest) -> ExportResult:
    raise AssertionError("not reached")


def _recipe(kind: str, options: CompileOptions) -> list[Step]:
    return []


def target(name: str, quant: Mapping[str, QuantSupport]) -> Target:
    return Target(
        name=name,
        summary="",
        device="cpu",
        dtypes=("fp32",),
        kv_caches=(),
        quant=quant,
        legal={},
        recipe=_recipe,
        export=_export,
    )


WIDE = QuantSupport(bits=(2, 4, 8), group_sizes=(0, 32, 128))
SYMMETRIC = QuantSupport(bits=(4,), group_sizes=(0, 64), symmetric=(True,))
HERE = target("here", {"rtn": WIDE, "awq": SYMMETRIC})
THERE = target("there", {"rtn": replace(WIDE, bits=(3, 4)), "nf4": QuantSupport(bits=(4,), group_sizes=(64,))})


def asked(method: str, **options: Any) -> CompileOptions:
    return CompileOptions(dtype="fp32", quantization=Quantization(method=method, **options))


def refusal(options: CompileOptions, of: Target = HERE) -> tuple[str, str]:
    with pytest.raises(TargetError) as caught:
        check_options(of, options, lambda: (HERE, THERE))
    return caught.value.what, caught.value.remedy or ""


@pytest.mark.parametrize(
    ("options", "what", "remedy"),
    [
        (
            asked("rtn", bits=3),
            "3-bit weights",
            "2, 4, 8 bits; nearest here: --quant rtn --bits 4; the same request runs on --target there",
        ),
        (
            asked("rtn", bits=7, group_size=32),
            "7-bit weights",
            "2, 4, 8 bits; nearest here: --quant rtn --bits 8 --group-size 32",
        ),
        (
            asked("rtn", bits=4, group_size=96),
            "group size 96",
            "group sizes 0, 32, 128; nearest here: --quant rtn --bits 4 --group-size 128",
        ),
        (
            asked("nf4", bits=4),
            "quantization 'nf4'",
            "rtn, awq; nearest here: --quant rtn --bits 4; the same request runs on --target there",
        ),
        (
            asked("awq", bits=4, symmetric=False),
            "asymmetric quantization",
            "symmetric; nearest here: --quant awq --symmetric",
        ),
    ],
)
def test_names_the_nearest(options: CompileOptions, what: str, remedy: str) -> None:
    assert refusal(options) == (f"target 'here' does not take {what}", f"it takes: {remedy}")


def test_nearest_is_taken() -> None:
    """What is named as the nearest passes the same check."""
    check_options(HERE, asked("rtn", bits=4, group_size=128))
    check_options(HERE, asked("awq", bits=4))


def test_a_target_without_quantization() -> None:
    what, remedy = refusal(asked("rtn", bits=4), target("bare", {}))
    assert what == "target 'bare' does not take quantization 'rtn'"
    assert remedy == "it takes: none; the same request runs on --target here or there"


def test_other_refusals() -> None:
    assert refusal(CompileOptions(dtype="bf16"))[1] == "it takes: fp32"
    assert refusal(CompileOptions(dtype="fp32", kv_cache="paged"))[1] == "it takes: none"
