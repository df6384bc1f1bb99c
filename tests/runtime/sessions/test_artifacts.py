"""Sessions over compiled artifacts, with the example model's tokenizer: every engine against transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from once import short_artifact, short_example
from transformers import AutoModelForCausalLM

from optc.compiler.diagnostics import InputError
from optc.runtime.sessions.load import load
from optc.runtime.sessions.text_model import Model

ENGINES = {
    "onnx": {"target": "onnx-cpu"},
    "package-static": {"target": "inductor-cpu", "kv_cache": "static"},
    "package-paged": {"target": "inductor-cpu", "kv_cache": "paged"},
}
RAGGED = [[0, 493, 718, 435, 875], [8], list(range(300, 339)), [100, 4, 100, 4]]


@cache
def _reference() -> Any:
    return AutoModelForCausalLM.from_pretrained(short_example(), dtype=torch.float32).eval()


@cache
def _greedy(prompt: tuple[int, ...]) -> list[int]:
    out = _reference().generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)
    return list(map(int, out[0, len(prompt) :]))


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.slow) for name in ENGINES])
def artifact(request: pytest.FixtureRequest) -> Path:
    return short_artifact(**ENGINES[request.param])


@pytest.fixture(scope="module")
def model(artifact: Path) -> Iterator[Model]:
    found = load(artifact, threads=1)  # on a busy machine, threads that wait for each other take minutes
    yield found
    found.close()


def _close(found: np.ndarray, rows: list[list[int]]) -> None:
    with torch.no_grad():
        expected = [_reference()(torch.tensor([row])).logits[0, -1].numpy() for row in rows]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.stack(expected), atol=1e-4, rtol=0)


def test_prefill_chunks_steps_and_rewind(model: Model) -> None:
    session, rows = model.session, [list(row) for row in RAGGED]
    _close(session.prefill(rows), rows)
    for step in range(3):
        tokens = [(7 * step + row) % 8192 for row in range(len(rows))]
        rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
        _close(session.decode(tokens), rows)
    for chunk in ([[1, 2, 3], [4], [5, 6], [7, 8, 9, 10, 11]], [[9, 9], [9], [9, 9, 9], [9]]):
        rows = [[*row, *new] for row, new in zip(rows, chunk, strict=True)]
        _close(session.extend(chunk), rows)
    keep, tails = [2, 1, 17, 0], [[50, 51], [52], [53], [54, 55, 56]]
    session.rewind(keep)
    rows = [[*row[:n], *tail] for row, n, tail in zip(rows, keep, tails, strict=True)]
    _close(session.extend(tails), rows)
    assert session.lengths == [len(row) for row in rows]


def test_decoding_past_the_first_capacity(model: Model) -> None:
    rows = [[i % 5000 for i in range(250)], [3, 2, 1]]
    logits = model.session.prefill(rows)
    for step in range(12):
        tokens = [step, step + 1]
        logits = model.session.decode(tokens)
        rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
    _close(logits, rows)


def test_score(model: Model) -> None:
    tokens = [(37 * i) % 8192 for i in range(300)]
    found = np.concatenate(list(model.session.score(tokens)))
    with torch.no_grad():
        expected = _reference()(torch.tensor([tokens])).logits[0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_the_whole_context(model: Model) -> None:
    session, size = model.session, 2048
    assert session.context_length == size
    rows = [[(11 * i) % 8192 for i in range(size - 1)]]
    session.prefill(rows)
    _close(session.decode([5]), [[*rows[0], 5]])
    with pytest.raises(InputError, match=f"a row of {size + 1} tokens does not fit the context of {size}"):
        session.decode([5])


def test_greedy_text_equals_transformers(model: Model) -> None:
    prompts = ["The old man looked at the sea, and", "Once", "It was raining when they left the house, so"]
    found = model.generate_batch(prompts, max_new_tokens=64)
    for row in found:
        assert row.tokens == _greedy(tuple(row.prompt_tokens))
    assert model.generate(prompts[1], max_new_tokens=64).text == found[1].text


_COMMANDS = """
import json, sys
from optc.cli.main import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as done:
        if done.code:
            raise
"""


def _commands(*commands: list[object]) -> list[Any]:
    """What commands print as JSON, one after another in one process that did nothing before."""
    lines = [[*map(str, command), "--threads", "1", "--json"] for command in commands]
    done = subprocess.run(
        [sys.executable, "-c", _COMMANDS, json.dumps(lines)], capture_output=True, text=True, check=True
    )
    decoder, found, rest = json.JSONDecoder(), [], done.stdout.strip()
    while rest:
        value, end = decoder.raw_decode(rest)
        found.append(value)
        rest = rest[end:].strip()
    return found


@pytest.mark.parametrize("artifact", ["package-paged"], indirect=True)
def test_commands_in_a_fresh_process(artifact: Path, tmp_path: Path) -> None:
    """Of the engine whose ops and library a process must load first; the README's commands run onnx-cpu's."""
    text = tmp_path / "text.txt"
    text.write_text("It was a dark night, and the ship lay at anchor. " * 12)

    run = ["run", artifact, "--prompt-tokens", "0,493,718", "--max-new-tokens", 5]
    evaluation = ["eval", artifact, "--text", text]
    bench = ["bench", artifact, "--prompt-length", 8, "--new-tokens", 4, "--samples", 2]
    ran, evaluated, timed = _commands(run, evaluation, bench)
    assert ran["prompt_tokens"] == [0, 493, 718]
    assert len(ran["tokens"]) == 5
    assert evaluated["perplexity"] == pytest.approx(evaluated["reference_perplexity"], rel=1e-5)
    assert evaluated["kl"] < 1e-8
    assert evaluated["top1_agreement"] > 0.99
    assert timed["weight_bytes"] > 6e6
    assert timed["peak_rss_bytes"] > timed["weight_bytes"]
    assert timed["decode_tokens_per_s"]["median"] > 0
