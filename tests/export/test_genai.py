"""Unmodified onnxruntime-genai on an exported folder: its own loader, tokenizer and generator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import ort_driver
import pytest
import torch
from conftest import EXAMPLE
from families import make_model
from once import example_artifact
from stages import captured, sequences
from transformers import AutoModelForCausalLM, AutoTokenizer

import optc

og = pytest.importorskip("onnxruntime_genai")

PROMPT = "The old man looked at the sea, and"
TEXTS = [
    PROMPT,
    'It was 1842; "Why," said she, \'tis nothing!\n\n  Chapter II.\tThe café — naïve…',
    " leading and trailing  spaces ",
]
NEW = 64


@pytest.fixture(scope="module")
def folder() -> Path:
    """The example model in fp32, compiled for onnx-cpu."""
    return example_artifact("onnx-cpu")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return og.Model(str(folder))


@pytest.fixture(scope="module")
def reference() -> Any:
    return AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32).eval()


def encode(text: str) -> list[int]:
    return list(AutoTokenizer.from_pretrained(EXAMPLE).encode(text))


def generated(model: Any, rows: list[list[int]], new: int, pad: int) -> list[list[int]]:
    """Greedy continuations of right-padded rows: what follows the prompt and its padding."""
    width = max(map(len, rows))
    ids = np.array([row + [pad] * (width - len(row)) for row in rows], np.int32)
    parameters = og.GeneratorParams(model)
    length = width + new
    parameters.set_search_options(max_length=length, min_length=length, batch_size=len(rows), do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(ids if len(rows) > 1 else ids[0])
    while not generator.is_done():
        generator.generate_next_token()
    return [list(map(int, generator.get_sequence(i)))[width:] for i in range(len(rows))]


def pad_of(model: Any) -> int:
    return int(og.Tokenizer(model).pad_token_id)


def expected(reference: Any, row: list[int], new: int) -> list[int]:
    ids = torch.tensor([row])
    out = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        use_cache=True,
    )
    return [int(token) for token in out[0, len(row) :]]


@pytest.mark.parametrize("text", TEXTS)
def test_its_tokenizer_encodes_as_the_models_does(model: Any, text: str) -> None:
    """Its encoder leaves special tokens (here one at the start) to the caller unless told otherwise."""
    tokenizer = og.Tokenizer(model)
    assert list(map(int, tokenizer.encode(text))) == encode(text)[1:]
    tokenizer.update_options(add_special_tokens="true")
    assert list(map(int, tokenizer.encode(text))) == encode(text)
    assert tokenizer.decode(tokenizer.encode(text)[1:]) == text


def test_greedy_tokens_are_those_of_transformers(model: Any, reference: Any) -> None:
    row = encode(PROMPT)
    assert generated(model, [row], NEW, pad_of(model)) == [expected(reference, row, NEW)]


def test_a_right_padded_ragged_batch(model: Any, reference: Any) -> None:
    rows = [encode(text) for text in (PROMPT, "Once", "She said that he", PROMPT + " nothing more was")]
    assert len({len(row) for row in rows}) == 4
    assert generated(model, rows, NEW, pad_of(model)) == [expected(reference, row, NEW) for row in rows]


def test_a_quantized_artifact_says_what_optc_run_says() -> None:
    """Of equal tokens: products in 4 and 8 bits with rounded activations are the same kernels in both."""
    folder = example_artifact("onnx-cpu", quant="rtn")
    ours, theirs = optc.load(folder), og.Model(str(folder))
    for text in (PROMPT, "Once", "She said that he", *TEXTS[1:]):
        row = encode(text)
        found = ours.generate(row, max_new_tokens=NEW).tokens
        assert generated(theirs, [row], len(found), pad_of(theirs)) == [found]


def test_a_second_turn_and_a_rewind(model: Any, reference: Any) -> None:
    """Tokens appended to a held cache go through the graph as a chunk."""
    first, second = encode(PROMPT), encode(" the boat")
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=96, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array(first, np.int32))
    for _ in range(3):
        generator.generate_next_token()
    generator.append_tokens(np.array(second, np.int32))
    for _ in range(8):
        generator.generate_next_token()
    sequence = list(map(int, generator.get_sequence(0)))
    held = len(first) + 3 + len(second)
    assert sequence[held:] == expected(reference, sequence[:held], 8)
    generator.rewind_to(len(first))
    generator.generate_next_token()
    again = list(map(int, generator.get_sequence(0)))[len(first) :]
    assert again
    assert again == expected(reference, first, len(again))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("qwen3", "qwen3"),
        ("gemma", "gemma"),
        ("mistral", "mistral"),
        ("gpt2", "decoder"),
        ("olmo2", "decoder"),
    ],
)
def test_other_model_types(name: str, kind: str, tmp_path: Path) -> None:
    """A tiny random model of each family, past the window of 8 tokens that mistral has here."""
    ort_driver.compiled(captured(name), tmp_path)
    config = json.loads((tmp_path / "genai_config.json").read_text())
    assert config["model"]["type"] == kind
    rows = sequences(5, 11)
    wanted = [expected(make_model(name), row, 12) for row in rows]
    assert generated(og.Model(str(tmp_path)), rows, 12, config["model"]["pad_token_id"]) == wanted
