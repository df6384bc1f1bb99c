"""Trees of guesses through the engine: answers are those of plain decoding, whatever branch was right."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from context_model import VOCAB, context_model, continuation, next_token
from medusa_heads import write_heads
from serving import run
from speculation import Branching, continued_in_a_small_pool, teller
from stages import VOCAB as VOCABULARY
from stages import apply, sequences, tiny_decoder
from torch import Tensor
from trees import path_to

from optc.compiler.diagnostics import TargetError, UsageError
from optc.compiler.ir.draft_tree import DraftTree
from optc.compiler.ops.dialect.paged_tree import seen_tokens
from optc.passes.drafting.medusa_heads import AddMedusaHeads
from optc.passes.kv_cache.paged import PageKVCache
from optc.runtime.sampling import Sampling
from optc.runtime.serving.engine import engine_for
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.model_runner import HostRunner
from optc.runtime.serving.paged_engine import PagedEngine
from optc.runtime.serving.request import Generate
from optc.runtime.sessions.paged import PagedModel, PagedSession
from optc.runtime.sessions.program import open_program
from optc.runtime.speculative.acceptance import NOT_DRAFTED, accept_tree
from optc.runtime.speculative.medusa import MedusaDrafter
from optc.runtime.speculative.opening import Verifying, open_drafter
from optc.runtime.speculative.settings import DraftShape, Speculation, speculation_of
from optc.runtime.speculative.shape import Ladder, Shape

TREE = DraftTree(heads=3, ranks=2, nodes=((0, 1), (0, 0), (1, 0), (2, 0), (2, 1), (3, 1), (4, 0)))
"""Guesses 1 to 7 by paths: 1, 0, 10, 00, 01, 101, 000."""


def knowing(num_blocks: int = 64) -> PagedModel:
    """A model whose heads know what comes, by its second guess where the token is even, and else by its first; each third
    token by none."""

    def forward(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        ids, positions, slots, tables, lengths, starts, tree, pool = inputs
        flat, size = pool.view(-1), pool.shape[1]
        flat[slots] = ids
        logits, drafted = torch.zeros((len(ids), VOCAB)), torch.zeros((len(ids), 6), dtype=torch.int64)
        for row, (begin, end) in enumerate(itertools.pairwise(starts.tolist())):
            past = int(lengths[row]) - (end - begin)
            at = torch.arange(int(lengths[row]))
            held = flat[tables[row].long()[at // size] * size + at % size].tolist()
            for token, seen in enumerate(seen_tokens(tree[begin:end])):
                text = held[:past] + [held[past + place] for place in seen.nonzero()[:, 0].tolist()]
                assert int(positions[begin + token]) == len(text) - 1
                logits[begin + token, next_token(text)] = 1.0
                for head, right in enumerate(continuation(text, 4)[1:]):
                    wrong = (right + 1) % VOCAB
                    pair = [wrong, right] if right % 2 == 0 else [right, wrong]
                    drafted[begin + token, 2 * head : 2 * head + 2] = torch.tensor(
                        [wrong, (right + 2) % VOCAB] if right % 3 == 0 else pair
                    )
        return logits, drafted

    plain = context_model(num_blocks)
    return dataclasses.replace(plain, run=forward, gives=("drafted",), heads=3, takes_trees=True, tree=TREE)


def speculating(
    model: PagedModel, shape: DraftShape = "tree", *, adaptive: bool = False, **options: Any
) -> PagedEngine:
    speculation = Speculation(method="medusa", draft_tokens=0, shape=shape, adaptive=adaptive)
    drafter = open_drafter(speculation, Verifying(model=model, folder=None, running=4))
    assert isinstance(drafter, MedusaDrafter)
    return PagedEngine(model, EngineOptions(speculation=speculation, **options), HostRunner, drafter=drafter)


@pytest.mark.parametrize("shape", ["tree", "chain"])
def test_ragged_prompts_in_a_pool_that_is_too_small(shape: DraftShape) -> None:
    """Blocks of 4, pieces of prompts, requests that give way: what is kept of a tree is what later tokens read."""
    engine = speculating(knowing(13), shape, max_running=3, token_budget=30)
    figures = continued_in_a_small_pool(engine)
    assert engine.scheduler.manager.free_blocks == 13
    assert len(figures.drafted_at) == 3
    assert (figures.tree, figures.depth) == ((7, 3) if shape == "tree" else (0, 3))
    assert min(figures.accepted_at[:2]) > 0
    if shape == "tree":
        assert figures.acceptance_length > 1.4
        assert figures.drafted > sum(figures.drafted_at)


def test_a_tree_is_right_more_often_than_its_chain() -> None:
    lengths = []
    for shape in ("chain", "tree"):
        engine = speculating(knowing(), shape)  # type: ignore[arg-type]
        run(engine, [Generate(id=str(row), prompt=[row, 9], max_new_tokens=55) for row in range(4)])
        figures = engine.metrics().speculation
        assert figures is not None
        assert figures.acceptance_length is not None
        lengths.append(figures.acceptance_length)
    assert lengths[1] > 1.2 * lengths[0]


def test_an_engine_goes_through_all_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The switch may choose any: none, a chain, a tree; the answers stay."""
    engine = speculating(knowing(), "auto", adaptive=True)
    assert engine._drafting is not None
    switch, rng = engine._drafting._switch, np.random.default_rng(0)
    assert switch is not None
    monkeypatch.setattr(switch, "depth", lambda rows: int(rng.integers(0, 11)))
    wanted = [Generate(id=str(row), prompt=[row], max_new_tokens=60, stop_ids=[7, 30][: row % 3]) for row in range(4)]
    got = run(engine, wanted)
    for item in wanted:
        assert got[item.id].tokens == continuation(item.prompt, 60, item.stop_ids)


KINDS = (
    Sampling(),
    Sampling(temperature=0.5, top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.3, seed=5),
    Sampling(temperature=1.3, top_k=20, seed=1),
)


@pytest.mark.parametrize("select_logits", [False, True])
def test_heads_of_a_program(select_logits: bool, tmp_path: Path) -> None:
    """Greedy, drawn and penalized requests side by side, log-probabilities too, in blocks of 4; heads are seldom right, and
    who knows the answers is right in one of two branches, or in none."""
    write_heads(tmp_path, 16, heads=3)
    paged = apply(PageKVCache(block_size=4, select_logits=select_logits, tree=True), tiny_decoder()).program
    with_heads = apply(AddMedusaHeads(folder=str(tmp_path), ranks=2), paged).program
    session = open_program(with_heads.with_contract(tree=TREE), num_blocks=64)
    assert isinstance(session, PagedSession)
    assert (session.model.heads, session.model.takes_trees) == (3, True)
    wanted = [
        Generate(
            id=str(place),
            prompt=prompt,
            max_new_tokens=24,
            sampling=KINDS[place % 3],
            logprobs=2 if place == 3 else None,
        )
        for place, prompt in enumerate(sequences(5, 1, 14, 9, 3, 7))
    ]
    plain = run(PagedEngine(session.model, EngineOptions(), HostRunner), wanted)
    speculation = Speculation(method="medusa", draft_tokens=0, shape="tree", adaptive=False)
    heads = engine_for(session, EngineOptions(speculation=speculation))
    right = teller(wanted, plain, VOCABULARY)._right
    engine = PagedEngine(
        session.model, EngineOptions(speculation=speculation), HostRunner, drafter=Branching(right, 0.0, VOCABULARY)
    )
    drafted = run(heads, wanted)
    found = run(engine, wanted)
    for got in (drafted, found):
        assert {name: item.tokens for name, item in got.items()} == {name: item.tokens for name, item in plain.items()}
    told = [[part for answer in got["3"].answers for part in answer.logprobs or []] for got in (plain, found)]
    assert [item.chosen for item in told[1]] == pytest.approx([item.chosen for item in told[0]], abs=1e-4)
    for figures, accepted in ((heads.metrics().speculation, 0), (engine.metrics().speculation, 40)):
        assert figures is not None
        assert figures.verified > 40
        assert figures.drafted > 5 * figures.verified
        assert figures.accepted_tokens >= accepted


def test_the_path_that_agrees() -> None:
    """Random trees against a walk in plain Python; the tokens are few, so that guesses agree often, and siblings are alike."""
    rng = np.random.default_rng(0)
    lengths = []
    for _ in range(60):
        width = int(rng.integers(1, 14))
        parents = [-1, *(int(rng.integers(0, place)) for place in range(1, width))]
        counts = rng.integers(1, width + 1, 5)
        decided, fed = (torch.from_numpy(rng.integers(0, 2, counts.sum())) for _ in range(2))
        tokens, kept, path = accept_tree(decided, fed, torch.from_numpy(counts), torch.tensor(parents))
        begin = 0
        for row, count in enumerate(counts.tolist()):
            said, own = decided[begin : begin + count].tolist(), fed[begin : begin + count].tolist()
            walked, behind = [0], range(1, count)
            while True:
                right = [place for place in behind if parents[place] == walked[-1] and own[place] == said[walked[-1]]]
                if not right:
                    break
                walked.append(right[0])
            size = int(kept[row])
            assert path[row, :size].tolist() == walked == path_to(parents, walked[-1])
            assert tokens[row].tolist() == [said[place] for place in walked] + [NOT_DRAFTED] * (tokens.shape[1] - size)
            begin += count
            lengths.append(size)
    assert max(lengths) > 4


def test_the_ladder() -> None:
    """Trees of growing size, chains of the likeliest guesses where they are none of them, and everything at last."""
    ladder = Ladder.tree(TREE, 3, chains=True)
    assert ladder.shapes is not None
    assert [len(shape) for shape in ladder.shapes] == [1, 2, 3, 4, 5, 6, 1, 2, 3, 7]
    assert [shape.is_chain for shape in ladder.shapes] == [True, False, False, *[False] * 3, True, True, True, False]
    chain, whole = ladder.shapes[8], ladder.shapes[9]
    assert (chain.ranks, chain.parents.tolist(), chain.bits.tolist()) == ([0, 0, 0], [-1, 0, 1, 2], [1, 3, 7, 15])
    assert whole.parents.tolist() == [-1, 0, 0, 1, 2, 2, 3, 4]
    assert whole.depths.tolist() == [0, 1, 1, 2, 2, 2, 3, 3]
    assert whole.tokens([[10, 11], [20, 21], [30, 31]]) == [11, 10, 20, 20, 21, 31, 30]
    assert [[len(rung) for rung in Ladder.halves(most).rungs] for most in (1, 2, 5)] == [[1], [1, 2], [3, 5]]
    short = Ladder.tree(TREE, 2, chains=False)
    assert [len(rung) for rung in short.rungs] == [1, 2, 3, 4, 5]
    assert short.shapes is not None
    assert Shape.of(TREE.paths, range(7)).bits.tolist() == whole.bits.tolist()


def test_what_cannot_be_is_refused() -> None:
    chain = dataclasses.replace(knowing(), tree=None)
    with pytest.raises(TargetError, match="the artifact has no tree of guesses"):
        open_drafter(
            Speculation(method="medusa", draft_tokens=0, shape="tree"), Verifying(model=chain, folder=None, running=1)
        )
    with pytest.raises(UsageError, match="--draft-shape has no effect with --speculative ngram"):
        speculation_of("ngram", None, None, "tree")
    with pytest.raises(UsageError, match="--draft-shape has no effect without --speculative"):
        speculation_of(None, None, None, "tree")
    found = speculation_of("medusa", None, None, "tree")
    assert found is not None
    assert found.shape == "tree"
