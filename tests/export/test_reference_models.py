"""Reference models through the whole compile, against transformers: logits, greedy tokens, perplexity."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EXAMPLE, ROOT, shared_path
from once import example_artifact
from transformers import AutoModelForCausalLM

import optc
from optc.runtime.measuring.evaluate import evaluate

PROMPT = "The old man looked at the sea, and"
LIMIT = 1e-4  # on logits of magnitude 10 to 20

_BIG = [pytest.mark.slow, pytest.mark.shared]
CASES = [  # the packages of the example model are in tests/runtime/sessions/test_artifacts.py
    pytest.param(("fiction-3m", "onnx-cpu"), id="3m-onnx"),
    pytest.param(("fiction-26m", "onnx-cpu"), id="26m-onnx", marks=_BIG),
]


class Pair:
    """An artifact and the transformers model it was made from."""

    def __init__(self, folder: Path, target: str, output: Path) -> None:
        if folder == EXAMPLE:
            self.artifact = example_artifact(target)
        else:
            self.artifact = optc.compile(folder, target=target, output=output).artifact
        self.model = optc.load(self.artifact)
        self.reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> np.ndarray[Any, Any]:
        """Logits [len, V] by transformers without a cache."""
        return self.reference(torch.tensor([tokens])).logits[0].numpy()

    def text(self, start: int, length: int) -> list[int]:
        """A piece of real text as token ids."""
        tokens = self.model.encode((ROOT / "examples" / "book.txt").read_text())
        return tokens[start : start + length]


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    name, target = request.param
    folder = EXAMPLE if name == "fiction-3m" else shared_path("models", name)
    made = Pair(folder, target, tmp_path_factory.mktemp(name) / "artifact")
    yield made
    made.model.close()


def test_prefill_chunks_and_steps(pair: Pair) -> None:
    session, tokens = pair.model.session, pair.text(0, 60)
    expected = pair.logits(tokens)
    got = {20: session.prefill([tokens[:21]])}
    got[44] = session.extend([tokens[21:45]])
    for place in range(45, 60):
        got[place] = session.decode([tokens[place]])
    assert max(float(np.abs(row[0] - expected[place]).max()) for place, row in got.items()) <= LIMIT


def test_every_logit_of_a_long_text(pair: Pair) -> None:
    tokens = pair.text(300, 700)
    scored = np.concatenate([part.copy() for part in pair.model.session.score(tokens)])
    assert float(np.abs(scored - pair.logits(tokens)).max()) <= LIMIT


def test_ragged_batch_of_four(pair: Pair) -> None:
    session = pair.model.session
    rows = [pair.text(start, length) for start, length in ((0, 37), (90, 1), (200, 18), (400, 29))]
    more = [pair.text(500 + 10 * row, 6) for row in range(4)]
    worst = 0.0
    logits = session.prefill(rows)
    for step in range(7):
        for row in range(4):
            worst = max(worst, float(np.abs(logits[row] - pair.logits([*rows[row], *more[row][:step]])[-1]).max()))
        if step < 6:
            logits = session.decode([tokens[step] for tokens in more])
    assert worst <= LIMIT


def test_rewind(pair: Pair) -> None:
    session, tokens = pair.model.session, pair.text(100, 40)
    session.prefill([tokens])
    session.rewind([25])
    logits = session.extend([tokens[25:33]])
    assert float(np.abs(logits[0] - pair.logits(tokens[:33])[-1]).max()) <= LIMIT


def test_greedy_tokens(pair: Pair) -> None:
    found = pair.model.generate(PROMPT, max_new_tokens=64, ignore_eos=True)
    ids = torch.tensor([found.prompt_tokens])
    expected = pair.reference.generate(ids, max_new_tokens=64, min_new_tokens=64, do_sample=False, eos_token_id=None)
    assert found.tokens == expected[0, ids.shape[1] :].tolist()


def test_perplexity(pair: Pair) -> None:
    tokens = pair.text(0, 4 * 1024 + 1)
    found = evaluate(pair.model.session, tokens, windows=2)
    losses = []
    for start in (0, 1024):
        logits = torch.from_numpy(pair.logits(tokens[start : start + 1024]))
        targets = torch.tensor(tokens[start + 1 : start + 1025])
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none").double())
    expected = float(torch.cat(losses).mean().exp())
    assert f"{found.perplexity:.4g}" == f"{expected:.4g}"
