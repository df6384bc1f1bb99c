"""choose-draft-tree: what is measured is what heads say of the model's own greedy text, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from medusa_heads import write_heads
from stages import VOCAB, apply, full_logits, sequences, tiny_decoder

from optc.compiler.calibration.sequences import Calibration
from optc.compiler.diagnostics import InputError, NoMatchError
from optc.compiler.ir.draft_tree import choose_tree
from optc.compiler.pipeline.pipeline import Pipeline, PipelineOptions
from optc.compiler.rewriting.passes import PassContext
from optc.passes.drafting import choose_draft_tree
from optc.passes.drafting.choose_draft_tree import ChooseDraftTree
from optc.passes.drafting.medusa_heads import AddMedusaHeads
from optc.passes.kv_cache.paged import PageKVCache

HEADS, RANKS, LENGTH, NEW = 2, 24, 6, 12
CALIBRATION = Calibration(torch.tensor(sequences(*[16] * 5)), "random tokens")


def test_measured_on_greedy_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_draft_tree, "PROMPT_TOKENS", LENGTH)
    monkeypatch.setattr(choose_draft_tree, "NEW_TOKENS", NEW)
    write_heads(tmp_path, 16, heads=HEADS)
    decoder = tiny_decoder()
    paged = apply(PageKVCache(block_size=4, tree=True), decoder).program
    with_heads = apply(AddMedusaHeads(folder=str(tmp_path), ranks=RANKS), paged).program
    result = ChooseDraftTree(size=5, ranks=RANKS).run(with_heads, PassContext(calibration=CALIBRATION))

    whole = apply(AddMedusaHeads(folder=str(tmp_path), ranks=RANKS), apply(PageKVCache(), decoder).program).program
    right = []
    for prompt in CALIBRATION.tokens[:, :LENGTH].tolist():
        text = list(prompt)
        for _ in range(NEW):
            text.append(int(full_logits(decoder, text)[-1].argmax()))
        text.pop()
        fed = len(text)
        table = torch.tensor([[0, 1]], dtype=torch.int32)
        pools = [torch.zeros(2, 16, *spec.dims[2:]) for spec in whole.contract.inputs[6:]]
        place, starts = torch.arange(fed), torch.tensor([0, fed]).int()
        _, drafted = whole(torch.tensor(text), place, place, table, torch.tensor([fed]).int(), starts, *pools)
        for at in range(LENGTH - 1, fed - HEADS - 1):
            guesses = drafted[at].view(HEADS, RANKS).tolist()
            wanted = text[at + 2 : at + 2 + HEADS]
            right.append([row.index(token) if token in row else -1 for row, token in zip(guesses, wanted, strict=True)])
    assert result.program.contract.tree == choose_tree(right, heads=HEADS, ranks=RANKS, size=5)
    assert len(right) == 5 * (NEW - HEADS - 1)
    assert sum(rank >= 0 for row in right for rank in row) > 10
    assert "a tree of 5 guesses gives 1." in result.notes[0]


def test_the_stage_is_run_and_gated(tmp_path: Path) -> None:
    write_heads(tmp_path, 16, weights="1" * 64)
    options = PipelineOptions(context=PassContext(calibration=CALIBRATION))
    steps = [
        PageKVCache(tree=True),
        AddMedusaHeads(folder=str(tmp_path), ranks=VOCAB // 2),
        ChooseDraftTree(size=3, ranks=VOCAB // 2),
    ]
    result = Pipeline(steps).run(tiny_decoder(), options)
    assert result.records[2].drift is not None
    assert result.records[2].drift.max_abs_diff == 0.0
    tree = result.program.contract.tree
    assert tree is not None
    assert (len(tree.nodes), tree.heads) == (3, 2)


def test_heads_that_know_nothing_have_no_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_draft_tree, "_right", lambda text, guesses, heads, ranks: [[-1] * heads])
    write_heads(tmp_path, 16)
    program = apply(PageKVCache(tree=True), tiny_decoder()).program
    program = apply(AddMedusaHeads(folder=str(tmp_path), ranks=2), program).program
    with pytest.raises(InputError, match="no guess of the Medusa heads was right"):
        ChooseDraftTree(ranks=2).run(program, PassContext(calibration=CALIBRATION))
    with pytest.raises(NoMatchError, match="the program has no heads, takes no trees"):
        Pipeline([PageKVCache(), ChooseDraftTree()]).run(
            tiny_decoder(), PipelineOptions(context=PassContext(calibration=CALIBRATION))
        )
