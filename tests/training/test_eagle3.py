"""Training of a draft model on a frozen base: what it drafts in training is what it drafts in use; runs and their folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_runs import VOCAB, interrupted, packed, small_config, small_model, token_file

from optc.compiler.diagnostics import UsageError
from optc.compiler.model_folder.checkpoint import check_folder, config_digest, weights_digest
from optc.compiler.model_folder.eagle3 import Eagle3Folder
from optc.training.config import TrainConfig
from optc.training.eagle3 import Eagle3Training, _Drafting, default_boundaries
from optc.training.frozen_base import hidden_states
from optc.training.loop import train
from optc.training.metrics import read_log
from optc.training.models import load_trainable

STEPS = 3


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("start")
    return small_model(folder / "model", layers=4), token_file(folder / "text.jsonl")


def config_of(start: tuple[Path, Path], output: Path, **more: Any) -> TrainConfig:
    heads = {"enabled": True, "draft_tokens": STEPS, "draft_vocab_size": 40, "decay": 0.5}
    return small_config(*start, output, eagle3=heads, **more)


def training(start: tuple[Path, Path]) -> Eagle3Training:
    config = config_of(start, Path("unused"))
    torch.manual_seed(0)
    base = load_trainable(config)
    with torch.no_grad():
        base.get_input_embeddings().weight.mul_(40)  # so that it is sure of some tokens
    made = Eagle3Training(base, config, torch.arange(VOCAB).flip(0))
    with torch.no_grad():
        for parameter in made.draft.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape) * 0.2
    return made


@torch.no_grad()
def test_hidden_states_are_what_layers_read(start: tuple[Path, Path]) -> None:
    base, batch = load_trainable(config_of(start, Path("unused"))).eval(), packed()
    with hidden_states(base, (0, 2, 4)) as found:
        out = base(batch.input_ids, position_ids=batch.position_ids, output_hidden_states=True, use_cache=False)
    torch.testing.assert_close(found[0], out.hidden_states[0])
    torch.testing.assert_close(found[2], out.hidden_states[2])
    torch.testing.assert_close(base.model.norm(found[4]), out.hidden_states[4])
    before = dict(found)
    base(batch.input_ids, position_ids=batch.position_ids)
    assert all(found[number] is before[number] for number in before)


@torch.no_grad()
def test_all_positions_draft_what_each_would_draft_alone(start: tuple[Path, Path]) -> None:
    """And the loss is that of these drafts, one by one, with the base's distribution over the draft vocabulary."""
    made, batch = training(start), packed()
    logits, states = made.run_base(batch, made.draft.config.boundaries)
    read = torch.cat(states, -1)
    drafting, state, together = _Drafting(made.draft, batch), made.draft.fc(read), []
    for place in range(STEPS):
        found, state = drafting.step(batch.labels.roll(-place, 1).clamp(min=0), state)
        together.append(found)
    weights = [0.5**place / 1.75 for place in range(STEPS)]
    loss, first, drafts = 0.0, 0.0, 0
    for row, begin, size in ((0, 0, 7), (0, 7, 5), (1, 0, 9)):
        part = slice(begin, begin + size)
        text, own_states = batch.labels[row, part], torch.zeros(size, 16)
        for anchor in range(size):
            base_states = read[row, part].clone()
            base_states[anchor + 1 :] = 0
            for place in range(min(STEPS, size - 1 - anchor)):
                end = anchor + place + 1
                got, own = made.draft(
                    text[None, :end], torch.arange(end)[None], base_states[None, :end], own_states[None, :end]
                )
                torch.testing.assert_close(together[place][row, begin + anchor], got[0, -1], rtol=1e-4, atol=1e-5)
                own_states[end : end + 1] = own[0, -1]
                target = logits[row, begin + end]
                if int(target.argmax()) in made.targets.tolist():
                    shares = target[made.targets].softmax(-1)
                    entropy = float(-(shares * got[0, -1].log_softmax(-1)).sum())
                    loss, drafts = loss + weights[place] * entropy, drafts + 1
                    first += entropy if place == 0 else 0.0
            own_states.zero_()
    sums = made(batch)
    assert drafts > 20
    assert math.isclose(float(sums.total), loss, rel_tol=1e-4)
    assert math.isclose(float(sums.cross_entropy), first, rel_tol=1e-4)


def test_a_draft_model_learns_the_distribution_of_its_base(start: tuple[Path, Path]) -> None:
    """The loss comes down to the base's entropy, which no draft model is below."""
    made, batch = training(start), packed()
    before = {name: item.clone() for name, item in made.base.state_dict().items()}
    trained = [item for item in made.parameters() if item.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(60):
        loss = made(batch).total
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        made.draft.lm_head.weight.zero_()
        flat = float(made(batch).total)
    assert losses[0] > losses[-1] * 1.5
    assert flat > losses[-1] * 1.5
    assert all(torch.equal(before[name], item) for name, item in made.base.state_dict().items())


def test_a_run_writes_a_folder_and_leaves_the_base(start: tuple[Path, Path], tmp_path: Path) -> None:
    """Killed and resumed, it is the same as in one go."""
    config = config_of(start, tmp_path / "whole", max_steps=12)
    result = train(config)
    assert result is not None
    assert result.trainable < result.parameters
    found, info = Eagle3Folder.read(tmp_path / "whole"), check_folder(start[0])
    assert found.config.boundaries == (1, 2, 3)
    assert found.config.draft_vocab_size == 40
    assert found.config.base_architecture == "LlamaForCausalLM"
    assert found.origin is not None
    assert (found.origin.config, found.origin.weights) == (config_digest(info), weights_digest(info))
    assert "embed_tokens.weight" not in found.tensors
    parts = config_of(start, tmp_path / "parts", max_steps=12)
    interrupted(parts, 7)
    train(parts, resume=True)
    names = ("whole", "parts")
    whole, other = (load_file(tmp_path / name / "model.safetensors") for name in names)
    assert all(torch.equal(tensor, other[name]) for name, tensor in whole.items())
    first, second = ([row.loss for row in read_log(tmp_path / name / "log.jsonl")] for name in names)
    assert first == second


def test_what_has_no_meaning_on_a_frozen_base_is_refused(start: tuple[Path, Path], tmp_path: Path) -> None:
    for more, message in (
        ({"from_scratch": True}, "from_scratch does not go with eagle3.enabled"),
        ({"lora": {"enabled": True}}, "lora.enabled does not go with"),
        ({"distill": {"teacher": "self"}}, "distill.teacher does not go with"),
        ({"parallel": {"kind": "ddp"}}, "parallel.kind does not go with"),
        ({"compile": {"scope": "blocks"}}, "compile.scope does not go with"),
    ):
        with pytest.raises(UsageError, match=message):
            train(config_of(start, tmp_path / "out", **more))
    heads = {"enabled": True, "boundaries": [1, 2, 4]}
    with pytest.raises(UsageError, match="no hidden state 4"):
        train(small_config(*start, tmp_path / "out", eagle3=heads))


def test_default_boundaries_are_those_of_vllm_where_these_are_three() -> None:
    assert [default_boundaries(layers) for layers in (3, 4, 6, 8, 32)] == [
        (0, 1, 2),
        (1, 2, 3),
        (1, 3, 5),
        (2, 4, 5),
        (2, 16, 29),
    ]
