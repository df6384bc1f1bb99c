"""The session over a TensorRT plan, on ONNX Runtime and on a stand-in for TensorRT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trt_graphs
from artifacts import make_manifest
from trt_graphs import CAPACITY, PROFILES, save_folder

from optc.compiler.diagnostics import ArtifactError, InputError, TargetError
from optc.runtime.generation.generate import generate
from optc.runtime.sampling import Sampling
from optc.runtime.sessions.onnx_engine import OnnxEngine
from optc.runtime.sessions.session import SessionOptions
from optc.runtime.sessions.trt import TrtSession, open_artifact

PROMPTS = [[3, 4, 5], [7], [2, 9, 11, 12, 13, 14, 15, 16]]


@pytest.fixture
def session(tmp_path: Path) -> TrtSession:
    trt_graphs.save_graph(tmp_path / "model.onnx")
    return TrtSession(OnnxEngine(tmp_path / "model.onnx", PROFILES, threads=1))


def test_generation_with_rows_that_stop_and_a_full_context(session: TrtSession) -> None:
    """optc's loop rewinds the rows that have stopped; those that go on are as if they were alone."""
    together = generate(session, PROMPTS, max_new_tokens=30)
    alone = [generate(session, [prompt], max_new_tokens=30) for prompt in PROMPTS]
    assert together.tokens == [found.tokens[0] for found in alone]
    assert together.stop == ["context"] * 3
    sampled = generate(session, PROMPTS, max_new_tokens=4, sampling=Sampling(temperature=1.0, seed=5))
    assert len(sampled.tokens[1]) == 4


def test_extend_score_and_rewind(session: TrtSession) -> None:
    session.prefill([[3, 4], [7]])
    logits = session.extend([[5], [8, 9]])
    assert session.lengths == [3, 3]
    np.testing.assert_allclose(logits[1], trt_graphs.reference([7, 8, 9])[-1], atol=1e-4)
    session.rewind([2, 3])
    np.testing.assert_allclose(session.decode([6, 10])[0], trt_graphs.reference([3, 4, 6])[-1], atol=1e-4)
    row = list(range(2, 2 + CAPACITY - 1))
    scored = np.concatenate(list(session.score(row)))
    np.testing.assert_allclose(scored, trt_graphs.reference(row), atol=1e-4)


def test_a_batch_beyond_the_profiles_is_refused(session: TrtSession) -> None:
    with pytest.raises(InputError, match="a batch of 4 does not fit the plan, which takes 1 to 3 rows"):
        session.prefill([[1]] * 4)


def test_errors_of_the_runner_are_optc_errors(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="there is no plan yet"):
        open_artifact(save_folder(tmp_path / "out"), make_manifest(), SessionOptions())
    with pytest.raises(ArtifactError, match=r"no readable engine\.json"):
        open_artifact(tmp_path, make_manifest(), SessionOptions())
