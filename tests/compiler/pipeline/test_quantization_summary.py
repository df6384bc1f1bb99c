"""Records of rounded weights and the sizes in the manifest, against figures worked out by hand."""

from __future__ import annotations

import pytest
import torch
from rewrites import rewritten, stirred
from stages import captured

from optc.compiler.ir.contract import Contract, WeightQuantization
from optc.compiler.pipeline.pipeline import Pipeline
from optc.compiler.pipeline.quantization_summary import (
    ideal_bits,
    linear_record,
    measured_records,
    quantized_linears,
    summarize,
)
from optc.compiler.rewriting.quantization_record import LinearRecord
from optc.passes.quantization.rtn import QuantizeRtn

ENTRY = WeightQuantization(method="rtn", bits=4, group_size=32, symmetric=True, source="a.weight")


def _record(**changes: object) -> LinearRecord:
    fields: dict[str, object] = {
        "name": "a.weight",
        "shape": (4, 64),
        "method": "rtn",
        "bits": 4,
        "group_size": 32,
        "symmetric": True,
        "weight_error": 0.0,
        "scale_min": 1.0,
        "scale_max": 1.0,
    }
    return LinearRecord(**{**fields, **changes})  # type: ignore[arg-type]


def test_linear_record_by_hand() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    record = linear_record(
        "w",
        weight,
        torch.tensor([[3.0, 3.0], [0.0, 0.0]]),
        torch.tensor([[0.5], [2.0]]),
        method="rtn",
        bits=4,
        group_size=0,
        symmetric=True,
    )
    assert record.weight_error == pytest.approx(1 / 25)
    assert (record.scale_min, record.scale_max, record.shape) == (0.5, 2.0, (2, 2))
    assert (record.error, record.error_rtn, record.damping, record.clip) == (None, None, None, 1.0)


@pytest.mark.parametrize(
    ("changes", "bits"),
    [
        ({}, 4 + 16 / 32),
        ({"symmetric": False}, 4 + 16 / 32 + 4 / 32),
        ({"group_size": 0, "bits": 8}, 8 + 16 / 64),
        ({"bits": 3, "group_size": 64, "symmetric": False}, 3 + 19 / 64),
        ({"format": "nf4", "group_size": 64, "symmetric": False}, 4 + 16 / 64),
    ],
)
def test_ideal_bits(changes: dict[str, object], bits: float) -> None:
    assert ideal_bits(_record(**changes)) == pytest.approx(bits)


def test_summary_counts_the_tensors_of_quantized_weights() -> None:
    contract = Contract(
        kind="module", inputs=(), outputs=(), quantization={"a.weight_packed": ENTRY, "e.up_0_packed": ENTRY}
    )
    sizes = {
        "a.weight_packed": 128,
        "a.weight_scales": 32,
        "a.weight_zero_points": 5,
        "a.bias": 1000,
        "a.weight2": 1000,
        "e.up_0_packed": 128,
        "e.up_0_scales": 32,
        "e.up_bias": 1000,
        "e.up_1": 1000,
    }
    rows = [_record(), _record(name="e.up[0]", bits=8, symmetric=False)]
    found = summarize(contract, rows, sizes)
    assert found["bytes"] == 128 + 32 + 5 + 128 + 32
    assert found["parameters"] == 2 * 4 * 64
    assert found["bits_per_parameter"] == pytest.approx(8 * 325 / 512, abs=1e-4)
    assert found["ideal_bits"] == pytest.approx((4.5 + 8.75) / 2)
    assert found["ratio_to_ideal"] == pytest.approx(8 * 325 / 512 / 6.625, abs=1e-4)
    assert found["ratio_to_bf16"] == pytest.approx(8 * 325 / 512 / 16, abs=1e-4)
    assert (found["linears"], found["method"], found["bits"], found["symmetric"]) == (2, "rtn", [4], True)


def test_summary_without_quantization_or_sizes() -> None:
    assert summarize(Contract(kind="module", inputs=(), outputs=()), [], {"a_b": 3}) == {}
    bare = Contract(kind="module", inputs=(), outputs=(), quantization={"a.weight_codes": ENTRY})
    assert "bytes" not in summarize(bare, [_record()], {})
    assert "bytes" not in summarize(bare, [], {"a.weight_codes": 3})


def test_errors_that_are_no_numbers_are_not_recorded() -> None:
    """JSON has none, and the manifest could not be read back."""
    huge = torch.full((1, 2), 1e30)
    record = linear_record(
        "w",
        huge,
        huge / 2,
        torch.ones(1, 1),
        method="rtn",
        bits=4,
        group_size=0,
        symmetric=True,
        error=float("nan"),
        error_rtn=float("inf"),
    )
    assert (record.error, record.error_rtn) == (None, None)
    assert record.weight_error == pytest.approx(0.25)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_records_from_tensors(name: str) -> None:
    """Against the arithmetic of the pass itself: transposed and stacked weights too."""
    program = stirred(name)
    result = rewritten(QuantizeRtn(bits=4, group_size=32, symmetric=False, ranges="full"), program)
    rows = measured_records(program, result.program)
    assert len(rows) == result.matched == len({row.name for row in rows})
    for row in rows:
        assert 0 < row.weight_error < 0.02, row.name
        label, _, index = row.name.partition("[")
        weight = program.weight(label)
        weight = weight[int(index[:-1])] if index else weight
        assert sorted(row.shape) == sorted(weight.shape)
        whole = weight.T if tuple(weight.shape) != row.shape or ".c_" in label else weight
        groups = whole.reshape(len(whole), -1, 32)
        # Zero is in every range, so the widest scale is the largest range of a group with 0 over 15 steps.
        ranges = (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / 15
        assert row.scale_max == pytest.approx(float(ranges.max()), rel=1e-6)
        assert row.scale_min == pytest.approx(float(ranges.min()), rel=1e-6)
        assert (row.error, row.tokens, row.method, row.bits) == (None, 0, "rtn", 4)
    assert measured_records(result.program, result.program) == ()


def test_the_pipeline_records_what_a_pass_does_not() -> None:
    result = Pipeline([QuantizeRtn(bits=8)]).run(captured("llama"))
    rows = quantized_linears(result.records)
    assert [row.name for row in rows] == [entry.source for entry in result.program.contract.quantization.values()]
    assert all(row.weight_error < 1e-4 and row.bits == 8 for row in rows)
