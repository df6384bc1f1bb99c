"""What two runs are compared by, and what is fed to them: numbers made by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import make_model

from optc.compiler.capture import capture_model, capture_module
from optc.compiler.execution.drift import Drift, comparable, measure, measure_each
from optc.compiler.execution.probe import Probe, for_streaming, random_probe, run_probe, text_probe
from optc.compiler.execution.stage_driver import OutputRole, StageRun
from optc.compiler.ir.stored_weights import WorkFile


def test_measure_by_hand() -> None:
    before = StageRun([torch.tensor([[0.0, 0.0], [2.0, 0.0]])], [[torch.tensor([[3.0], [4.0]])]])
    after = StageRun([torch.tensor([[0.0, math.log(3.0)], [2.0, 0.0]])], [[torch.tensor([[3.0], [4.5]])]])
    drift = measure(before, after)
    assert drift.max_abs_diff == pytest.approx(math.log(3.0))
    assert drift.scale == 2.0
    # KL((1/2, 1/2) || (1/4, 3/4)) on one of two tokens
    assert drift.kl == pytest.approx(0.5 * (0.5 * math.log(2.0) + 0.5 * math.log(2.0 / 3.0)))
    assert drift.top1 == 0.5
    assert drift.layers == (pytest.approx(0.1),)


@pytest.mark.parametrize("role", ["logits", "classes", "hidden", "output"])
def test_what_stayed_is_measured_as_what_changed(role: OutputRole, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal numbers take a shorter way, to the same figures; infinite ones do not."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(length, 7, generator=generator) for length in (5, 3)]
    before, after = (StageRun([row.clone() for row in rows], [[rows[0] * 2]], role) for _ in range(2))
    text = ((1, 2, 3, 4, 5), (6, 5, 4))
    short = measure(before, after, text)
    assert (short.kl, short.top1) == ((0.0, 1.0) if role in ("logits", "classes") else (None, None))
    monkeypatch.setattr(torch, "equal", lambda *_: False)
    long = measure(before, after, text)
    assert short.entropy == pytest.approx(long.entropy)
    assert short.kept == pytest.approx(long.kept)
    assert (short.kl, short.cosine) == (pytest.approx(long.kl, abs=1e-12), pytest.approx(long.cosine))
    names = ("max_abs_diff", "scale", "relative", "top1", "classes", "flipped", "perplexity", "layers")
    assert [getattr(short, name) for name in names] == [getattr(long, name) for name in names]


@pytest.mark.parametrize("role", ["logits", "classes", "hidden", "output"])
def test_what_was_seen_of_a_run_says_what_a_new_look_would(role: OutputRole) -> None:
    """A run keeps what was found out about it alone, for comparisons with other runs; one that equals it knows it too."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(length, 7, generator=generator) for length in (5, 3)]
    rows[0][1, 2] = -math.inf  # a class that is ruled out
    moved = [row + 0.1 * torch.randn(row.shape, generator=generator) for row in rows]
    text = ((1, 2, 3, 4, 5), (6, 5, 4))

    def new(values: list[torch.Tensor]) -> StageRun:
        return StageRun([row.clone() for row in values], [], role)

    def same(found: list[Drift], expected: list[Drift]) -> None:
        assert repr(found) == repr(expected)  # to the last digit, NaN among them

    first, second, third = new(rows), new(moved), new(moved)
    same(measure_each([first], second, text), measure_each([new(rows)], new(moved), text))
    same(measure_each([second, first], third, text), measure_each([new(moved), new(rows)], new(moved), text))
    same(measure_each([third], first, text), measure_each([new(moved)], new(rows), text))
    assert (role == "output") == (not {key for key in third.seen if key[0] != "perplexity"})


def test_a_run_of_other_numbers_has_seen_nothing() -> None:
    run, other = StageRun([torch.tensor([[0.0, 2.0]])], []), StageRun([torch.tensor([[1.0, 0.0]])], [])
    before = measure(run, other)
    changed = replace(run, logits=[torch.tensor([[3.0, 0.0]])])
    assert measure(changed, other) == measure(StageRun([torch.tensor([[3.0, 0.0]])], []), other) != before


def test_integers_are_compared_as_they_are() -> None:
    """float32 has whole numbers up to 2^24."""
    ids, others = (StageRun([torch.tensor([2**40 + step, 7])], [], "output") for step in (0, 1))
    assert measure(ids, others).max_abs_diff == 1


def test_perplexity_change_on_text() -> None:
    sure, unsure = torch.tensor([[9.0, 0.0], [0.0, 0.0]]), torch.zeros(2, 2)
    drift = measure(StageRun([unsure], []), StageRun([sure], []), ((0, 0),))
    assert drift.perplexity == pytest.approx((1 + math.exp(-9.0)) / 2 - 1)


def test_nan_on_one_side_is_infinite_drift() -> None:
    good, bad = StageRun([torch.ones(1, 2)], []), StageRun([torch.tensor([[1.0, math.nan]])], [])
    assert measure(good, bad).max_abs_diff == math.inf
    assert measure(bad, bad).max_abs_diff == 0.0


def test_probes_are_ragged_and_long_enough_to_decode() -> None:
    for probe in (random_probe(50), text_probe(list(range(400)))):
        lengths = [len(row) for row in probe.sequences]
        assert len(set(lengths)) == 4
        assert min(lengths) >= 9


def test_programs_whose_weights_stay_in_files_are_fed_less(tmp_path: Path) -> None:
    program, probe = capture_model(make_model("llama")), text_probe(list(range(400)))
    assert for_streaming(program, probe) == (probe, "")
    program.work_file = WorkFile(tmp_path)
    short, note = for_streaming(program, probe)
    assert [len(row) for row in short.sequences] == [24, 6, 12, 8]
    assert [row[0] for row in short.sequences] == [row[0] for row in probe.sequences]
    assert (short.steps, short.is_text) == (1, True)
    assert note == "the gate fed 50 tokens, not 200, and decoded 1 step: the weights stay in files"
    module = Probe(tensors=(torch.ones(2, 3),))
    assert for_streaming(program, module) == (module, "")


def test_run_probe_takes_language_models_and_modules() -> None:
    program = capture_model(make_model("llama"))
    run = run_probe(program, random_probe(128))
    assert [tuple(row.shape) for row in run.logits] == [(40, 128), (10, 128), (20, 128), (13, 128)]
    assert len(run.taps) == 2
    module = capture_module(torch.nn.Linear(3, 5), (torch.ones(2, 3),))
    run = run_probe(module, Probe(tensors=(torch.ones(2, 3),)))
    assert tuple(run.logits[0].shape) == (2, 5)
    assert run.taps == []


def test_logits_are_compared_without_what_a_softmax_does_not_see() -> None:
    before = StageRun([torch.tensor([[1.0, -1.0]])], [])
    shifted = StageRun([torch.tensor([[11.0, 9.0]])], [])
    assert measure(before, shifted).relative == 0.0
    assert measure(before, shifted).cosine == pytest.approx(1.0)
    halved = measure(before, StageRun([torch.tensor([[0.5, -0.5]])], []))
    assert halved.relative == pytest.approx(0.5)
    assert halved.cosine == pytest.approx(1.0)


def test_hidden_states_have_no_distribution() -> None:
    before = StageRun([torch.tensor([[3.0, 4.0], [1.0, 0.0]])], [], role="hidden", predicts_next=False)
    after = StageRun([torch.tensor([[3.0, 4.0], [0.0, 1.0]])], [], role="hidden", predicts_next=False)
    drift = measure(before, after, ((0, 1),))
    assert (drift.kl, drift.top1, drift.perplexity, drift.classes) == (None, None, None, 0)
    assert drift.relative == pytest.approx(math.sqrt(2 / 26))
    assert drift.cosine == pytest.approx(0.5)  # 1 and 0


def test_outputs_of_a_module_are_compared_one_by_one() -> None:
    """A large output does not hide a small wrong one; integers and complex numbers count too."""
    large, small = torch.full((4,), 1e3), torch.tensor([1.0 + 1.0j])
    before = StageRun([large, small, torch.tensor(2)], [], role="output")
    drift = measure(before, StageRun([large, -small, torch.tensor(2)], [], role="output"))
    assert (drift.relative, drift.cosine) == (pytest.approx(2.0), pytest.approx(-1.0))


def test_zeros_equal_zeros_and_nothing_else() -> None:
    zeros, ones = (StageRun([make(2, 3)], [], role="hidden") for make in (torch.zeros, torch.ones))
    assert (measure(zeros, zeros).relative, measure(zeros, zeros).cosine) == (0.0, 1.0)
    assert measure(zeros, ones).relative == math.inf
    assert math.isnan(measure(zeros, ones).cosine)
    assert math.isnan(measure(ones, zeros).cosine)


def test_entropy_flatness_and_leads() -> None:
    flat = StageRun([torch.zeros(1, 8)], [])
    drift = measure(flat, flat)
    assert drift.entropy == pytest.approx(math.log(8))
    assert (drift.classes, drift.flatness) == (8, pytest.approx(1.0))
    before = StageRun([torch.tensor([[2.0, 0.0], [0.5, 0.0], [0.0, 0.1]])], [])
    after = StageRun([torch.tensor([[1.0, 0.0], [-0.5, 0.0], [0.0, 9.0]])], [])
    drift = measure(before, after)
    assert drift.kept == (2.0, pytest.approx(0.1))
    assert drift.flipped == (0.5,)
    assert [drift.decided(lead) for lead in (0.0, 0.2, 0.5, 1.0, 2.0, 3.0)] == [
        (3, 2 / 3),
        (2, 0.5),
        (1, 1.0),
        (1, 1.0),
        (0, 1.0),
        (0, 1.0),
    ]


def test_a_class_that_is_ruled_out_costs_nothing() -> None:
    run = StageRun([torch.tensor([[0.0, 0.0, -math.inf]])], [])
    assert measure(run, run).kl == 0.0
    assert measure(run, run).entropy == pytest.approx(math.log(2))


def test_rows_of_several_axes() -> None:
    """[batch, tokens, classes]: each token is a row of its own, whatever its offset."""
    before = torch.tensor([[[5.0, 5.0, 5.0], [8.0, 5.0, 5.0]]])
    after = torch.tensor([[[1.0, 1.0, 1.0], [5.0, 8.0, 5.0]]])
    drift = measure(StageRun([before], []), StageRun([after], []))
    weight = 1 / (math.exp(3.0) + 2)  # of a class that is behind by 3
    assert drift.kl == pytest.approx((math.exp(3.0) * weight - weight) * 3.0 / 2)
    lead = -math.exp(3.0) * weight * math.log(math.exp(3.0) * weight) - 2 * weight * math.log(weight)
    assert drift.entropy == pytest.approx((math.log(3) + lead) / 2)
    assert (drift.top1, drift.classes) == (0.5, 3)
    one = StageRun([before[:, :1]], [])
    assert measure(one, one).classes == 3
    assert (drift.kept, drift.flipped) == ((0.0,), (pytest.approx(3.0),))
    assert drift.relative == pytest.approx(math.sqrt(18 / 6))
    assert drift.cosine == pytest.approx((1 - 0.5) / 2)  # (0, 0, 0) twice, and (2, -1, -1) beside (-1, 2, -1)


def test_kl_is_a_mean_over_rows() -> None:
    """Of three rows with two classes, one goes from (1/2, 1/2) to (1/4, 3/4)."""
    before, after = torch.zeros(3, 2), torch.zeros(3, 2)
    after[0, 1] = math.log(3.0)
    drift = measure(StageRun([before], []), StageRun([after], []))
    assert drift.kl == pytest.approx((0.5 * math.log(2.0) + 0.5 * math.log(2.0 / 3.0)) / 3)


def test_sequences_are_pooled() -> None:
    """A sequence of small numbers weighs little; an output of a module is not pooled (see above)."""
    before, after = (
        StageRun([torch.tensor([[x, 0.0]]), torch.tensor([[0.0, 10.0]])], [], role="hidden") for x in (1.0, 2.0)
    )
    assert measure(before, after).relative == pytest.approx(1 / math.sqrt(101))


def test_numbers_are_compared_as_they_are() -> None:
    """Complex ones by both parts, float64 as such, small integers without wrapping around."""

    def gap(old: torch.Tensor, new: torch.Tensor) -> float:
        return measure(StageRun([old], [], role="output"), StageRun([new], [], role="output")).max_abs_diff

    assert gap(torch.tensor([1.0 + 1.0j]), torch.tensor([1.0 - 1.0j])) == 2.0
    tiny = 2.0**-40
    assert gap(torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64) + tiny) == tiny
    assert gap(torch.tensor([1], dtype=torch.uint8), torch.tensor([0], dtype=torch.uint8)) == 1.0


def test_runs_of_different_inputs_are_not_compared() -> None:
    one, two = StageRun([torch.zeros(2, 2)], []), StageRun([torch.zeros(2, 2)] * 2, [])
    with pytest.raises(ValueError, match="zip"):
        measure(two, one)
    with pytest.raises(ValueError, match="zip"):
        measure(one, one, ((0, 1), (0, 1)))


def test_perplexity_is_over_all_predictions() -> None:
    """Each token but the first is predicted, by the row before it; a text of one token says nothing; e^80 is the most."""
    rows = torch.tensor([[0.0, 0.0], [0.0, math.log(3.0)], [7.0, -7.0]])
    flat = torch.zeros(3, 2)
    drift = measure(StageRun([flat, flat[:1]], []), StageRun([rows, rows[:1]], []), ((0, 0, 1), (1,)))
    assert drift.perplexity == pytest.approx(math.sqrt(2 / 0.75) / 2 - 1)  # chances 1/2 and 3/4, against 1/2 twice
    wrong, right = (torch.tensor([[0.0, sign * 300.0], [0.0, 0.0]]) for sign in (-1, 1))
    drift = measure(StageRun([right], []), StageRun([wrong], []), ((0, 1),))
    assert drift.perplexity == pytest.approx(math.exp(80) - 1)


@pytest.mark.parametrize(("role", "predicts"), [("logits", False), ("hidden", True)])
def test_only_decoders_of_text_have_a_perplexity(role: OutputRole, predicts: bool) -> None:
    run = StageRun([torch.zeros(2, 2)], [], role=role, predicts_next=predicts)
    assert measure(run, run, ((0, 1),)).perplexity is None


def test_layers_of_small_numbers() -> None:
    before, after = (StageRun([torch.ones(1, 2)], [[torch.tensor([[x]])]]) for x in (0.5, 0.25))
    assert measure(before, after).layers == (0.5,)


@pytest.mark.parametrize("classes", [1, 2])
def test_one_class_is_no_distribution(classes: int) -> None:
    run = StageRun([torch.ones(1, classes)], [], role="classes")
    assert (measure(run, run).kl is None) == (classes == 1)


def test_answers_of_encoders() -> None:
    """Classes per sequence are a row per sequence, per token a row per token; a regression has no classes."""
    import transformers as hf

    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 32,
        "num_labels": 2,
    }
    found = {}
    for cls in (
        hf.BertForSequenceClassification,
        hf.BertForTokenClassification,
        hf.BertModel,
    ):
        run = run_probe(capture_model(cls(hf.BertConfig(**sizes))), Probe(sequences=((3, 4, 5), (6, 7)), is_text=True))
        found[cls.__name__] = (run.role, [tuple(row.shape) for row in run.logits], run.predicts_next)
        assert measure(run, run, ((3, 4, 5), (6, 7))).perplexity is None
    assert found == {
        "BertForSequenceClassification": ("classes", [(1, 2), (1, 2)], False),
        "BertForTokenClassification": ("classes", [(3, 2), (2, 2)], False),
        "BertModel": ("hidden", [(3, 16), (2, 16)], False),
    }


def test_outputs_without_numbers_are_alike() -> None:
    empty = StageRun([torch.zeros(0, 3)], [], role="output")
    drift = measure(empty, StageRun([torch.zeros(0, 3)], [], role="output"))
    assert (drift.max_abs_diff, drift.scale, drift.relative, drift.cosine) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("role", "before", "after"),
    [
        ("output", (0, 3), (2, 3)),
        ("output", (2, 3), (0, 3)),
        ("output", (1,), (3,)),
        ("output", (6,), (1, 6)),
        ("output", (2, 3), (3, 2)),
        ("logits", (4, 3), (2, 3)),
        ("logits", (0, 3), (2, 3)),
        ("embedding", (1, 3), (2, 3)),
    ],
)
def test_outputs_of_another_shape_are_infinitely_far(
    role: OutputRole, before: tuple[int, ...], after: tuple[int, ...]
) -> None:
    """Though their numbers are the same where there are any, and broadcasting would compare them; others are as alone."""
    one, two = (StageRun([torch.ones(shape)], [], role=role) for shape in (before, after))
    assert (found := measure(one, two)).max_abs_diff == found.relative == math.inf
    assert found.cosine == -1.0
    assert measure_each([one, two], two) == [found, measure(two, two)]


def test_a_number_is_a_row_of_one() -> None:
    one, two = StageRun([torch.tensor(2.0)], [], role="output"), StageRun([torch.tensor([2.5])], [], role="output")
    assert measure(one, two).max_abs_diff == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e5m2])
def test_infinities_that_both_have_are_left_out(dtype: torch.dtype) -> None:
    """Of masks; one that a side alone has, or of another sign, stays."""
    old = torch.tensor([math.inf, -math.inf, math.nan, 3.0, math.inf, math.nan, 4.0])
    new = torch.tensor([math.inf, -math.inf, math.nan, 3.0, -math.inf, 1.0, math.inf])
    found = [side.float().tolist() for side in comparable(old.to(dtype), new.to(dtype))]
    assert found[0][:5] == [0.0, 0.0, 0.0, 3.0, math.inf]
    assert found[1] == [0.0, 0.0, 0.0, 3.0, -math.inf, 1.0, math.inf]
    assert math.isnan(found[0][5])
    assert found[0][6] == 4.0


def test_whole_numbers_and_complex_ones_are_comparable() -> None:
    whole = torch.tensor([1, 2]), torch.tensor([1, 3])
    assert comparable(*whole) == whole
    old, new = comparable(torch.tensor([complex(math.inf, 0), 1j]), torch.tensor([complex(math.inf, 0), 2j]))
    assert (old.tolist(), new.tolist()) == ([0j, 1j], [0j, 2j])


def test_masks_of_a_module_are_compared_where_they_are_finite() -> None:
    before = StageRun([torch.tensor([[0.0, -math.inf], [2.0, 0.0]])], [], role="output")
    after = StageRun([torch.tensor([[0.0, -math.inf], [2.0, 1.0]])], [], role="output")
    drift = measure(before, after)
    assert (drift.max_abs_diff, drift.relative) == (1.0, 0.5)


def test_sums_are_made_in_float64() -> None:
    old = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0))
    new = old + 1e-4 * torch.randn(1, 4096, generator=torch.Generator().manual_seed(1))
    drift = measure(StageRun([old], [], role="hidden"), StageRun([new], [], role="hidden"))
    one, two = old.double().numpy(), new.double().numpy()
    assert drift.relative == pytest.approx(np.linalg.norm(two - one) / np.linalg.norm(one), rel=1e-9)


@pytest.mark.parametrize("role", ["logits", "classes", "hidden", "output"])
def test_several_references_are_compared_as_each_alone(role: OutputRole, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is equal gives zeros, and rows in blocks what they give together."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn((n, 9), generator=generator) for n in (5, 1, 3)]
    moved = [row + 0.1 * torch.randn(row.shape, generator=generator) for row in rows]
    one, two, same = (StageRun(logits, [], role=role) for logits in (rows, moved, [row.clone() for row in rows]))
    expected = [measure(one, two), measure(one, same)]
    assert expected[1].max_abs_diff == expected[1].relative == 0.0
    assert expected[1].cosine == pytest.approx(1.0)
    assert (expected[1].kl, expected[1].top1) == ((0.0, 1.0) if role in ("logits", "classes") else (None, None))
    assert expected[1].scale == expected[0].scale
    assert expected[1].entropy == expected[0].entropy
    assert measure_each([two, one], same)[1] == expected[1]
    assert measure_each([one, same], two) == [expected[0], expected[0]]
    monkeypatch.setattr("optc.compiler.ir.row_blocks.BLOCK", 18)
    found = measure(one, two)
    for name in ("max_abs_diff", "relative", "cosine", "kl", "top1", "entropy", "kept", "flipped"):
        value = getattr(expected[0], name)
        assert getattr(found, name) == (None if value is None else pytest.approx(value, rel=1e-12)), name
