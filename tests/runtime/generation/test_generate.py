"""Generation against transformers' own, and what stops it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import make_model

from optc.compiler.capture import capture_model
from optc.compiler.diagnostics import InputError, UsageError
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import PassContext
from optc.passes.kv_cache.paged import PageKVCache
from optc.runtime.generation.generate import generate
from optc.runtime.sampling import Sampling
from optc.runtime.sessions.program import open_program
from optc.runtime.sessions.session import Session
from optc.runtime.sessions.text_model import TextModel

PROMPTS = [[5, 9, 2, 77, 31], [8, 8], list(range(3, 42)), [100, 4, 100]]


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama")


@pytest.fixture(scope="module")
def program(model: Any) -> Program:
    return PageKVCache(block_size=4).run(capture_model(model), PassContext()).program


@pytest.fixture
def session(program: Program) -> Session:
    return open_program(program)


def _reference(model: Any, prompt: list[int], count: int) -> list[int]:
    out = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    return list(map(int, out[0, len(prompt) :]))


def test_greedy_batch_equals_transformers(model: Any, session: Session) -> None:
    result = generate(session, PROMPTS, max_new_tokens=16)
    assert result.tokens == [_reference(model, prompt, 16) for prompt in PROMPTS]
    assert result.stop == ["length"] * 4
    assert result.steps == 15
    assert session.lengths == [len(prompt) + 15 for prompt in PROMPTS]
    assert result.ttft_ms > 0
    assert result.tpot_ms is not None


def test_rows_stop_independently(model: Any, session: Session) -> None:
    whole = [_reference(model, prompt, 16) for prompt in PROMPTS]
    stop = {whole[1][2], whole[3][0]}
    heard: list[list[int]] = [[] for _ in PROMPTS]
    result = generate(
        session,
        PROMPTS,
        max_new_tokens=16,
        stop_ids=stop,
        on_token=lambda row, token: heard[row].append(token),
    )
    ends = [next((i + 1 for i, token in enumerate(row) if token in stop), 16) for row in whole]
    assert min(ends) < max(ends)
    assert result.tokens == heard == [row[:end] for row, end in zip(whole, ends, strict=True)]
    assert result.stop == [
        "stop-token" if row[end - 1] in stop else "length" for row, end in zip(whole, ends, strict=True)
    ]
    assert session.lengths == [len(p) + len(t) - 1 for p, t in zip(PROMPTS, result.tokens, strict=True)]
    # A stopped row can be continued: its cache is what its tokens say.
    tails = [[row[-1], 17] for row in result.tokens]
    logits = session.extend(tails)
    with torch.no_grad():
        for prompt, tokens, found in zip(PROMPTS, result.tokens, logits, strict=True):
            expected = model(torch.tensor([[*prompt, *tokens, 17]])).logits[0, -1]
            assert float((torch.from_numpy(found) - expected).abs().max()) < 2e-5


def test_a_full_context_stops_its_row_only(model: Any, session: Session) -> None:
    prompts = [[1] * 250, [5, 9]]
    result = generate(session, prompts, max_new_tokens=12)
    assert result.stop == ["context", "length"]
    assert [len(row) for row in result.tokens] == [7, 12]  # 250 + 6 fill the context; the 7th is not fed
    assert result.tokens[1] == _reference(model, prompts[1], 12)


def test_one_token_has_no_rate(session: Session) -> None:
    result = generate(session, [[1, 2]], max_new_tokens=1)
    assert (len(result.tokens[0]), result.steps, result.tpot_ms) == (1, 0, None)


def test_sampling_does_not_depend_on_the_batch(session: Session) -> None:
    sampling = Sampling(temperature=2.0, top_k=50, seed=3)
    batch = generate(session, PROMPTS, max_new_tokens=12, sampling=sampling).tokens
    alone = [generate(session, [prompt], max_new_tokens=12, sampling=sampling).tokens[0] for prompt in PROMPTS]
    assert batch == alone
    other = generate(session, PROMPTS, max_new_tokens=12, sampling=Sampling(temperature=2.0, top_k=50, seed=4))
    assert other.tokens != batch


def test_rows_may_be_sampled_differently(session: Session) -> None:
    """Greedy ones among them are what they are alone; equal prompts draw differently, and like others of their kind."""
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]]
    warm = Sampling(temperature=2.0, seed=3)
    mixed = generate(session, prompts, max_new_tokens=12, sampling=[Sampling(), warm, warm, warm]).tokens
    assert mixed[0] == generate(session, PROMPTS[:1], max_new_tokens=12).tokens[0]
    warm_alone = generate(session, prompts[1:], max_new_tokens=12, sampling=warm).tokens
    assert mixed[1:] == warm_alone
    assert warm_alone[1] != warm_alone[2]


def test_refuses(session: Session) -> None:
    with pytest.raises(UsageError, match=r"2 samplings for 1 prompt\(s\)"):
        generate(session, [[1]], max_new_tokens=1, sampling=[Sampling(), Sampling()])
    with pytest.raises(UsageError, match="the sampling of row 1 is None"):
        generate(session, [[1], [2]], max_new_tokens=1, sampling=[Sampling(), None])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="max-new-tokens 0 is out of range"):
        generate(session, [[1]], max_new_tokens=0)
    with pytest.raises(InputError, match="does not fit the context of 256"):
        generate(session, [[1] * 257], max_new_tokens=1)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("abc", "a batch is a list of prompts, not one text"),
        ([[1, 2], None], "prompt 1 is neither text nor token ids"),
        ([7], "prompt 0 is neither text nor token ids"),
        ([[1, 2.5]], "prompt 0 is neither text nor token ids"),
        ([["a", "b"]], "prompt 0 is neither text nor token ids"),
    ],
)
def test_what_is_no_batch_of_prompts_is_named(session: Session, prompts: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TextModel(session, None, ()).generate_batch(prompts, max_new_tokens=1)


def test_token_ids_may_be_of_any_integers(session: Session) -> None:
    model = TextModel(session, None, ())
    found = model.generate_batch([[5, 9], torch.tensor([5, 9]), np.array([5, 9])], max_new_tokens=4)  # type: ignore[list-item]
    assert [row.prompt_tokens for row in found] == [[5, 9]] * 3
    assert found[0].tokens == found[1].tokens == found[2].tokens
