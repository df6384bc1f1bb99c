"""Batches: every token once, no attention between documents, and positions that resume."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from families import make_model
from training_runs import VOCAB, small_config, small_model, token_file

from optc.compiler.diagnostics import InputError
from optc.training.corpus import read_corpus
from optc.training.data import IGNORED, Batch, Position, Reader
from optc.training.distill import logits_of, loss_sums
from optc.training.models import load_frozen
from optc.training.packing import unpacked

LENGTHS = (40, 7, 23, 64, 3, 31, 50, 12, 18, 28)


def reader(tmp_path: Path, *, world_size: int = 1, rank: int = 0, **more: Any) -> Reader:
    text = token_file(tmp_path / "text.jsonl", lengths=LENGTHS)
    config = small_config(tmp_path, text, tmp_path / "out", **more)
    documents = read_corpus(config.data.text, None, vocab_size=VOCAB, end_token=None).documents
    return Reader(documents, config, world_size=world_size, rank=rank)


def pairs(batch: Batch) -> list[tuple[int, int]]:
    kept = batch.labels != IGNORED
    return list(zip(batch.input_ids[kept].tolist(), batch.labels[kept].tolist(), strict=True))


@pytest.mark.parametrize("batching", ["pack", "tokens"])
def test_an_epoch_reads_every_pair_of_neighbours_once(tmp_path: Path, batching: str) -> None:
    found = reader(tmp_path, batch_size=1, data={"batching": batching})
    seen: list[tuple[int, int]] = []
    while found.position.epoch == 0:
        step = found.next_step()
        if found.position.epoch == 0:
            seen += [pair for batch in step for pair in pairs(batch)]
    expected = [
        pair for tokens in found.documents for pair in zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True)
    ]
    assert sorted(seen) == sorted(expected)
    assert len(seen) == sum(LENGTHS) - len(LENGTHS)


def test_packing_fills_rows(tmp_path: Path) -> None:
    found = reader(tmp_path, batch_size=1)
    rows = []
    while found.position.epoch == 0:
        rows += found.next_step()
    used = [batch.label_tokens for batch in rows[:-1]]
    # 266 inputs in rows of 32: nine rows are the least.
    assert sum(used) == 266
    assert len(used) in (9, 10)


def test_positions_restart_with_each_document(tmp_path: Path) -> None:
    found = reader(tmp_path, batch_size=10, data={"shuffle": False})
    batch = found.next_step()[0]
    # Rows are filled first fit: 32 of document 0; its other 7, then document 1's 6 and 17 of document 2 ...
    assert batch.position_ids[1, :8].tolist() == [0, 1, 2, 3, 4, 5, 6, 0]
    starts = (batch.position_ids[1] == 0).nonzero().flatten().tolist()
    assert starts[:3] == [0, 7, 13]
    assert batch.packed
    padding = (batch.labels == IGNORED).nonzero()
    assert all(batch.input_ids[row, column] == 0 for row, column in padding.tolist())


@pytest.mark.parametrize("batching", ["pack", "tokens"])
def test_a_packed_documents_loss_is_its_loss_alone(tmp_path: Path, batching: str) -> None:
    model = load_frozen(small_model(tmp_path / "model"))
    found = reader(tmp_path, batch_size=12, data={"batching": batching})
    batch = found.next_step()[0]
    assert batch.packed == (batching == "pack")
    together = torch.nn.functional.cross_entropy(
        logits_of(model, batch).transpose(1, 2), batch.labels, ignore_index=IGNORED, reduction="none"
    )
    checked = 0
    for row in range(len(batch.labels)):
        starts = [*(batch.position_ids[row] == 0).nonzero().flatten().tolist(), batch.labels.shape[1]]
        for start, end in itertools.pairwise(starts):
            kept = batch.labels[row, start:end] != IGNORED
            end = start + int(kept.sum())
            ids, labels = batch.input_ids[row : row + 1, start:end], batch.labels[row, start:end]
            alone = torch.nn.functional.cross_entropy(
                model(ids).logits[0], labels, ignore_index=IGNORED, reduction="none"
            )
            torch.testing.assert_close(together[row, start:end], alone, rtol=1e-5, atol=1e-5)
            checked += 1
    assert checked >= 12


@pytest.mark.parametrize("family", ["opt", "llama", "mixtral", "qwen2-window", "gemma3"])
def test_rows_are_not_packed_for_a_model_that_does_not_keep_documents_apart(tmp_path: Path, family: str) -> None:
    """OPT, which takes its mask from attention_mask alone."""
    model, packed = make_model(family, attention="sdpa"), reader(tmp_path)
    found, notes = unpacked(model.train(), packed)
    assert model.training
    if family != "opt":
        assert (found, notes) == (packed, ())
        return
    assert ["OPTForCausalLM" in note for note in notes] == [True]
    assert not found.packs
    expected = reader(tmp_path, data={"batching": "tokens"})
    for one, other in zip(found.next_step(), expected.next_step(), strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert not one.packed
    assert unpacked(model, expected) == (expected, ())


def test_rows_of_one_piece_are_not_packed(tmp_path: Path) -> None:
    config = reader(tmp_path).config  # rows of 32
    assert Reader([torch.arange(20), torch.arange(14)], config).packs  # 19 and 13
    assert not Reader([torch.arange(20), torch.arange(15)], config).packs
    assert not Reader([torch.arange(97)], config).packs  # three pieces of 32


def test_token_budget_bounds_each_micro_batch(tmp_path: Path) -> None:
    found = reader(tmp_path, batch_size=4, gradient_accumulation=2, data={"batching": "tokens"})
    for _ in range(6):
        for batch in found.next_step():
            assert batch.input_ids.numel() <= 2 * 32
            lengths = (batch.labels != IGNORED).sum(1)
            assert int(lengths.max()) == batch.labels.shape[1]


@pytest.mark.parametrize("batching", ["pack", "tokens"])
def test_a_position_resumes_the_same_batches(tmp_path: Path, batching: str) -> None:
    first = reader(tmp_path, data={"batching": batching})
    for _ in range(5):
        first.next_step()
    second = reader(tmp_path, data={"batching": batching})
    second.position = Position(first.position.epoch, first.position.unit)
    for _ in range(5):
        a, b = first.next_step()[0], second.next_step()[0]
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("batching", ["pack", "tokens"])
@pytest.mark.parametrize("parts", [((1, 1), (1, 4), (1, 1)), ((1, 2), (2, 1), (1, 1)), ((2, 2), (1, 1), (1, 2))])
def test_an_epoch_goes_on_with_other_ranks_and_accumulation(
    tmp_path: Path, batching: str, parts: tuple[tuple[int, int], ...]
) -> None:
    """A step each with some ranks and micro-batches, then steps to the end: every token once, none left out."""
    documents = [torch.arange(1000 * number, 1000 * number + length) for number, length in enumerate(LENGTHS)]
    seen: list[int] = []
    place = Position()
    for number, (ranks, accumulation) in enumerate(parts):
        more = {"batch_size": 4, "gradient_accumulation": accumulation, "data": {"batching": batching}}
        config = small_config(tmp_path, tmp_path, tmp_path, **more)
        readers = [Reader(documents, config, world_size=ranks, rank=rank) for rank in range(ranks)]
        for item in readers:
            item.position = msgspec.json.decode(msgspec.json.encode(place), type=Position)  # as a checkpoint keeps it
        assert place.epoch == 0
        for _ in range(readers[0].steps_of(1) if number == len(parts) - 1 else 1):
            batches = [batch for item in readers for batch in item.next_step()]
            seen += [token for batch in batches for token in batch.input_ids[batch.labels != IGNORED].tolist()]
        (place,) = {item.position for item in readers}
    counts = Counter(seen)
    assert set(counts) == {token for document in documents for token in document[:-1].tolist()}
    # A step is whole: its rows come from the next epoch where this one has none left.
    begun = [piece for unit in readers[0]._plan(1)[: place.unit] for row in unit for piece in row]
    expected = sum(readers[0]._pieces[piece][2] for piece in begun) if place.epoch else 0
    assert sum(count - 1 for count in counts.values()) == expected


def test_ranks_and_micro_batches_share_one_global_batch(tmp_path: Path) -> None:
    whole = reader(tmp_path)
    parts = [reader(tmp_path, world_size=2, rank=rank, gradient_accumulation=2) for rank in range(2)]
    for _ in range(4):
        one = pairs(whole.next_step()[0])
        several = [pair for part in parts for batch in part.next_step() for pair in pairs(batch)]
        assert sorted(one) == sorted(several)


def test_epochs_and_seeds_have_orders_of_their_own(tmp_path: Path) -> None:
    def order(found: Reader, epoch: int) -> list[list[list[int]]]:
        return found._plan(epoch)

    one, other = reader(tmp_path), reader(tmp_path, seed=1)
    assert order(one, 0) != order(one, 1)
    assert order(one, 0) != order(other, 0)
    assert order(one, 0) == order(reader(tmp_path), 0)


def test_documents_end_with_the_end_token(tmp_path: Path) -> None:
    text = token_file(tmp_path / "text.jsonl", lengths=(5, 6))
    documents = read_corpus([str(text)], None, vocab_size=VOCAB, end_token=1).documents
    assert [len(item) for item in documents] == [6, 7]
    assert all(int(item[-1]) == 1 for item in documents)


def test_loss_sums_skip_the_padding(tmp_path: Path) -> None:
    model = load_frozen(small_model(tmp_path / "model"))
    found = reader(tmp_path, batch_size=2, data={"batching": "tokens"})
    batch = found.next_step()[0]
    sums = loss_sums(logits_of(model, batch), batch, found.config, None)
    expected = model(input_ids=batch.input_ids, position_ids=batch.position_ids).logits.log_softmax(-1)
    kept = batch.labels != IGNORED
    by_hand = -expected[kept].gather(1, batch.labels[kept][:, None]).sum()
    torch.testing.assert_close(sums.total, by_hand, rtol=1e-5, atol=1e-4)
    assert sums.divergence is None


class TestErrors:
    def test_no_text(self) -> None:
        with pytest.raises(InputError, match="no training text"):
            read_corpus([], None, vocab_size=VOCAB, end_token=None)

    def test_missing_text(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="the training text does not exist") as found:
            read_corpus([str(tmp_path / "no.txt")], None, vocab_size=VOCAB, end_token=None)
        assert str(tmp_path / "no.txt") in str(found.value)

    def test_folder_as_text(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="the training data is a folder but not a dataset"):
            read_corpus([str(tmp_path)], None, vocab_size=VOCAB, end_token=None)

    def test_text_without_a_tokenizer(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_text("Once upon a time")
        with pytest.raises(InputError, match="training text needs a tokenizer"):
            read_corpus([str(path)], None, vocab_size=VOCAB, end_token=None)

    def test_malformed_line(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"tokens": [1, 2]}\n{"tokens": [1,\n')
        with pytest.raises(InputError, match="the training file is not JSON") as found:
            read_corpus([str(path)], None, vocab_size=VOCAB, end_token=None)
        assert f"{path}:2" in str(found.value)

    def test_token_outside_the_vocabulary(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"tokens": [1, 64]}\n')
        with pytest.raises(InputError, match="token 64 is outside the vocabulary of 64"):
            read_corpus([str(path)], None, vocab_size=VOCAB, end_token=None)

    def test_too_short(self, tmp_path: Path) -> None:
        text = token_file(tmp_path / "text.jsonl", lengths=(5, 6))
        config = small_config(tmp_path, text, tmp_path / "out")
        documents = read_corpus(config.data.text, None, vocab_size=VOCAB, end_token=None).documents
        with pytest.raises(InputError, match="the training text is too short: 9 tokens to learn, and one row takes 32"):
            Reader(documents, config)
