"""What a program gives beside its logits comes to the drafter: of the right requests, at the right positions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import pytest
import torch
from serving import run
from speculation import Guesser, speculating, teller
from stages import apply, sequences, tiny_decoder
from torch import Tensor

from optc.passes.drafting.expose_hidden import ExposeHidden
from optc.passes.kv_cache.paged import PageKVCache
from optc.runtime.sampling import Sampling
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.model_runner import HostRunner
from optc.runtime.serving.paged_engine import PagedEngine
from optc.runtime.serving.request import Generate
from optc.runtime.sessions.paged import PagedModel, PagedSession
from optc.runtime.sessions.program import open_program
from optc.runtime.speculative.drafter import Fed


class _Reader(Guesser):
    """Keeps all that it reads."""

    def read(self, fed: Sequence[Fed]) -> None:
        self.fed = [*getattr(self, "fed", ()), *fed]


@functools.cache
def exposing(select_logits: bool) -> PagedModel:
    program = apply(PageKVCache(block_size=4, select_logits=select_logits), tiny_decoder()).program
    session = open_program(apply(ExposeHidden(layers=(0,)), program).program, num_blocks=64)
    assert isinstance(session, PagedSession)
    return session.model


@functools.cache
def weights_of_it() -> dict[str, Tensor]:
    return dict(tiny_decoder().weights())


def embedded(tokens: Sequence[int]) -> Tensor:
    """What the one layer reads of these tokens."""
    weights = weights_of_it()
    return weights["embed.weight"][torch.tensor(tokens)] + weights["place.weight"][: len(tokens)]


@pytest.mark.parametrize("select_logits", [False, True])
def test_rows_are_those_of_the_tokens(select_logits: bool) -> None:
    """Ragged prompts in pieces of 12 tokens, drafts that are wrong now and then, a pool in which requests give way."""
    model = exposing(select_logits)
    assert model.gives == ("hidden", "aux_hidden")
    small = dataclasses.replace(model, num_blocks=11, pools=[pool[:11] for pool in model.pools])
    kinds = (Sampling(), Sampling(temperature=0.8, seed=3))
    wanted = [
        Generate(id=str(place), prompt=prompt, max_new_tokens=12, sampling=kinds[place % 2])
        for place, prompt in enumerate(sequences(5, 1, 14, 9))
    ]
    plain = run(PagedEngine(model, EngineOptions(), HostRunner), wanted)
    told = teller(wanted, plain, 128)
    reader = _Reader(told._right, 0.3, 128)
    engine = speculating(small, reader, max_running=4, token_budget=12)
    got = run(engine, wanted)
    assert {name: item.tokens for name, item in got.items()} == {name: item.tokens for name, item in plain.items()}
    assert engine.metrics().preemptions > 0
    texts = {item.id: [*item.prompt, *plain[item.id].tokens] for item in wanted}
    decided = {name: set[int]() for name in texts}
    for fed in reader.fed:
        selected = select_logits and "hidden" not in fed.outputs  # of a prompt, but for its last token
        assert set(fed.outputs) == ({"aux_hidden"} if selected else {"hidden", "aux_hidden"})
        assert 1 <= fed.kept <= len(fed.outputs["aux_hidden"])
        kept = slice(fed.start, fed.start + fed.kept)
        rows = embedded(texts[fed.id])[kept]
        assert torch.allclose(fed.outputs["aux_hidden"][: len(rows)], rows, atol=1e-6)
        decided[fed.id].update(range(fed.start, fed.start + fed.kept))
    for item in wanted:  # the last token is not fed
        assert decided[item.id] >= set(range(len(texts[item.id]) - 1))
    assert any(len(fed.outputs["aux_hidden"]) > fed.kept for fed in reader.fed)  # drafted and rejected


def test_a_drafter_that_does_not_read_gets_nothing() -> None:
    model = exposing(False)
    wanted = [Generate(id="a", prompt=[4, 9], max_new_tokens=8)]
    plain = run(PagedEngine(model, EngineOptions(), HostRunner), wanted)
    assert run(speculating(model, teller(wanted, plain, 128)), wanted)["a"].tokens == plain["a"].tokens
