"""What a file of preferences says of each pair: a prompt, the answer that was chosen and the one that was rejected.

Rows are those of TRL's preference data sets (https://huggingface.co/docs/trl/dataset_formats): "prompt", "chosen" and
"rejected" as texts, or as lists of messages through the model's chat template; or two whole conversations as "chosen"
and "rejected", whose common beginning is the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from optc.compiler.calibration.documents import rows_of
from optc.compiler.diagnostics import InputError
from optc.runtime.generation.chat_template import ChatTemplate
from optc.runtime.generation.tokenizer import Tokenizer
from optc.training.examples import Example, completion_of, learned_answer, needs_template

_FORMS = (
    'write {"prompt": "...", "chosen": "...", "rejected": "..."}, three lists of messages, or two conversations as '
    '"chosen" and "rejected"'
)


class Pair(NamedTuple):
    """Two answers to one prompt; only the answers are learned."""

    chosen: Example
    rejected: Example


def read_pairs(path: Path, tokenizer: Tokenizer | None, template: ChatTemplate | None, kind: str) -> Iterator[Pair]:
    """The pairs of a file: .jsonl or .ndjson, .parquet, or a folder of `datasets.save_to_disk`.

    Args:
        kind: what the file is for, as errors name it.

    Raises:
        InputError: unreadable or malformed (with the line), no tokenizer, messages without a template, or conversations
            of another beginning.
        UsageError: a dataset without the extra.
    """
    for where, row in rows_of(path, kind):
        if not isinstance(row, dict) or "chosen" not in row or "rejected" not in row:
            raise InputError("the row is not a pair of answers", where=where, remedy=_FORMS)
        prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
        if isinstance(chosen, list) and isinstance(rejected, list):
            yield _conversations(prompt, chosen, rejected, where, tokenizer, template)
        elif isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
            yield Pair(*(completion_of(prompt, answer, where, tokenizer) for answer in (chosen, rejected)))
        else:
            raise InputError("the row is not a pair of answers to one prompt", where=where, remedy=_FORMS)


def _conversations(
    prompt: Any,
    chosen: list[Any],
    rejected: list[Any],
    where: str,
    tokenizer: Tokenizer | None,
    template: ChatTemplate | None,
) -> Pair:
    template, tokenizer = needs_template(template, tokenizer, where)
    if not isinstance(prompt, list):  # two whole conversations; a prompt beside them, as text, repeats what they say
        common = next((place for place, (one, two) in enumerate(zip(chosen, rejected, strict=False)) if one != two), 0)
        prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
    if not prompt or not chosen or not rejected or any(not _is_message(item) for item in (*prompt, *chosen, *rejected)):
        raise InputError("the conversations are not two answers to one prompt", where=where, remedy=_FORMS)
    return Pair(*(learned_answer(prompt, answer, where, tokenizer, template) for answer in (chosen, rejected)))


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and "role" in item
