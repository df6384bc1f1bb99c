"""One object per way of storing a weight: parts, arithmetic, sizes; other packages can add theirs."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import pytest
import torch
from dialect_calls import CALLS

from optc.compiler.diagnostics import InputError
from optc.compiler.formats import weight_format as registry
from optc.compiler.formats.weight_format import (
    ENTRY_POINTS,
    FP8,
    INT,
    NVFP4,
    WeightFormat,
    format_of,
    weight_format,
    weight_formats,
)
from optc.compiler.ops.library import specs


def test_every_op_that_makes_a_weight_has_its_format() -> None:
    ops = {spec.name for spec in specs() if spec.makes_weight}
    assert {item.op for item in weight_formats().values()} == ops
    assert all(format_of(item.spec.op) is item for item in weight_formats().values())
    assert format_of(torch.ops.optc.rotary.default) is None
    assert format_of(torch.ops.aten.linear.default) is None


@pytest.mark.parametrize("name", weight_formats())
def test_parts_and_keywords_are_those_of_the_op(name: str) -> None:
    """A weight made through the format is the op's own result; absent parts are None."""
    item = weight_format(name)
    args, keywords = CALLS[item.op]
    arguments = item.spec.op._schema.arguments
    assert len([one for one in arguments if not one.kwarg_only]) == len(item.parts)
    optional = {part for part, one in zip(item.parts, arguments, strict=False) if one.type.kind() == "OptionalType"}
    assert optional == item.optional
    assert args[0].dtype is item.codes
    bits, size = keywords.get("bits", item.bits[0]), keywords.get("group_size", 0)
    made = item.dequantize(item.parts_of(args), bits, size, torch.float32)
    assert torch.equal(made, item.spec.op(*args, **keywords))
    assert item.parts_of(args[:2]) == {**dict.fromkeys(item.parts), "codes": args[0], "scale": args[1]}


def test_scales_are_rounded_to_the_compute_type_where_they_are_kept_in_it() -> None:
    scale = torch.tensor([[1.0001]])
    assert INT.stored_scale(scale, torch.bfloat16).dtype is torch.bfloat16
    assert NVFP4.stored_scale(scale.to(torch.float8_e4m3fn), torch.bfloat16).dtype is torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("item", "bits", "size", "symmetric", "expected"),
    [
        (INT, 4, 64, True, 4.25),
        (INT, 4, 64, False, 4.3125),
        (INT, 3, 128, False, 3.1484375),
        (FP8, 8, 4096, True, 8.00390625),
        (NVFP4, 4, 16, True, 4.5),
        (registry.MXFP4, 4, 32, True, 4.25),
        (registry.NF4, 4, 64, False, 4.25),
    ],
)
def test_ideal_bits(item: WeightFormat, bits: int, size: int, symmetric: bool, expected: float) -> None:
    assert item.ideal_bits(bits, size, symmetric=symmetric) == expected


def test_unknown_format() -> None:
    with pytest.raises(InputError) as caught:
        weight_format("ternary")
    assert caught.value.what == "the weight format 'ternary' is not known"
    assert caught.value.why == "known are int, fp8, nf4, nvfp4, mxfp4"


def test_format_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    own = WeightFormat(
        name="ternary",
        op="dequantize",
        parts=("codes", "scale", "zero"),
        bits=(2,),
        codes=torch.uint8,
        keywords=lambda bits, size, _: {"bits": bits, "group_size": size},
    )

    class Point:
        name, group, value = "ternary", "optc.formats", "toy.formats:TERNARY"

        def load(self) -> WeightFormat:
            return own

    def points(*, group: str) -> list[Any]:
        return [Point()] if group == ENTRY_POINTS else []

    monkeypatch.setattr(metadata, "entry_points", points)
    registry.weight_formats.cache_clear()
    try:
        assert weight_format("ternary") is own
    finally:
        registry.weight_formats.cache_clear()
