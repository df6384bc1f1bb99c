"""Bits by sensitivity: the allocation by hand, and the pass on a model with one sensitive layer."""

from __future__ import annotations

import pytest
from rewrites import stirred

from optc.compiler.calibration.sequences import random_calibration
from optc.compiler.diagnostics import UsageError
from optc.compiler.rewriting.passes import PassContext
from optc.passes.quantization.auto import Choice, QuantizeAuto, allocate

CONTEXT = PassContext(calibration=random_calibration(128, samples=4, length=24, seed=0))


def _choice(size: int, two: float, four: float, eight: float) -> Choice:
    return Choice(("w",), size, {2: two, 4: four, 8: eight})


def test_the_best_upgrade_per_bit_comes_first() -> None:
    measured = [_choice(10, 1.0, 0.1, 0.0), _choice(10, 0.5, 0.4, 0.0), _choice(20, 1.0, 0.4, 0.0)]
    # 80 bits at two each. Saved per bit: 0.9/20, 0.1/20 (or 0.5/60), 0.6/40 (or 1.0/120).
    assert allocate(measured, [2, 4, 8], 2.0, 0.0) == [2, 2, 2]
    assert allocate(measured, [2, 4, 8], 2.5, 0.0) == [4, 2, 2]
    assert allocate(measured, [2, 4, 8], 3.5, 0.0) == [4, 2, 4]
    # 20 bits are left for the second alone; its way to 8 costs 60.
    assert allocate(measured, [2, 4, 8], 4.0, 0.0) == [4, 4, 4]
    assert allocate(measured, [2, 4, 8], 8.0, 0.0) == [8, 8, 8]


def test_quality_stops_it() -> None:
    measured = [_choice(10, 1.0, 0.1, 0.0), _choice(10, 0.5, 0.4, 0.0)]
    assert allocate(measured, [2, 4, 8], 8.0, 10.0) == [2, 2]
    assert allocate(measured, [2, 4, 8], 8.0, 0.6) == [4, 2]


@pytest.mark.parametrize("average", [2.5, 3.5])
def test_the_budget_is_kept(average: float) -> None:
    program = stirred("llama")
    result = QuantizeAuto(average_bits=average, group_size=32).run(program, CONTEXT)
    assert result.matched == 14
    bits = {entry.source: entry.bits for entry in result.program.contract.quantization.values()}
    sizes = {weight: program.weight(weight).numel() for weight in bits}
    mean = sum(bits[item] * sizes[item] for item in bits) / sum(sizes.values())
    assert average - 0.3 < mean <= average + 1e-6
    assert len(set(bits.values())) > 1
    # q, k and v read one input and get the same bits: they can still be merged.
    for layer in range(2):
        assert (
            len({count for item, count in bits.items() if f"layers.{layer}.self_attn" in item and "o_proj" not in item})
            == 1
        )
    table = [note for note in result.notes if " bits for " in note]
    assert len(table) == 8
    assert any(f"{mean:.3f} bits per weight" in note for note in result.notes)


def test_a_budget_outside_the_choices() -> None:
    with pytest.raises(UsageError, match=r"average_bits 1\.5 is out of range"):
        QuantizeAuto(average_bits=1.5)
