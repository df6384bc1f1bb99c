"""Every method on a real model: the tokens of plain decoding, one request alone and several, and answers that hold to
grammars."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
import typing
from pathlib import Path

import pytest
import torch
from artifacts import captured_folder
from conftest import EXAMPLE
from medusa_heads import write_heads
from serving import run
from speculation import Branching, Guesser, speculating
from stages import apply
from torch import Tensor

from optc.compiler.ir.draft_tree import DraftTree
from optc.passes.drafting.expose_hidden import ExposeHidden
from optc.passes.drafting.medusa_heads import AddMedusaHeads
from optc.passes.kv_cache.paged import PageKVCache
from optc.runtime.generation.tokenizer import eos_token_ids, load_tokenizer
from optc.runtime.sampling import Sampling
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.grammar import Grammars
from optc.runtime.serving.model_runner import HostRunner
from optc.runtime.serving.paged_engine import PagedEngine
from optc.runtime.serving.request import Generate, Grammar
from optc.runtime.sessions.paged import PagedModel, PagedSession
from optc.runtime.sessions.program import open_program
from optc.runtime.speculative.draft_model import DraftModel
from optc.runtime.speculative.drafter import Drafter
from optc.runtime.speculative.eagle3 import Eagle3Drafter
from optc.runtime.speculative.opening import Verifying, open_drafter
from optc.runtime.speculative.settings import Method, Speculation

REPEATING = "The cat sat on the mat. The dog sat on the mat. The cat sat on the mat. The dog"
TEXTS = [REPEATING, "The old man looked at the sea, and", "Once", REPEATING[:40]]


@functools.cache
def model() -> PagedModel:
    """With Medusa heads of random weights, which others do not read."""
    paged = apply(PageKVCache(select_logits=True), captured_folder(EXAMPLE)).program
    exposed = apply(ExposeHidden(final=False, layers=(1, 2, 3)), paged).program
    with tempfile.TemporaryDirectory() as folder:
        write_heads(Path(folder), exposed.contract.model.hidden_size)
        session = open_program(apply(AddMedusaHeads(folder=folder), exposed).program)
    assert isinstance(session, PagedSession)
    return session.model


@functools.cache
def prompts() -> list[list[int]]:
    tokenizer = load_tokenizer(EXAMPLE)
    assert tokenizer is not None
    return [tokenizer.encode(text) for text in TEXTS]


def requests(count: int, *samplings: Sampling) -> list[Generate]:
    return [
        Generate(id=str(place), prompt=prompt, max_new_tokens=count, sampling=samplings[place % len(samplings)])
        for place, prompt in enumerate(prompts())
    ]


@functools.cache
def plain(count: int, *samplings: Sampling) -> dict[str, list[int]]:
    engine = PagedEngine(model(), EngineOptions(), HostRunner)
    return {name: item.tokens for name, item in run(engine, requests(count, *samplings)).items()}


def blind(num_blocks: int) -> PagedModel:
    """The model as one that takes states, and gives some."""

    def forward(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        tables, pools = inputs[:6], inputs[8:]
        logits, states, _ = model().run(*tables, torch.arange(len(tables[0])), *pools)
        return logits, states[:, :192]

    pools = [pool[:num_blocks].clone() for pool in model().pools]
    return dataclasses.replace(model(), run=forward, selects=False, num_blocks=num_blocks, pools=pools, chunk=16)


def drafter(method: Method, num_blocks: int = 64) -> Drafter:
    """The model drafts for itself where one is wanted: in blocks of its own, of which there are few enough to run out.

    With `eagle3` it does not look at the states, and lacks the tokens in front of them.
    """
    if method == "eagle3":
        return Eagle3Drafter(blind(num_blocks), (3 * 192, 192), torch.float32)
    if method == "draft":
        pools = [pool[:num_blocks].clone() for pool in model().pools]
        return DraftModel(
            dataclasses.replace(model(), num_blocks=num_blocks, pools=pools, chunk=16), model().vocab_size
        )
    return open_drafter(Speculation(method=method, draft_tokens=2), Verifying(model=model(), folder=None, running=4))


@pytest.mark.parametrize("method", typing.get_args(Method))
def test_greedy_tokens_are_those_of_plain_decoding(method: Method) -> None:
    """Together, and then one alone: 24 tokens cross blocks of 16."""
    expected = plain(24, Sampling())
    engine = speculating(model(), drafter(method))
    found = run(engine, requests(24, Sampling()))
    assert {name: item.tokens for name, item in found.items()} == expected
    assert run(engine, requests(24, Sampling())[:1])["0"].tokens == expected["0"]
    figures = engine.metrics().speculation
    assert figures is not None
    assert figures.acceptance_length is not None
    least = {"ngram": 1.2, "suffix": 1.2, "lookahead": 1.1, "draft": 4, "eagle3": 2, "medusa": 0.99}
    assert figures.acceptance_length > least[method]


@pytest.mark.parametrize("method", typing.get_args(Method))
def test_drawn_tokens_are_those_of_plain_decoding(method: Method) -> None:
    kinds = (Sampling(temperature=0.6, top_p=0.9, seed=4), Sampling(temperature=0.4, repetition_penalty=0.9, seed=1))
    found = run(speculating(model(), drafter(method)), requests(20, *kinds))
    assert {name: item.tokens for name, item in found.items()} == plain(20, *kinds)


def test_a_draft_is_drawn_by_the_numbers_that_decide() -> None:
    """At temperature 1 the model drafts for itself what it will draw."""
    engine = speculating(model(), drafter("draft"))
    run(engine, requests(15, Sampling(temperature=1.0, seed=4)))
    figures = engine.metrics().speculation
    assert figures is not None
    assert figures.accepted_at == figures.drafted_at


@functools.cache
def grammatical() -> tuple[Grammars, list[Generate], list[tuple[list[int], str | None]]]:
    """Requests that hold to grammars, greedy and drawn, and their answers without drafts."""
    grammars = Grammars(EXAMPLE, model().vocab_size, eos_token_ids(EXAMPLE))
    schema = {"type": "object", "properties": {"n": {"enum": ["one", "two"]}}, "required": ["n"]}
    kinds = [
        Grammar(kind="json-schema", source=json.dumps(schema)),
        Grammar(kind="regex", source="(red|green) [0-9]{3}"),
    ]
    wanted = [
        Generate(id=str(place), prompt=prompts()[1], max_new_tokens=40, grammar=kinds[place % 2], sampling=sampling)
        for place, sampling in enumerate(
            [Sampling(), Sampling(), *[Sampling(temperature=1.0, seed=place) for place in range(6)]]
        )
    ]
    without = run(PagedEngine(model(), EngineOptions(), HostRunner, grammars=grammars), wanted)
    return grammars, wanted, [(without[item.id].tokens, without[item.id].finish) for item in wanted]


def answer_behind(tokens: list[int], most: int) -> list[int]:
    """What comes next in the answer of a request that holds to a grammar, and tokens behind its end."""
    done = tokens[len(prompts()[1]) :]
    answer = next(answer for answer, _ in grammatical()[2] if answer[: len(done)] == done)
    return [*answer, 5, 6, 7, 8][len(done) : len(done) + most]


def test_trees_hold_to_grammars() -> None:
    """Branches that hold to the grammar, that do not, and that complete the answer, side by side."""
    grammars, wanted, answers = grammatical()
    session = open_program(apply(PageKVCache(select_logits=True, tree=True), captured_folder(EXAMPLE)).program)
    assert isinstance(session, PagedSession)
    tree = DraftTree(heads=2, ranks=2, nodes=((0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)))
    branching = dataclasses.replace(session.model, tree=tree)
    drafter = Branching(answer_behind, 0.0, branching.vocab_size)
    engine = speculating(branching, drafter, method="medusa", draft_tokens=2, grammars=grammars)
    found = run(engine, wanted)
    assert [(found[item.id].tokens, found[item.id].finish) for item in wanted] == answers
    figures = engine.metrics().speculation
    assert figures is not None
    assert figures.tree == 6
    assert figures.accepted_tokens > 20


def test_drafts_hold_to_grammars() -> None:
    """A draft that is right, wrong or against the grammar: the answer is that of plain decoding."""
    grammars, wanted, answers = grammatical()
    engine = speculating(model(), Guesser(answer_behind, 0.2, model().vocab_size), grammars=grammars)
    found = run(engine, wanted)
    assert [(found[item.id].tokens, found[item.id].finish) for item in wanted] == answers
    figures = engine.metrics().speculation
    assert figures is not None
    assert figures.accepted_tokens > 10
