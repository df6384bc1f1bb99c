"""One optimizer step: exact normalization, mixed precision, clipping, schedules, distillation, what is not finite."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import small_config, small_model, token_file

from optc.compiler.diagnostics import GateError
from optc.training.config import ScheduleConfig
from optc.training.data import IGNORED
from optc.training.metrics import flops_per_token
from optc.training.schedule import learning_rate_share
from optc.training.setup import Run, prepare
from optc.training.step import train_step
from optc.training.world import World

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("start")
    return small_model(folder / "model"), token_file(folder / "text.jsonl")


def make(start: tuple[Path, Path], **more: Any) -> Run:
    return prepare(small_config(*start, Path("unused"), **more), World())


def curve(run: Run, steps: int = 4) -> list[float]:
    found = [train_step(run, last_good=None).loss for _ in range(steps)]
    assert all(value is not None for value in found)
    return [value for value in found if value is not None]


def test_accumulation_gives_the_curve_of_the_whole_batch(start: tuple[Path, Path]) -> None:
    # Rows hold different numbers of label tokens, so that a mean of means would show.
    whole = make(start, batch_size=4)
    assert len({int(row) for row in (whole.reader.next_step()[0].labels != IGNORED).sum(1)}) > 1
    expected = curve(make(start, batch_size=4), 8)
    for parts in (2, 4):
        assert curve(make(start, batch_size=4, gradient_accumulation=parts), 8) == pytest.approx(expected, abs=1e-5)


def test_the_loss_is_that_of_transformers(start: tuple[Path, Path]) -> None:
    run = make(start, batch_size=1, data={"batching": "tokens"})
    batch = make(start, batch_size=1, data={"batching": "tokens"}).reader.next_step()[0]
    labels = torch.cat([torch.full((len(batch.labels), 1), IGNORED), batch.labels], 1)[:, :-1]
    expected = run.model(input_ids=batch.input_ids, labels=labels)  # transformers shifts the labels itself
    found = train_step(run, last_good=None)
    # One label, that of the last input, falls off the end there.
    full = make(start, batch_size=1, data={"batching": "tokens"}).model(input_ids=batch.input_ids).logits
    last = torch.nn.functional.cross_entropy(full[0, -1:], batch.labels[0, -1:])
    count = found.tokens
    assert found.loss == pytest.approx(
        (float(expected.loss.detach()) * (count - 1) + float(last.detach())) / count, abs=1e-5
    )


def test_gradients_are_clipped_to_the_norm(start: tuple[Path, Path]) -> None:
    free, clipped = make(start, clip_norm=0), make(start, clip_norm=0.01, optimizer={"lr": 1e-3})
    norms: list[float] = []
    clipped.optimizer.register_step_pre_hook(
        lambda optimizer, args, kwargs: norms.append(
            math.sqrt(
                sum(float(item.grad.square().sum()) for group in optimizer.param_groups for item in group["params"])
            )
        )
    )
    a, b = train_step(free, last_good=None), train_step(clipped, last_good=None)
    assert a.grad_norm == b.grad_norm
    assert a.grad_norm > 0.1
    assert norms[0] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_follows_fp32(start: tuple[Path, Path], precision: str) -> None:
    expected = curve(make(start), 5)
    run = make(start, precision=precision, scaler={"initial": 1024.0})
    found = curve(run, 5)
    assert found == pytest.approx(expected, rel=torch.finfo(DTYPES[precision]).eps / 8)
    assert found != expected
    assert all(item.dtype == torch.float32 for item in run.model.parameters())


def test_an_overflow_skips_the_step_and_halves_the_scale(start: tuple[Path, Path]) -> None:
    run = make(start, precision="fp16", scaler={"initial": 2.0**40, "growth_interval": 3})
    before = [item.detach().clone() for item in run.model.parameters()]
    record = train_step(run, last_good=None)
    assert record.skipped == "overflow"
    assert record.scale == 2.0**39
    assert record.loss is not None
    assert record.grad_norm is None
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
    records = [train_step(run, last_good=None) for _ in range(40)]
    done = [row for row in records if row.skipped is None]
    assert done
    assert run.scaler.get_scale() < 2.0**39
    assert any(later.scale > earlier.scale for earlier, later in itertools.pairwise(done))  # type: ignore[operator]


class TestNotFinite:
    def test_stop_names_step_layer_and_checkpoint(self, start: tuple[Path, Path]) -> None:
        run = make(start)
        train_step(run, last_good=None)
        with torch.no_grad():
            run.model.model.layers[1].mlp.down_proj.weight[3, 2] = math.nan
        with pytest.raises(GateError, match="not finite in step 2") as found:
            train_step(run, last_good="out.run/checkpoints/step-00000001")
        assert found.value.exit_code == 5
        assert found.value.where == "weight model.layers.1.mlp.down_proj.weight"
        assert found.value.why == "last good checkpoint: out.run/checkpoints/step-00000001"

    def test_an_output_that_overflows_is_named(self, start: tuple[Path, Path]) -> None:
        run = make(start)
        with torch.no_grad():
            run.model.model.layers[1].mlp.up_proj.weight.fill_(3e38)
        with pytest.raises(GateError, match="in step 1") as found:
            train_step(run, last_good=None)
        assert found.value.where == "output of model.layers.1.mlp.up_proj"
        assert found.value.why == "last good checkpoint: none yet"

    def test_a_gradient_alone_is_named(self, start: tuple[Path, Path]) -> None:
        run = make(start)
        run.model.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
        with pytest.raises(GateError) as found:
            train_step(run, last_good=None)
        assert found.value.where == "gradient of model.norm.weight"

    def test_skip_leaves_the_step_out(self, start: tuple[Path, Path]) -> None:
        run = make(start, on_nan="skip")
        handle = run.model.model.norm.weight.register_hook(lambda gradient: gradient * math.nan)
        before = [item.detach().clone() for item in run.model.parameters()]
        record = train_step(run, last_good=None)
        assert (record.skipped, record.step, run.skipped) == ("not finite", 1, 1)
        assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
        handle.remove()
        assert train_step(run, last_good=None).skipped is None
        assert run.skipped == 0

    def test_skip_stops_after_ten_in_a_row(self, start: tuple[Path, Path]) -> None:
        run = make(start, on_nan="skip", precision="fp16")
        with torch.no_grad():
            run.model.lm_head.weight[5] = math.nan
        for _ in range(10):
            assert train_step(run, last_good=None).skipped == "not finite"
        with pytest.raises(GateError, match="not finite in step 11, the 11th in a row"):
            train_step(run, last_good=None)


class TestSchedule:
    def shares(self, **fields: Any) -> list[float]:
        return [learning_rate_share(ScheduleConfig(**fields), step, 11) for step in range(11)]

    def test_linear_after_a_warmup(self) -> None:
        found = self.shares(kind="linear", warmup_steps=2, min_ratio=0.2)
        assert found == pytest.approx([0.5, 1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])

    def test_cosine(self) -> None:
        found = self.shares(kind="cosine", min_ratio=0.0)
        assert found == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 10)) for step in range(11)])

    def test_constant(self) -> None:
        assert self.shares(kind="constant", warmup_steps=4) == [0.25, 0.5, 0.75] + [1.0] * 8

    def test_the_optimizer_follows(self, start: tuple[Path, Path]) -> None:
        run = make(start, max_steps=4, schedule={"kind": "linear", "min_ratio": 0.0}, optimizer={"lr": 0.3})
        assert [train_step(run, last_good=None).lr for _ in range(4)] == pytest.approx([0.3, 0.2, 0.1, 0.0])


class TestDistillation:
    def test_the_loss_mixes_cross_entropy_and_kl(self, start: tuple[Path, Path], tmp_path: Path) -> None:
        teacher = small_model(tmp_path / "teacher", seed=3)
        run = make(start, distill={"teacher": str(teacher), "weight": 0.25, "temperature": 2.0})
        batch = make(start).reader.next_step()[0]
        with torch.no_grad():
            inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
            student, target = run.model(**inputs).logits, run.teacher(**inputs).logits  # type: ignore[misc]
        kept = batch.labels != IGNORED
        entropy = torch.nn.functional.cross_entropy(student[kept], batch.labels[kept])
        p, q = (item[kept].div(2).softmax(-1) for item in (target, student))
        kl = (p * (p / q).log()).sum(-1).mean()
        record = train_step(run, last_good=None)
        assert record.cross_entropy == pytest.approx(float(entropy), abs=1e-5)
        assert record.divergence == pytest.approx(float(kl), abs=1e-5)
        assert record.loss == pytest.approx(0.75 * float(entropy) + 0.25 * 4 * float(kl), abs=1e-5)

    def test_a_student_approaches_its_teacher(self, start: tuple[Path, Path], tmp_path: Path) -> None:
        teacher = small_model(tmp_path / "teacher", seed=3)
        run = make(start, max_steps=40, distill={"teacher": str(teacher), "weight": 1.0}, optimizer={"lr": 3e-3})
        found = [train_step(run, last_good=None).divergence for _ in range(40)]
        assert found[-1] < 0.5 * found[0]  # type: ignore[operator]

    def test_a_model_is_at_no_distance_from_itself(self, start: tuple[Path, Path]) -> None:
        run = make(start, distill={"teacher": "self", "weight": 0.5})
        assert train_step(run, last_good=None).divergence == pytest.approx(0, abs=1e-6)


def test_memory_is_split(start: tuple[Path, Path]) -> None:
    run = make(start)
    found = train_step(run, last_good=None, with_memory=True).memory
    assert found is not None
    weights = sum(item.numel() for item in run.model.parameters()) * 4
    buffers = sum(item.numel() * item.element_size() for item in run.model.buffers())
    assert found.gradients == weights
    assert weights + buffers // 2 <= found.weights <= weights + buffers
    steps = 4 * len(list(run.model.parameters()))
    assert found.optimizer == 2 * weights + steps
    assert found.activations > 4 * 32 * 64 * 4  # at least the logits of four rows
    assert found.peak > 50e6


def test_flops_per_token(start: tuple[Path, Path]) -> None:
    run = make(start)
    # Per layer: q and o 16x16, k and v 16x8, three of 16x32; and the tied head of 64x16.
    weights = 2 * (2 * 256 + 2 * 128 + 3 * 512) + 64 * 16
    assert flops_per_token(run.model, 32) == 6 * weights + 12 * 2 * 16 * 32
