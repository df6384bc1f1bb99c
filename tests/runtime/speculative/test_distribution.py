"""What is drawn with drafts has the distribution that it has without: chi-square over the transitions of a small chain."""

from __future__ import annotations

import dataclasses
import itertools
import typing

import numpy as np
import pytest
import torch
from serving import run
from speculation import speculating
from torch import Tensor

from optc.compiler.execution.paged_call import Ints
from optc.compiler.ir.draft_tree import DraftTree
from optc.runtime.generation.sampling import distribution
from optc.runtime.sampling import Sampling
from optc.runtime.serving import verifier
from optc.runtime.serving.request import Generate
from optc.runtime.sessions.paged import PagedModel
from optc.runtime.speculative.acceptance import Cuts, accept, decide
from optc.runtime.speculative.draft_model import DraftModel
from optc.runtime.speculative.drafter import Drafter
from optc.runtime.speculative.eagle3 import Eagle3Drafter
from optc.runtime.speculative.opening import Verifying, open_drafter
from optc.runtime.speculative.settings import Method, Speculation

VOCAB, ROWS, COUNT = 6, 32, 640
PROCESSED = Sampling(temperature=0.8, top_k=5, top_p=0.95)
HOT = Sampling(temperature=0.6)


def chain(seed: int, blend: float = 0.0) -> tuple[PagedModel, np.ndarray]:
    """A model whose logits follow from the last token alone, and its table; `blend` makes it one that is near seed 0."""
    table = np.random.default_rng(seed).normal(size=(VOCAB, VOCAB)).astype(np.float32)
    table = blend * np.random.default_rng(0).normal(size=(VOCAB, VOCAB)).astype(np.float32) + (1 - blend) * table

    likeliest = torch.from_numpy(table).argmax(1)

    def forward(ids: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        ahead = likeliest[likeliest[ids]]  # what heads guess behind the next token
        return torch.from_numpy(table)[ids], torch.stack((ahead, likeliest[ahead]), 1)

    model = PagedModel(
        run=forward,
        pools=[],
        selects=False,
        vocab_size=VOCAB,
        context_length=1024,
        block_size=16,
        num_blocks=ROWS * 64,
        chunk=4096,
        device=torch.device("cpu"),
        gives=("drafted",),
        heads=2,
    )
    return model, table


def states(model: PagedModel) -> PagedModel:
    """The same with hidden states beside its logits, as bases and their draft models have them."""

    def forward(ids: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return model.run(ids, *rest)[0], torch.zeros(len(ids), 1)

    return dataclasses.replace(model, run=forward, gives=("aux_hidden",))


def drafter(method: Method, model: PagedModel) -> Drafter:
    if method == "eagle3":
        return Eagle3Drafter(states(chain(1, blend=0.7)[0]), (1, 1), torch.float32)
    if method == "draft":
        return DraftModel(chain(1, blend=0.7)[0], VOCAB)
    return open_drafter(Speculation(method=method, draft_tokens=2), Verifying(model=model, folder=None, running=ROWS))


TREE = DraftTree(heads=2, ranks=2, nodes=((0, 0), (0, 1), (1, 0), (2, 1)))


def branching(model: PagedModel) -> PagedModel:
    """The same with two guesses of each head, of which four are a tree."""

    def forward(ids: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        logits, ahead = model.run(ids, *rest)
        return logits, torch.stack((ahead, (ahead + 1) % VOCAB), 2).flatten(1)

    return dataclasses.replace(model, run=forward, takes_trees=True, tree=TREE)


def chance(method: Method, sampling: Sampling, *, tree: bool = False) -> float:
    """The p-value of what 32 requests drew, each with a seed of its own; more than 20 000 draws."""
    model, table = chain(0)
    model = states(model) if method == "eagle3" else branching(model) if tree else model
    engine = speculating(model, drafter(method, model), method=method, max_running=ROWS, token_budget=1024)
    samplings = [Sampling(**{**vars(sampling), "seed": row}) for row in range(ROWS)]
    got = run(
        engine,
        [
            Generate(id=str(row), prompt=[row % VOCAB], max_new_tokens=COUNT, sampling=samplings[row])
            for row in range(ROWS)
        ],
    )
    figures = engine.metrics().speculation
    assert figures is not None
    assert figures.accepted_tokens > 2000
    assert figures.verified > 2000
    assert figures.tree == (len(TREE.nodes) if tree else 0)
    seen = np.zeros((VOCAB, VOCAB))
    for row in range(ROWS):
        for last, token in itertools.pairwise([row % VOCAB, *got[str(row)].tokens]):
            seen[last, token] += 1
    assert seen.sum() > 20_000
    expected = distribution(table, sampling) * seen.sum(1, keepdims=True)
    if seen[expected == 0].any():
        return 0.0
    kept = expected > 0
    statistic = ((seen - expected)[kept] ** 2 / expected[kept]).sum()
    free = int(kept.sum()) - VOCAB
    return float(torch.special.gammaincc(torch.tensor(free / 2.0), torch.tensor(statistic / 2.0)))


@pytest.mark.parametrize(
    ("method", "sampling"), [*((method, PROCESSED) for method in typing.get_args(Method)), ("ngram", HOT)]
)
def test_draws_are_distributed_as_without_drafts(method: Method, sampling: Sampling) -> None:
    assert chance(method, sampling) > 0.01


def test_draws_with_trees_are_distributed_as_without() -> None:
    assert chance("medusa", PROCESSED, tree=True) > 0.01


@pytest.mark.parametrize("sampling", [PROCESSED, HOT])
def test_accepting_by_the_unprocessed_distribution_is_caught(
    sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted bug: a draft is kept where the model's own distribution, before temperature and cuts, draws it."""
    rough: list[Tensor] = []

    def spying(scores: Tensor, cuts: Cuts, uniforms: Tensor) -> Tensor:
        plain = Cuts(
            torch.ones_like(cuts.temperature),
            *(torch.full_like(cut, off) for cut, off in zip(cuts[1:], (0, 1, 0), strict=True)),
        )
        rough.append(decide(scores, plain, uniforms))
        return decide(scores, cuts, uniforms)

    def accepting(decided: Ints, drafted: Ints, counts: Ints) -> tuple[Ints, Ints]:
        return accept(np.where(rough[-1].numpy() == drafted, drafted, decided), drafted, counts)

    monkeypatch.setattr(verifier, "decide", spying)
    monkeypatch.setattr(verifier, "accept", accepting)
    assert chance("ngram", sampling) < 1e-6
