"""Whole runs: the folder that is written, its log and report, and the errors of a run."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from families import make_model
from safetensors.torch import load_file, save_file
from training_runs import small_config, small_model, token_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from optc.compiler.capture import capture_pretrained
from optc.compiler.diagnostics import GateError, InputError, ResourceError, UsageError
from optc.training.loop import run_folder, train
from optc.training.memory_plan import predict
from optc.training.metrics import MetricsLog, StepRecord, read_log
from optc.training.models import load_frozen, load_trainable
from optc.training.untrained import check_experts, left_experts


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("start")
    return small_model(folder / "model"), token_file(folder / "text.jsonl")


@pytest.fixture(scope="module")
def trained(start: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "out"
    train(small_config(*start, output, max_steps=12, tensorboard=True))
    return output


def test_the_output_is_a_model_folder_that_is_captured(trained: Path, start: tuple[Path, Path]) -> None:
    program, info = capture_pretrained(trained)
    assert info.config["architectures"] == ["LlamaForCausalLM"]
    before, after = load_file(start[0] / "model.safetensors"), load_file(trained / "model.safetensors")
    assert before.keys() == after.keys()
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    ids = torch.arange(3, 15)[None]
    positions = torch.arange(12)[None]
    expected = load_frozen(trained)(input_ids=ids, position_ids=positions).logits
    torch.testing.assert_close(program(ids, positions), expected, rtol=1e-4, atol=1e-5)


def test_the_summary_and_the_log_tell_the_run(trained: Path) -> None:
    summary, rows = json.loads((trained / "train.json").read_text()), read_log(trained / "log.jsonl")
    assert [row.step for row in rows] == list(range(1, 13))
    assert summary["steps"] == 12
    assert (summary["skipped"], summary["notes"]) == (0, [])
    assert summary["tokens"] == sum(row.tokens for row in rows)
    assert (summary["first_loss"], summary["last_loss"]) == (rows[0].loss, rows[-1].loss)
    assert summary["last_loss"] < summary["first_loss"]
    assert summary["trainable"] == summary["parameters"]
    assert [row.step for row in rows if row.memory is not None] == [1, 12]
    assert all(row.tokens_per_s == pytest.approx(row.tokens / row.seconds) for row in rows)
    assert not run_folder(trained).exists()


def test_the_report_has_curves_and_needs_no_network(trained: Path) -> None:
    text = (trained / "report.html").read_text()
    for word in (
        "Loss, nats per label token",
        "Learning rate",
        "Norm of the gradient",
        "Tokens per second",
        'class="line s1"',
        "optimizer.lr",
        "activations",
    ):
        assert word in text
    assert "http" not in text
    assert "<script" not in text


def test_tensorboard_has_each_step(trained: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    rows = read_log(trained / "log.jsonl")
    found = events.Scalars("loss")
    assert [item.step for item in found] == [row.step for row in rows]
    assert [item.value for item in found] == pytest.approx([row.loss for row in rows], rel=1e-6)


def test_pretraining_draws_weights_with_the_seed(start: tuple[Path, Path], tmp_path: Path) -> None:
    shape = tmp_path / "shape"
    shape.mkdir()
    (shape / "config.json").write_bytes((start[0] / "config.json").read_bytes())

    def weights(seed: int) -> Any:
        torch.manual_seed(seed)
        config = small_config(shape, start[1], tmp_path / "out", from_scratch=True)
        return load_trainable(config).model.embed_tokens.weight

    one, again, other = weights(0), weights(0), weights(1)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert float(one.detach().std()) == pytest.approx(0.02, rel=0.1)
    result = train(small_config(shape, start[1], tmp_path / "out", from_scratch=True, max_steps=2))
    assert result.first_loss == pytest.approx(4.16, abs=0.2)  # log 64: nothing is known at the start


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"qat": {"enabled": True, "group_size": 16}}, "experts are trained and written unrounded"),
        ({"lora": {"enabled": True}}, "experts are frozen, without adapters"),
        ({"lora": {"enabled": True, "base": "nf4"}}, "experts are frozen, without adapters, and not in NF4"),
    ],
)
def test_experts_that_are_left_are_named(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    made = small_config(tmp_path, tmp_path, tmp_path, **settings)
    experts = 2 * 4 * 3 * 64 * 128  # two layers of four experts of three linears
    assert left_experts(make_model("mixtral"), made) == (
        f"{said}: {experts:,} weights in 4 tensors, model.layers.0.mlp.experts.gate_up_proj the first",
    )
    assert left_experts(make_model("llama"), made) == ()
    assert left_experts(make_model("mixtral"), small_config(tmp_path, tmp_path, tmp_path)) == ()


@pytest.mark.parametrize(
    "settings",
    [
        {"lora": {"enabled": True, "base": "nf4", "targets": ("q_proj", "gate_up_proj")}},
        {"lora": {"enabled": True}},
        {"qat": {"enabled": True}},
    ],
)
def test_experts_that_the_config_leaves_are_not_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    check_experts(make_model("mixtral"), small_config(tmp_path, tmp_path, tmp_path, **settings))


def test_qlora_that_does_not_reach_experts_is_refused_before_its_first_step(tmp_path: Path) -> None:
    make_model("mixtral").save_pretrained(tmp_path / "model")
    text = token_file(tmp_path / "text.jsonl")
    config = small_config(tmp_path / "model", text, tmp_path / "out", lora={"enabled": True, "base": "nf4"})
    with pytest.raises(UsageError, match=r"lora\.base=nf4 does not reach experts") as error:
        train(config)
    assert error.value.where == "model.layers.0.mlp.experts.gate_up_proj"
    assert "196,608 of 238,400 weights" in str(error.value.why)  # two layers of [4, 256, 64] and [4, 64, 128]
    with pytest.raises(UsageError, match=r"lora\.base=nf4 does not reach experts"):
        predict(config)
    assert not (tmp_path / "out").exists()
    check_experts(make_model("llama"), config)


@pytest.fixture
def short_files() -> Iterator[None]:
    """No file of this process may grow beyond 8 kB, as where a filesystem has a limit."""
    before, action = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, action)


class TestErrors:
    def test_a_checkpoint_that_may_not_grow(
        self, start: tuple[Path, Path], tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        request.getfixturevalue("short_files")
        with pytest.raises(ResourceError) as found:
            train(small_config(*start, tmp_path / "out", max_steps=1, saving={"every": 1}))
        assert found.value.exit_code == 8
        assert not (tmp_path / "out").exists()

    def test_the_output_exists(self, start: tuple[Path, Path], tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        with pytest.raises(InputError, match="the output exists") as found:
            train(small_config(*start, tmp_path / "out"))
        assert found.value.exit_code == 3
        assert not run_folder(tmp_path / "out").exists()

    def test_no_output(self, start: tuple[Path, Path]) -> None:
        config = msgspec.structs.replace(small_config(*start, Path("x")), output="")
        with pytest.raises(UsageError, match="no output given"):
            train(config)

    def test_no_model(self, start: tuple[Path, Path]) -> None:
        config = msgspec.structs.replace(small_config(*start, Path("x")), model="")
        with pytest.raises(UsageError, match="no model given"):
            train(config)

    def test_missing_model(self, start: tuple[Path, Path], tmp_path: Path) -> None:
        with pytest.raises(InputError, match="the model folder does not exist"):
            train(small_config(tmp_path / "none", start[1], tmp_path / "out"))

    def test_an_encoder(self, start: tuple[Path, Path], tmp_path: Path) -> None:
        from transformers import BertConfig, BertModel

        shape = BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=64
        )
        BertModel(shape).save_pretrained(tmp_path / "bert")
        with pytest.raises(InputError, match="BertModel is not a causal language model"):
            train(small_config(tmp_path / "bert", start[1], tmp_path / "out"))

    def test_a_run_that_changes_no_weight_fails(self, start: tuple[Path, Path], tmp_path: Path) -> None:
        made = small_config(*start, tmp_path / "out", max_steps=2, precision="fp16", scaler={"initial": 2.0**40})
        with pytest.raises(GateError, match="none of the 2 steps changed a weight") as found:
            train(made)
        assert str(found.value.why).startswith("each was left out: overflow; ")
        assert found.value.remedy == "set scaler.initial below 1.09951e+12, or precision=bf16"
        assert [row.skipped for row in read_log(tmp_path / "out" / "log.jsonl")] == ["overflow"] * 2
        assert json.loads((tmp_path / "out" / "train.json").read_text())["skipped"] == 2
        before, after = (load_file(folder / "model.safetensors") for folder in (start[0], tmp_path / "out"))
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    def test_vocabulary_and_context_of_a_multimodal_model(self, start: tuple[Path, Path], tmp_path: Path) -> None:
        """Both stand in the nested config of its language model."""
        shape = LlavaConfig(
            text_config=LlamaConfig.from_pretrained(start[0], vocab_size=60),
            vision_config=CLIPVisionConfig(
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                image_size=8,
                patch_size=8,
            ),
            image_token_index=59,
        )
        shape.architectures = ["LlavaForConditionalGeneration"]
        shape.save_pretrained(tmp_path / "llava")
        text = token_file(tmp_path / "long.jsonl", lengths=(200,))
        made = small_config(tmp_path / "llava", text, tmp_path / "out", from_scratch=True, seq_len=65)
        (tmp_path / "high.jsonl").write_text('{"tokens": [3, 59, 60]}\n')
        with pytest.raises(InputError, match="token 60 is outside the vocabulary of 60"):
            train(
                msgspec.structs.replace(
                    made, data=msgspec.structs.replace(made.data, text=[str(tmp_path / "high.jsonl")])
                )
            )
        (tmp_path / "long.jsonl").write_text(json.dumps({"tokens": [3, 4] * 100}))
        with pytest.raises(InputError, match="seq_len 65 is longer than the model's context of 64"):
            train(made)

    def test_rows_longer_than_the_context(self, start: tuple[Path, Path], tmp_path: Path) -> None:
        text = token_file(tmp_path / "long.jsonl", lengths=(200,))
        with pytest.raises(InputError, match="seq_len 65 is longer than the model's context of 64"):
            train(small_config(start[0], text, tmp_path / "out", seq_len=65))

    def test_another_vocabulary_of_the_teacher(
        self, start: tuple[Path, Path], tmp_path: Path, example_model: Path
    ) -> None:
        config = small_config(*start, tmp_path / "out", distill={"teacher": str(example_model)})
        with pytest.raises(InputError, match="the teacher has 8192 tokens in its vocabulary, the model 64"):
            train(config)

    def test_a_loss_that_is_not_finite_leaves_checkpoints(self, start: tuple[Path, Path], tmp_path: Path) -> None:
        config = small_config(
            *start, tmp_path / "out", optimizer={"lr": 1e30}, max_steps=10, clip_norm=0, saving={"every": 1}
        )
        with pytest.raises(GateError, match="not finite in step") as found:
            train(config)
        assert str(run_folder(tmp_path / "out") / "checkpoints" / "step-0000000") in str(found.value.why)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            MemoryError(),
        ],
    )
    def test_out_of_memory_says_what_needs_less(
        self, start: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr("optc.training.step.loss_of", fail)
        with pytest.raises(ResourceError, match="out of memory while training") as found:
            train(small_config(*start, tmp_path / "out"))
        assert found.value.exit_code == 8
        assert "the plan predicts a peak of" in str(found.value.why)
        assert "--set gradient_accumulation=4 (" in str(found.value.remedy)
        assert "--set checkpointing.policy=full" in str(found.value.remedy)

    def test_a_damaged_log(self, tmp_path: Path) -> None:
        (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
        with pytest.raises(InputError, match="the log is damaged"):
            read_log(tmp_path / "log.jsonl")


def record(step: int, **more: Any) -> StepRecord:
    fields = {
        "epoch": 0,
        "loss": 1.0,
        "cross_entropy": 1.0,
        "lr": 0.1,
        "grad_norm": 1.0,
        "tokens": 8,
        "seconds": 1.0,
        "tokens_per_s": 8.0,
    }
    return StepRecord(step=step, **{**fields, **more})


def test_a_resumed_log_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, step=0, tensorboard=False)
    for step in (1, 2, 3):
        log.add(record(step))
    log.close()
    path = tmp_path / "log.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 4, "los')  # a kill cut it short
    log = MetricsLog(tmp_path, step=2, tensorboard=False)
    log.add(record(3, loss=0.5))
    log.close()
    assert [(row.step, row.loss) for row in read_log(path)] == [(1, 1.0), (2, 1.0), (3, 0.5)]


@pytest.mark.parametrize("kind", ["plain", "qat"])
def test_tensors_without_a_place_are_said_and_kept(start: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    """Biases that the config switches off, factors of adapters, heads for more tokens; of a tied head nothing is said."""
    folder = tmp_path / "source"
    shutil.copytree(start[0], folder)
    strays = {
        "model.layers.0.self_attn.q_proj.bias": torch.ones(4),
        "model.layers.0.mlp.up_proj.lora_A.weight": torch.arange(6.0).view(2, 3),
        "model.mtp.0.head.weight": torch.ones(2, 2, dtype=torch.bfloat16),
    }
    save_file({**load_file(folder / "model.safetensors"), **strays}, folder / "model.safetensors", {"format": "pt"})
    options = {"qat": {"enabled": True, "group_size": 16}} if kind == "qat" else {}
    result = train(small_config(folder, start[1], tmp_path / "out", max_steps=1, **options))
    names = "model.layers.0.mlp.up_proj.lora_A.weight, model.layers.0.self_attn.q_proj.bias, model.mtp.0.head.weight"
    assert result is not None
    said = f"3 tensor(s) have no place in the model: not trained, and written as they are: {names}"
    assert result.notes == (said,)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in strays.items())
    before = load_file(start[0] / "model.safetensors")
    assert kind == "qat" or written.keys() == before.keys() | strays.keys()
