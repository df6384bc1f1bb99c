"""Which tokens of a training file are learned: masks and labels, prompts and completions, conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from letter_texts import CHAT, LETTERS, SHORTENS, letters, rows
from torch.nn import functional
from training_runs import VOCAB, small_config, small_model, token_file

from optc.compiler.diagnostics import InputError
from optc.runtime.generation.chat_template import ChatTemplate
from optc.training.corpus import read_corpus
from optc.training.data import IGNORED, Reader
from optc.training.distill import logits_of
from optc.training.examples import Example, read_examples
from optc.training.loop import train


def test_masks_and_labels_of_token_ids(tmp_path: Path) -> None:
    path = rows(
        tmp_path / "ids.jsonl",
        {"input_ids": [5, 6, 7, 2, 2], "attention_mask": [1, 1, 1, 0, 0], "labels": [-100, 6, 7, -100, -100]},
        {"input_ids": [2, 5, 6], "attention_mask": [0, 1, 1]},
        {"tokens": [5, 6], "labels": [5, 6]},
        {"tokens": [5, 6]},
    )
    assert list(read_examples(path, None, None)) == [
        Example([5, 6, 7], [False, True, True], ends=False),
        Example([5, 6]),
        Example([5, 6], None, ends=False),
        Example([5, 6]),
    ]


def test_prompts_and_completions(tmp_path: Path) -> None:
    path = rows(tmp_path / "rows.jsonl", {"prompt": "ab", "completion": "cd"})
    assert list(read_examples(path, letters(), None)) == [Example([3, 4, 5, 6], [False, False, True, True])]
    corpus = read_corpus([str(path)], letters(), vocab_size=VOCAB, end_token=1)
    assert corpus.documents[0].tolist() == [3, 4, 5, 6, 1]
    assert corpus.learned[0].tolist() == [False, False, True, True, True]  # type: ignore[union-attr]


def test_conversations(tmp_path: Path) -> None:
    """s:x|u:a|a:bc|u:d|a:e| with the answers "bc|" and "e|" learned, and nothing put behind the template's end."""
    said = [("system", "x"), ("user", "a"), ("assistant", "bc"), ("user", "d"), ("assistant", "e")]
    messages = [{"role": role, "content": text} for role, text in said]
    path = rows(tmp_path / "chat.jsonl", {"messages": messages})
    (found,) = read_examples(path, letters(), CHAT)
    text = "s:x|u:a|a:bc|u:d|a:e|"
    assert found.tokens == [LETTERS[letter] for letter in text]
    assert found.learned is not None
    answers = "".join(letter if learned else "." for letter, learned in zip(text, found.learned, strict=True))
    assert answers == "..........bc|......e|"
    corpus = read_corpus([str(path)], letters(), vocab_size=VOCAB, end_token=1, template=CHAT)
    assert corpus.documents[0].tolist() == found.tokens


@pytest.mark.parametrize(
    ("row", "template", "what"),
    [
        ({"input_ids": [5, 6], "labels": [6, -100]}, None, "label 6 at place 0 is neither its token, 5, nor -100"),
        ({"input_ids": [5, 6], "labels": [5]}, None, "'labels' does not belong to the token ids"),
        ({"input_ids": [5, 6], "attention_mask": [1, 2]}, None, "'attention_mask' does not belong"),
        ({"prompt": "a", "completion": 5}, None, "'prompt' and 'completion' are not both text"),
        ({"prompt": "a"}, None, "'prompt' and 'completion' are not both text"),
        ({"messages": "a"}, CHAT, "'messages' is not a list of messages"),
        ({"messages": [{"role": "user", "content": "a"}]}, None, "conversations need a chat template"),
        (
            {"messages": [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]},
            SHORTENS,
            "writes the beginning of the conversation otherwise once message 4 follows",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(row: Any, template: ChatTemplate | None, what: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=what) as caught:
        list(read_examples(rows(tmp_path / "rows.jsonl", {"tokens": [5]}, row), letters(), template))
    assert caught.value.where == f"{tmp_path / 'rows.jsonl'}:2"


def test_batches_and_the_loss_count_answers_alone(tmp_path: Path) -> None:
    """Two examples packed into one row, and one of which nothing is learned, which is left out: by hand."""
    path = rows(
        tmp_path / "rows.jsonl",
        {"tokens": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]},
        {"tokens": [9, 9, 9], "labels": [-100, -100, -100]},
        {"tokens": [7, 8, 9], "labels": [7, -100, 9]},  # the first token has nothing before it
    )
    config = small_config(
        small_model(tmp_path / "model"), path, tmp_path / "out", seq_len=5, batch_size=1, data={"shuffle": False}
    )
    corpus = read_corpus([str(path)], None, vocab_size=VOCAB, end_token=None)
    reader = Reader(corpus.documents, config, learned=corpus.learned)
    (batch,) = reader.next_step()
    assert batch.input_ids.tolist() == [[3, 4, 5, 7, 8]]
    assert batch.labels.tolist() == [[IGNORED, 5, 6, IGNORED, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert (batch.packed, batch.padded, batch.label_tokens) == (True, True, 3)
    assert reader.digest != Reader(corpus.documents, config).digest

    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(config.model).eval()
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1) for ids in ([3, 4, 5], [7, 8])]
        by_hand = -(alone[0][1, 5] + alone[0][2, 6] + alone[1][1, 9]) / 3
        packed = functional.cross_entropy(logits_of(model, batch)[0], batch.labels[0], ignore_index=IGNORED)
    assert float(packed) == pytest.approx(float(by_hand), abs=1e-5)
    result = train(small_config(Path(config.model), path, tmp_path / "out", seq_len=5, batch_size=1, max_steps=1))
    assert result is not None
    assert result.tokens == 3
    assert result.notes == ("4 of 10 tokens are learned, as the data's labels, completions and answers say",)
    assert result.first_loss == pytest.approx(float(by_hand), abs=1e-5)


def test_text_without_masks_is_as_before(tmp_path: Path) -> None:
    path = token_file(tmp_path / "tokens.jsonl")
    corpus = read_corpus([str(path)], None, vocab_size=VOCAB, end_token=None)
    assert corpus.learned == [None] * len(corpus.documents)
