"""What two runs are compared by, and what is fed to them: numbers made by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from families import make_model

from optc.compiler.capture import capture_model, capture_module
from optc.compiler.execution.drift import measure
from optc.compiler.execution.probe import Probe, for_streaming, random_probe, run_probe, text_probe
from optc.compiler.execution.stage_driver import StageRun
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
    assert [drift.decided(lead) for lead in (0.0, 0.2, 1.0, 3.0)] == [
        (3, 2 / 3),
        (2, 0.5),
        (1, 1.0),
        (0, 1.0),
    ]


def test_a_class_that_is_ruled_out_costs_nothing() -> None:
    run = StageRun([torch.tensor([[0.0, 0.0, -math.inf]])], [])
    assert measure(run, run).kl == 0.0
    assert measure(run, run).entropy == pytest.approx(math.log(2))


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
