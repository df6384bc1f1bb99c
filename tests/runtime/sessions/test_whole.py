"""A decoder without a KV cache, held to the model's own forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from families import make_model

import optc
from optc.compiler.diagnostics import ArtifactError, TargetError
from optc.compiler.ir.contract import Input
from optc.runtime.sessions.whole import WholeSession

_LIMITS = {"max_kl": 1e9, "min_top1": 0.0, "max_perplexity_increase": 1e9, "max_relative_error": 1e9}


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_model("llama", layers=1)


@pytest.fixture(scope="module")
def opened(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("whole") / "out"
    optc.compile(llama, target="onnx-cpu", kv_cache="none", output=folder, **_LIMITS)
    model = optc.load(folder)
    yield model
    model.session.close()


def _logits(model: Any, *rows: list[int]) -> np.ndarray:
    """Of the last token of each row alone."""
    with torch.no_grad():
        return np.stack([model(torch.tensor([row])).logits[0, -1].numpy() for row in rows])


def test_prompts_steps_and_rewinds_are_the_models_own(llama: Any, opened: Any) -> None:
    session = opened.session
    assert isinstance(session, WholeSession)
    first, second = [5, 9, 2, 7, 11], [3, 4]
    np.testing.assert_allclose(session.prefill([first, second]), _logits(llama, first, second), atol=1e-5)
    np.testing.assert_allclose(session.decode([8, 9]), _logits(llama, [*first, 8], [*second, 9]), atol=1e-5)
    session.rewind([3, 2])
    assert session.lengths == [3, 2]
    longer = session.extend([[20, 21], [22]])
    np.testing.assert_allclose(longer, _logits(llama, [5, 9, 2, 20, 21], [3, 4, 22]), atol=1e-5)


def test_scores_are_of_all_tokens(llama: Any, opened: Any) -> None:
    tokens = [5, 9, 2, 7, 11, 30]
    scored = np.concatenate(list(opened.session.score(tokens)))
    with torch.no_grad():
        np.testing.assert_allclose(scored, llama(torch.tensor([tokens])).logits[0].numpy(), atol=1e-5)


def test_contracts_of_other_graphs_are_refused(opened: Any) -> None:
    contract = opened.manifest.contract
    states = Input(name="states", role="encoder_states", dtype="float32", dims=("batch", "seq", 8))
    with pytest.raises(TargetError, match="takes more than tokens"):
        WholeSession(lambda *_: [], msgspec.structs.replace(contract, inputs=(*contract.inputs, states)))
    session = WholeSession(lambda *_: [np.zeros((1, 2, 3), np.float32)], contract)
    with pytest.raises(ArtifactError, match="not the graph's"):
        session.prefill([[1, 2]])
