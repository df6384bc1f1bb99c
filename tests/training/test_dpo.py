"""Direct preference optimization: pairs of answers, their loss by hand, rewards that move apart, and runs that resume."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from letter_texts import CHAT, LETTERS, SHORTENS, letters, rows
from safetensors.torch import load_file
from training_runs import VOCAB, interrupted, small_config, small_model

from optc.compiler.diagnostics import InputError, UsageError
from optc.training.config import TrainConfig
from optc.training.data import IGNORED
from optc.training.dpo import preference_sums
from optc.training.loop import train
from optc.training.memory_plan import predict
from optc.training.metrics import read_log
from optc.training.models import load_frozen
from optc.training.pairs import PairBatch, PairReader, read_answers
from optc.training.recipe import load_config
from optc.training.setup import Run, prepare
from optc.training.validation import measure
from optc.training.world import World

PAIRS = [
    ("ab", "cd", "ef"),
    ("b", "cc", "fed"),
    ("abc", "d", "e"),
    ("cb", "ddd", "f"),
    ("a", "c", "ffff"),
    ("bb", "dc", "fe"),
]
SAID = [{"role": "user", "content": "a"}]
MORE = [*SAID, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with dropout and a tokenizer of letters, and pairs in which c and d are chosen, e and f rejected."""
    folder = tmp_path_factory.mktemp("start")
    model = small_model(folder / "model", dropout=0.3)
    letters()._core.save(str(model / "tokenizer.json"))
    found = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in PAIRS]
    return model, rows(folder / "pairs.jsonl", *found)


def config_of(start: tuple[Path, Path], output: Path, **more: Any) -> TrainConfig:
    tree: dict[str, Any] = {"dpo": {"enabled": True}, "batch_size": 3, "optimizer": {"lr": 3e-3}, **more}
    return small_config(*start, output, **tree)


def by_hand(model: Path, reference: Path, beta: float) -> list[float]:
    """The loss of each pair, by transformers: each answer alone, without padding."""
    networks = [load_frozen(folder) for folder in (model, reference)]
    found = []
    for prompt, *answers in PAIRS:
        ratios = []
        for text in answers:
            tokens = torch.tensor([[*(LETTERS[letter] for letter in prompt + text), 1]])
            logs = [network(input_ids=tokens[:, :-1]).logits[0].log_softmax(-1) for network in networks]
            ours, theirs = (item.gather(1, tokens[0, 1:, None])[len(prompt) - 1 :].sum() for item in logs)
            ratios.append(float(ours - theirs))
        found.append(math.log1p(math.exp(-beta * (ratios[0] - ratios[1]))))
    return found


class TestRows:
    def read(self, tmp_path: Path, row: Any, template: Any = CHAT) -> list[tuple[str, str]]:
        """Chosen and rejected as letters, what is not learned in capitals."""
        names = {number: letter for letter, number in LETTERS.items()}
        path = rows(tmp_path / "pairs.jsonl", row)
        ((chosen, rejected),) = read_answers([str(path)], letters(), vocab_size=VOCAB, end_token=1, template=template)
        return [
            "".join(
                names.get(token, "$") if learned else names[token].upper()
                for token, learned in zip(item.tokens.tolist(), item.learned.tolist(), strict=True)
            )
            for item in (chosen, rejected)
        ]

    def test_texts_end_with_the_end_token(self, tmp_path: Path) -> None:
        assert self.read(tmp_path, {"prompt": "ab", "chosen": "c", "rejected": "de"}) == ["ABc$", "ABde$"]

    @pytest.mark.parametrize(
        "row",
        [
            {"prompt": MORE, "chosen": [answer("d")], "rejected": [answer("e")]},
            {"chosen": [*MORE, answer("d")], "rejected": [*MORE, answer("e")]},
            {"prompt": "c", "chosen": [*MORE, answer("d")], "rejected": [*MORE, answer("e")]},
        ],
        ids=["messages", "conversations", "conversations and a text"],
    )
    def test_messages(self, tmp_path: Path, row: Any) -> None:
        """Only the last answers are learned, with what the template writes behind them."""
        assert self.read(tmp_path, row) == ["U:A|A:B|U:C|A:d|", "U:A|A:B|U:C|A:e|"]

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"prompt": "a", "completion": "b"}, "the row is not a pair of answers"),
            ({"chosen": "ab", "rejected": "ac"}, "the row is not a pair of answers to one prompt"),
            (
                {"prompt": "a", "chosen": "b", "rejected": [answer("c")]},
                "the row is not a pair of answers to one prompt",
            ),
            (
                {"chosen": [answer("b")], "rejected": [answer("c")]},
                "the conversations are not two answers to one prompt",
            ),
            ({"chosen": SAID, "rejected": SAID}, "the conversations are not two answers to one prompt"),
            (
                {"prompt": SAID, "chosen": ["b"], "rejected": ["c"]},
                "the conversations are not two answers to one prompt",
            ),
        ],
    )
    def test_what_is_no_pair(self, tmp_path: Path, row: Any, message: str) -> None:
        with pytest.raises(InputError, match=message) as found:
            self.read(tmp_path, row)
        assert "pairs.jsonl:1" in str(found.value)

    def test_a_template_that_rewrites(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="otherwise once message 4 follows"):
            self.read(tmp_path, {"prompt": MORE, "chosen": [answer("d")], "rejected": [answer("e")]}, SHORTENS)

    def test_no_template(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="conversations need a chat template"):
            self.read(tmp_path, {"prompt": SAID, "chosen": [answer("d")], "rejected": [answer("e")]}, None)


def moved(start: tuple[Path, Path], folder: Path) -> Path:
    """The model with other weights: what is trained is no longer its reference."""
    return small_model(folder / "moved", seed=1)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_the_loss_is_the_one_by_hand(start: tuple[Path, Path], tmp_path: Path, beta: float) -> None:
    run = prepare(config_of(start, tmp_path / "out", dpo={"enabled": True, "beta": beta}), World())
    other = moved(start, tmp_path)
    run.model.load_state_dict(load_frozen(other).state_dict())
    run.model.eval()
    expected = by_hand(other, start[0], beta)
    (batch,) = replace_batch(run, batch_size=6)
    found = preference_sums(run.model, batch, run.config, run.teacher)
    assert found.total.item() == pytest.approx(sum(expected), rel=1e-4)
    assert found.rewards is not None
    assert float(found.rewards[2]) == sum(loss < math.log(2) for loss in expected)
    margin = float(found.rewards[0] - found.rewards[1])
    assert margin == pytest.approx(-sum(math.log(math.expm1(loss)) for loss in expected), rel=1e-3)


def replace_batch(run: Run, batch_size: int) -> list[PairBatch]:
    """All pairs in the file's order."""
    import msgspec

    assert isinstance(run.reader, PairReader)
    return PairReader(
        run.reader.pairs, msgspec.structs.replace(run.config, batch_size=batch_size), held_out=True
    ).whole_epoch()


def test_smoothing_and_fillers(start: tuple[Path, Path], tmp_path: Path) -> None:
    """Smoothing mixes the losses of both orders; a filler without labels counts for nothing."""
    run = prepare(config_of(start, tmp_path / "out", dpo={"enabled": True, "label_smoothing": 0.25}), World())
    other = load_frozen(moved(start, tmp_path))
    (batch,) = replace_batch(run, batch_size=6)
    found = preference_sums(other, batch, run.config, run.teacher).total.item()
    one = by_hand(moved(start, tmp_path), start[0], 0.1)
    reverse = [math.log1p(1 / math.expm1(loss)) for loss in one]  # -log sigmoid(-m), of -log sigmoid(m)
    assert found == pytest.approx(0.75 * sum(one) + 0.25 * sum(reverse), rel=1e-4)
    filler = replace(batch, labels=torch.full_like(batch.labels, IGNORED))
    assert (batch.terms, filler.terms) == (6, 0)
    assert preference_sums(other, filler, run.config, run.teacher).total.item() == 0


def test_with_adapters_the_reference_is_the_base(start: tuple[Path, Path], tmp_path: Path) -> None:
    lora = {"enabled": True, "rank": 4, "dropout": 0.2, "dora": True, "modules_to_save": ["lm_head"]}
    run = prepare(config_of(start, tmp_path / "out", lora=lora), World())
    assert run.teacher is None
    (batch,) = replace_batch(run, batch_size=6)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, item in run.model.named_parameters():
            if "lora_B" in name or "lm_head.modules_to_save" in name:
                item.normal_(std=0.1)
    trained = {name for name, item in run.model.named_parameters() if item.requires_grad}
    run.model.eval()
    found = preference_sums(run.model, batch, run.config, None)
    expected = preference_sums(run.model, batch, run.config, load_frozen(start[0]))
    assert found.total.item() == pytest.approx(expected.total.item(), rel=1e-5)
    assert found.total.item() != pytest.approx(6 * math.log(2), rel=1e-3)
    assert trained == {name for name, item in run.model.named_parameters() if item.requires_grad}
    run.model.train()
    preference_sums(run.model, batch, run.config, None).total.backward()
    assert run.model.training
    assert all(item.grad is not None for item in run.model.parameters() if item.requires_grad)


@pytest.mark.parametrize("lora", [None, {"enabled": True, "rank": 8, "alpha": 64}], ids=["full", "lora"])
def test_a_run_moves_rewards_apart_and_resumes(start: tuple[Path, Path], tmp_path: Path, lora: Any) -> None:
    more: dict[str, Any] = {"lora": lora} if lora else {}
    more |= {"validation": {"text": [str(start[1])], "every": 3}, "max_steps": 12, "gradient_accumulation": 3}
    found = train(config_of(start, tmp_path / "whole", **more))
    assert found is not None
    log = read_log(tmp_path / "whole" / "log.jsonl")
    assert log[0].loss == pytest.approx(math.log(2), abs=0.02)  # dropout is all that moves it from the reference
    assert log[0].cross_entropy is None
    last = log[-1]
    assert last.loss is not None
    assert last.chosen_reward is not None
    assert last.rejected_reward is not None
    assert last.loss < log[0].loss - 0.02
    assert last.chosen_reward - last.rejected_reward > 0.05
    assert last.reward_accuracy == last.validation_accuracy == 1
    assert found.validation is not None
    assert found.validation.first == pytest.approx(math.log(2), rel=1e-5)
    assert found.validation.best < found.validation.first
    assert last.validation_perplexity is None
    report = (tmp_path / "whole" / "report.html").read_text()
    assert "chosen reward" in report
    assert "Share of pairs whose chosen answer has the higher reward" in report
    config = config_of(start, tmp_path / "parts", **more)
    interrupted(config, 5)
    again = train(config, resume=True)
    assert again is not None
    assert again.resumed_from == 4
    assert [row.loss for row in log] == [row.loss for row in read_log(tmp_path / "parts" / "log.jsonl")]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_ranks_and_epochs(start: tuple[Path, Path], tmp_path: Path) -> None:
    """Each pair once in an epoch, whoever reads it; of 6 pairs, 4 to a step."""
    config = config_of(start, tmp_path / "out", batch_size=4, gradient_accumulation=2)
    run = prepare(config, World())
    assert isinstance(run.reader, PairReader)
    pairs = run.reader.pairs
    assert [PairReader(pairs, config).steps_of(epochs) for epochs in (0.1, 1, 2, 1.5)] == [1, 2, 3, 3]
    ranks = [PairReader(pairs, config, world_size=2, rank=rank) for rank in range(2)]
    seen = [
        row for _ in range(3) for rank in ranks for batch in rank.next_step() for row in batch.input_ids[::2].tolist()
    ]
    kept = [tuple(token for token in row if token) for row in seen]
    assert sorted(kept) == sorted(2 * [tuple(pair[0].tokens[:-1].tolist()) for pair in pairs])
    held = [PairReader(pairs, config, world_size=4, rank=rank, held_out=True).whole_epoch() for rank in range(4)]
    assert [[batch.terms for batch in part] for part in held] == [[1, 1], [1, 1], [1, 0], [1, 0]]


def test_a_share_is_held_out(start: tuple[Path, Path], tmp_path: Path) -> None:
    run = prepare(config_of(start, tmp_path / "out", validation={"share": 0.3}), World())
    assert isinstance(run.reader, PairReader)
    assert (len(run.reader.pairs), sum(batch.terms for batch in run.held_out)) == (4, 2)
    assert measure(run).losses.loss == pytest.approx(math.log(2), rel=1e-6)


def test_long_pairs_are_left_out(start: tuple[Path, Path], tmp_path: Path) -> None:
    run = prepare(config_of(start, tmp_path / "out", seq_len=4), World())
    assert run.notes == ("2 of 6 pairs are left out: an answer is empty, or longer than seq_len 4 with its prompt",)
    with pytest.raises(InputError, match="none of the 6 pairs has two answers of at most seq_len 1 tokens"):
        prepare(config_of(start, tmp_path / "out", seq_len=1), World())


def test_the_plan_counts_both_answers_and_the_reference(start: tuple[Path, Path], tmp_path: Path) -> None:
    text = predict(small_config(*start, tmp_path / "out", batch_size=2))
    full = predict(config_of(start, tmp_path / "out", batch_size=2))
    adapted = predict(config_of(start, tmp_path / "out", batch_size=2, lora={"enabled": True, "rank": 1}))
    assert full.weights == 2 * text.weights
    assert full.activations > 1.8 * text.activations
    assert adapted.weights < full.weights


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"from_scratch": True}, "from_scratch does not go with dpo.enabled"),
        ({"distill": {"teacher": "self"}}, "distill.teacher does not go with dpo.enabled"),
        ({"data": {"batching": "tokens"}}, "data.batching does not go with dpo.enabled"),
        ({"optimizer": {"name": "sophia"}}, "optimizer.name=sophia does not go with dpo.enabled"),
    ],
)
def test_contradictions(start: tuple[Path, Path], tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        prepare(config_of(start, tmp_path / "out", **more), World())


def test_the_recipe() -> None:
    config = load_config("dpo")
    assert config.dpo.enabled
    assert json.loads(json.dumps(config.dpo.beta)) == 0.1
