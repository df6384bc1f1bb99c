"""What a training file says of each document: its tokens, and which of them are learned.

A row is {"text": ...}, token ids, {"prompt": ..., "completion": ...} or {"messages": [...]}, a conversation through the
model's chat template. Of the last two only answers are learned. Token ids may have an "attention_mask", whose zeros are
padding, and "labels" as trainers write them: the token itself where it is learned, -100 elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from optc.compiler.calibration.dataset_rows import LABELS, MASK
from optc.compiler.calibration.documents import encode_text, rows_of, token_ids
from optc.compiler.diagnostics import InputError
from optc.runtime.generation.chat_template import ChatTemplate
from optc.runtime.generation.tokenizer import Tokenizer

IGNORED = -100  # a label without a target, as torch's cross_entropy skips it
_KIND = "training"


class Example(NamedTuple):
    """A document.

    Attributes:
        learned: for each token whether it is one to predict; None of all of them.
        ends: whether an end-of-text token may be put behind it.
    """

    tokens: list[int]
    learned: list[bool] | None = None
    ends: bool = True


def read_examples(path: Path, tokenizer: Tokenizer | None, template: ChatTemplate | None) -> Iterator[Example]:
    """The documents of a file; its forms are those of `read_documents`, and of .jsonl those above.

    Raises:
        InputError: unreadable or malformed (with the line), text without a tokenizer, messages without a template, or
            masks and labels that do not belong to the tokens.
        UsageError: a dataset without the extra.
    """
    for where, row in rows_of(path, _KIND):
        yield _example(row, where, tokenizer, template)


def _example(row: Any, where: str, tokenizer: Tokenizer | None, template: ChatTemplate | None) -> Example:
    if not isinstance(row, dict):
        return Example(token_ids(row, where, _KIND))
    if "messages" in row:
        return _conversation(row["messages"], where, tokenizer, template)
    if "prompt" in row or "completion" in row:
        return completion_of(row.get("prompt"), row.get("completion"), where, tokenizer)
    if isinstance(row.get("text"), str):
        return Example(encode_text(row["text"], where, tokenizer, _KIND))
    ids = token_ids(row.get("tokens", row.get("input_ids")), where, _KIND)
    return _labelled(ids, row.get(MASK), row.get(LABELS), where)


def _labelled(ids: list[int], mask: Any, labels: Any, where: str) -> Example:
    """Without padding, and with what the labels leave out."""
    kept = [True] * len(ids) if mask is None else [item == 1 for item in _row(mask, MASK, len(ids), where, (0, 1))]
    if labels is not None:
        found = _row(labels, LABELS, len(ids), where, None)
        if wrong := [
            place for place, (label, token) in enumerate(zip(found, ids, strict=True)) if label not in (token, IGNORED)
        ]:
            raise InputError(
                f"label {found[wrong[0]]} at place {wrong[0]} is neither its token, {ids[wrong[0]]}, nor {IGNORED}",
                where=where,
                why="labels stand at the places of their tokens, as transformers has it",
                remedy=f"do not shift them; write {IGNORED} where a token is not learned",
            )
        learned = [label != IGNORED for label, keep in zip(found, kept, strict=True) if keep]
    else:
        learned = [True] * sum(kept)
    tokens = [token for token, keep in zip(ids, kept, strict=True) if keep]
    return Example(tokens, None if all(learned) else learned, ends=labels is None)


def _row(value: Any, key: str, length: int, where: str, allowed: tuple[int, ...] | None) -> list[int]:
    whole = isinstance(value, list) and all(type(item) is int for item in value)
    if not whole or len(value) != length or (allowed is not None and not set(value) <= set(allowed)):
        raise InputError(
            f"'{key}' does not belong to the token ids of the row",
            where=where,
            why=f"it must be a list of {length} " + ("integers" if allowed is None else "zeros and ones"),
            remedy=f"write one number for each token, or no '{key}'",
        )
    return list(value)


def completion_of(prompt: Any, completion: Any, where: str, tokenizer: Tokenizer | None) -> Example:
    """A prompt and what is learned behind it.

    Raises:
        InputError: they are no text, or there is no tokenizer.
    """
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise InputError(
            "'prompt' and 'completion' are not both text",
            where=where,
            remedy='write {"prompt": "...", "completion": "..."}, or a conversation as "messages"',
        )
    before = encode_text(prompt, where, tokenizer, _KIND)
    assert tokenizer is not None  # encode_text asks
    answer = tokenizer.encode(completion, special=False)
    return Example([*before, *answer], [False] * len(before) + [True] * len(answer))


def needs_template(
    template: ChatTemplate | None, tokenizer: Tokenizer | None, where: str
) -> tuple[ChatTemplate, Tokenizer]:
    """Both, which conversations need.

    Raises:
        InputError: the model has none.
    """
    if template is None or tokenizer is None:
        raise InputError(
            f"conversations need a {'chat template' if tokenizer else 'tokenizer'}, and the model has none",
            where=where,
            remedy='give "prompt" and "completion", or a model folder with chat_template.jinja',
        )
    return template, tokenizer


def learned_answer(
    prompt: list[Any], answer: list[Any], where: str, tokenizer: Tokenizer, template: ChatTemplate
) -> Example:
    """Messages that are learned, all of them, behind others.

    Raises:
        InputError: the template writes the beginning otherwise once the answer follows.
    """
    asked, answered = template.render(prompt), template.render([*prompt, *answer], asks=False)
    if not answered.startswith(asked):
        raise _rewritten(len(prompt), where)
    before, behind = (tokenizer.encode(text, special=False) for text in (asked, answered[len(asked) :]))
    return Example([*before, *behind], [False] * len(before) + [True] * len(behind), ends=False)


def _rewritten(number: int, where: str) -> InputError:
    return InputError(
        f"the chat template writes the beginning of the conversation otherwise once message {number + 1} follows",
        where=where,
        why="so it cannot be said which tokens are the answer",
        remedy="write a conversation for each answer, or use a template that only appends",
    )


def _conversation(messages: Any, where: str, tokenizer: Tokenizer | None, template: ChatTemplate | None) -> Example:
    """Each answer is learned, with what the template writes behind it; encoded piece by piece, as it will be generated."""
    if not isinstance(messages, list) or not all(isinstance(item, dict) and "role" in item for item in messages):
        raise InputError(
            "'messages' is not a list of messages",
            where=where,
            remedy='write {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
        )
    template, tokenizer = needs_template(template, tokenizer, where)
    tokens: list[int] = []
    learned: list[bool] = []
    done = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = template.render(messages[:number])
        answered = template.render(messages[: number + 1], asks=False)
        if not (asked.startswith(done) and answered.startswith(asked)):
            raise _rewritten(number, where)
        for text, answer in ((asked[len(done) :], False), (answered[len(asked) :], True)):
            found = tokenizer.encode(text, special=False)
            tokens += found
            learned += [answer] * len(found)
        done = answered
    return Example(tokens, learned, ends=False)
