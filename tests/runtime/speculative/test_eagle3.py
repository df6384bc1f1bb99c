"""Drafts of a layer that reads the base's hidden states, beside the same layer run over whole texts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from eagle3_models import BOUNDARIES, captured_draft, expected, states_of
from serving import run
from speculation import Guesser, speculating, teller
from stages import apply, captured, sequences

from optc.compiler.diagnostics import InputError, TargetError
from optc.compiler.ir.contract import Contract, DraftFacts, ModelFacts, Output
from optc.compiler.ir.program import Program
from optc.passes.drafting.expose_hidden import ExposeHidden
from optc.passes.kv_cache.paged import PageKVCache
from optc.runtime.sampling import Sampling
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.model_runner import HostRunner
from optc.runtime.serving.paged_engine import PagedEngine
from optc.runtime.serving.request import Generate
from optc.runtime.sessions.paged import PagedModel, PagedSession
from optc.runtime.sessions.program import open_program
from optc.runtime.speculative import eagle3, opening
from optc.runtime.speculative.drafter import Ask, Fed
from optc.runtime.speculative.eagle3 import Eagle3Drafter
from optc.runtime.speculative.opening import Verifying, check_states


def opened(program: Program, num_blocks: int) -> PagedModel:
    session = open_program(program, num_blocks=num_blocks)
    assert isinstance(session, PagedSession)
    return session.model


@functools.cache
def base_program(select_logits: bool = False) -> Program:
    paged = apply(PageKVCache(block_size=4, select_logits=select_logits), captured("llama")).program
    return apply(ExposeHidden(final=False, layers=BOUNDARIES), paged).program


@functools.cache
def draft_program() -> Program:
    return apply(PageKVCache(block_size=4), captured_draft()).program


class Checked(Eagle3Drafter):
    """Compares its drafts with the whole text's, and gives others, of which some are right."""

    told: Guesser

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        found = super().propose(asks)
        self.drafts = getattr(self, "drafts", 0) + sum(map(bool, found))
        self.empty = getattr(self, "empty", 0) + sum(not item for item in found)
        self.late = getattr(self, "late", 0)
        for ask, got in zip(asks, found, strict=True):
            if got:
                begin = self._requests[ask.id].begin
                self.late += begin > 0
                assert len(got) == ask.most
                if ask.sampling.greedy:
                    assert got == expected(ask.tokens.tolist(), ask.most, begin)
        return self.told.propose(asks)


def checked(num_blocks: int, chunk: int = 4096) -> Checked:
    model = dataclasses.replace(opened(draft_program(), num_blocks), chunk=chunk)
    return Checked(model, (192, 64), torch.float32)


def requests(count: int = 18, prefix: Sequence[int] = ()) -> list[Generate]:
    kinds = (Sampling(), Sampling(temperature=0.8, seed=3))
    return [
        Generate(id=str(place), prompt=[*prefix, *prompt], max_new_tokens=count, sampling=kinds[place % 2])
        for place, prompt in enumerate(sequences(5, 2, 14, 9))
    ]


@pytest.mark.parametrize(
    ("blocks", "own_blocks", "chunk"), [(64, 64, 4096), (14, 64, 5), (64, 9, 4096)], ids=["wide", "preempted", "few"]
)
def test_drafts_are_those_of_the_whole_text(blocks: int, own_blocks: int, chunk: int) -> None:
    """Ragged requests in blocks of 4; a base's pool in which requests give way; a draft's pool too small for all."""
    plain = run(PagedEngine(opened(base_program(), 64), EngineOptions(), HostRunner), requests())
    drafter = checked(own_blocks, chunk)
    drafter.told = teller(requests(), plain, 128)
    engine = speculating(opened(base_program(), blocks), drafter, max_running=4, token_budget=16)
    found = run(engine, requests())
    assert {name: item.tokens for name, item in found.items()} == {name: item.tokens for name, item in plain.items()}
    figures = engine.metrics().speculation
    assert figures is not None
    assert figures.accepted_tokens > 15
    assert drafter.drafts > 6
    if own_blocks == 64:
        assert not drafter.empty
        assert not drafter.late
        assert (engine.metrics().preemptions > 0) == (blocks == 14)
    else:
        assert drafter.late + drafter.empty > 0
    assert not drafter._requests
    assert drafter._manager.used_blocks == 0


def test_a_beginning_that_the_base_found_in_its_pool() -> None:
    """The draft model finds it in its own pool, or, opened later, drafts from where the states begin."""
    shared = sequences(13, seed=9)[0]
    wanted = requests(12, shared)
    plain = run(PagedEngine(opened(base_program(), 128), EngineOptions(), HostRunner), wanted)
    engine = None
    for fresh in (False, True):
        drafter = checked(128)
        drafter.told = teller(wanted, plain, 128)
        if engine is None or not fresh:
            engine = speculating(opened(base_program(), 128), drafter, max_running=4, token_budget=64)
        assert engine._drafting is not None
        engine._drafting._drafter = engine._drafting._reader = drafter
        for again in range(2):
            found = run(engine, wanted)
            assert [found[item.id].tokens for item in wanted] == [plain[item.id].tokens for item in wanted]
            assert (drafter.late > 0) is fresh, (fresh, again)
        assert not drafter.empty
    assert engine is not None
    assert engine.metrics().cached_tokens > 3 * 12


def test_states_beside_selected_logits() -> None:
    """A program that gives the logits of a prompt's last token, and the states of all."""
    plain = run(PagedEngine(opened(base_program(), 64), EngineOptions(), HostRunner), requests())
    drafter = checked(64)
    drafter.told = teller(requests(), plain, 128)
    found = run(speculating(opened(base_program(True), 64), drafter, max_running=4, token_budget=16), requests())
    assert {name: item.tokens for name, item in found.items()} == {name: item.tokens for name, item in plain.items()}
    assert drafter.drafts > 12
    assert not drafter.late


def test_a_gap_begins_anew_and_the_same_ask_gets_the_same() -> None:
    drafter, text = checked(64), sequences(20)[0]
    drafter.told = Guesser(lambda tokens, most: [], 0, 128)

    def read(start: int, end: int) -> None:
        drafter.read([Fed("a", start, end - start, {"aux_hidden": states_of(tuple(text))[start:end]})])

    def ask(known: int) -> list[int]:
        return Eagle3Drafter.propose(drafter, [Ask("a", np.array(text[:known]), 3)])[0]

    read(0, 9)
    assert ask(10) == expected(text[:10], 3)
    assert ask(10) == expected(text[:10], 3)
    assert ask(11) == []  # nothing of position 9 yet
    read(6, 10)
    assert ask(11) == expected(text[:11], 3)
    read(12, 15)
    assert ask(16) == expected(text[:16], 3, begin=12)
    drafter.forget("a")
    assert ask(16) == []


@pytest.mark.parametrize("asked", [False, True])
def test_what_was_not_drafted_for_long_is_not_caught_up_with(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of fourteen states, one by one, the last ones alone: three at a time become one, of four rows at most."""
    monkeypatch.setattr(eagle3, "_PIECES", 2)
    monkeypatch.setattr(eagle3, "_MOST_WAITING", 4)
    drafter, text = checked(64), sequences(20)[0]
    states = states_of(tuple(text))

    def ask(known: int) -> list[int]:
        return Eagle3Drafter.propose(drafter, [Ask("a", np.array(text[:known]), 3)])[0]

    if asked:  # it is in the cache
        drafter.read([Fed("a", 0, 2, {"aux_hidden": states[:2]})])
        assert ask(3) == expected(text[:3], 3)
    for place in range(2 if asked else 0, 14):
        drafter.read([Fed("a", place, 1, {"aux_hidden": states[place : place + 1]})])
    assert drafter._requests["a"].begin == 9
    assert ask(15) == expected(text[:15], 3, begin=9)
    drafter.forget("a")
    assert drafter._manager.used_blocks == 0


def facts(**changes: Any) -> DraftFacts:
    made = DraftFacts(boundaries=(2, 4, 5), max_draft_tokens=4, base_weights="a" * 64, tokenizer="")
    return msgspec.structs.replace(made, **changes)


def manifest(layers: tuple[int, ...], vocabulary: int = 50, weights: str = "a" * 64) -> Any:
    outputs = (Output(name="logits", role="logits"), Output(name="aux_hidden", role="aux_hidden", layers=layers))
    contract = Contract(
        kind="decoder", inputs=(), outputs=outputs, model=ModelFacts(vocab_size=vocabulary, hidden_size=16)
    )
    return SimpleNamespace(contract=contract, source=SimpleNamespace(weights_sha256=weights))


@pytest.mark.parametrize(
    ("given", "draft_facts", "kind", "message"),
    [
        (manifest((2, 4, 5)), facts(), None, ""),
        (manifest((2, 4, 5)), facts(base_weights=""), None, ""),
        (manifest((1, 4, 5)), facts(), TargetError, r"gives those of \[1, 4, 5\], not of \[2, 4, 5\]"),
        (manifest((2, 4, 5), weights="b" * 64), facts(), InputError, "trained on other weights"),
        (manifest((2, 4, 5)), facts(tokenizer="c" * 64), InputError, r"tokenizer\.json is not that"),
        (manifest((2, 4, 5), vocabulary=51), facts(base_weights=""), InputError, "vocabulary and width are 50 and 16"),
    ],
)
def test_a_draft_model_for_another_base_is_refused(
    given: Any, draft_facts: DraftFacts, kind: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "read_manifest", lambda folder: given)
    target = Verifying(model=opened(base_program(), 4), folder=tmp_path, running=1)
    own = Contract(kind="decoder", inputs=(), outputs=(), model=ModelFacts(vocab_size=50, hidden_size=16))
    if kind is None:
        check_states(draft_facts, own, target)
        return
    with pytest.raises(kind, match=message) as found:
        check_states(draft_facts, own, target)
    if kind is TargetError:
        assert "--expose-hidden 2,4,5" in str(found.value.remedy)


def test_a_base_without_states_is_told_the_flag() -> None:
    target = Verifying(model=opened(draft_program(), 4), folder=None, running=1)
    with pytest.raises(TargetError, match="does not give the hidden states") as found:
        check_states(facts(), Contract(kind="decoder", inputs=(), outputs=()), target)
    assert found.value.remedy == "compile the base again with --expose-hidden 2,4,5"
