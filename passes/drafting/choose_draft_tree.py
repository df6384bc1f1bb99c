"""drafted  ->  drafted, and which of the guesses are verified: a tree chosen by what was right on calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optc.compiler.diagnostics import InputError
from optc.compiler.execution.block_manager import BlockManager
from optc.compiler.ir.contract import CACHE_ROLES
from optc.compiler.ir.devices import program_device
from optc.compiler.ir.draft_tree import DraftTree, choose_tree
from optc.compiler.ir.program import Program
from optc.compiler.ops.dialect.paged_tree import CAUSAL
from optc.compiler.rewriting.passes import Miss, Pass, PassContext, PassResult

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 24, 32, 64
"""What the model continues: so many calibration sequences, their first tokens, greedily."""


@dataclass(frozen=True, kw_only=True)
class ChooseDraftTree(Pass):
    """drafted  ->  drafted, with a `DraftTree` in the contract

    The model continues calibration text greedily, which is the text that its heads will see, and each guess of a head is
    held to what the model came to. The tree has the guesses that were right most often, together with all in front of them.

    Attributes:
        size: most guesses of the tree.
        ranks: the likeliest guesses of each head that the program gives.
    """

    name: ClassVar[str] = "choose-draft-tree"
    calibrated: ClassVar[bool] = True

    size: int = 16
    ranks: int = 1

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Write the tree into the contract; the graph stays.

        Raises:
            InputError: no guess of the heads was right.
        """
        drafted = next((spec for spec in program.contract.outputs if spec.role == "drafted"), None)
        takes = program.contract.input_index("tree") is not None
        if drafted is None or not takes or program.contract.input_index("logits_indices") is not None:
            why = "the program has no heads, takes no trees, or gives logits of some tokens only"
            return PassResult(program, 0, 1, (Miss("drafted", why),))
        assert context.calibration is not None
        assert isinstance(context.calibration.tokens, Tensor)
        heads = drafted.columns // self.ranks
        texts, guesses = _continued(program, context.calibration.tokens, context)
        right = [
            row for text, made in zip(texts, guesses, strict=True) for row in _right(text, made, heads, self.ranks)
        ]
        tree = choose_tree(right, heads=heads, ranks=self.ranks, size=self.size)
        if not tree.nodes:
            raise InputError(
                "no guess of the Medusa heads was right on the calibration text",
                why=f"of {len(right)} greedy tokens",
                remedy="train the heads for longer (optc train --recipe medusa), or leave --speculative-tree out",
            )
        return PassResult(program.with_contract(tree=tree), 1, 1, notes=(_said(tree),))


def _said(tree: DraftTree) -> str:
    """The tree in a sentence: beside the chain of the likeliest guesses, by what was measured."""
    chain = sum(share for path, share in zip(tree.paths, tree.shares, strict=True) if not any(path))
    return (
        f"a tree of {len(tree.nodes)} guesses gives {1 + sum(tree.shares):.2f} tokens a step, its chain of likeliest ones "
        f"{1 + chain:.2f}, on {tree.tokens} greedy tokens"
    )


def _right(text: Sequence[int], guesses: Tensor, heads: int, ranks: int) -> list[list[int]]:
    """Of each place of a text [n] whose next tokens are known, the rank of the right token of each head; -1: none.

    Args:
        guesses: int64 [n, heads * ranks], of heads at each token: of the token two places behind it, three, and so on.
    """
    tokens, found = torch.tensor(text), []
    table = guesses.view(len(text), heads, ranks)
    for place in range(len(text) - heads - 1):
        same = table[place] == tokens[place + 2 : place + 2 + heads, None]
        found.append(torch.where(same.any(1), same.int().argmax(1), -1).tolist())
    return found


@torch.no_grad()
def _continued(program: Program, sequences: Tensor, context: PassContext) -> tuple[list[list[int]], list[Tensor]]:
    """What the model writes greedily behind the beginning of sequences [R, S], from the last token of each beginning on, and
    the guesses of its heads at each of these tokens, int64 [n, columns]."""
    contract = program.contract
    limit = contract.model.context_length or sequences.shape[1] + NEW_TOKENS
    length = min(PROMPT_TOKENS, sequences.shape[1], max(1, limit // 2))
    count, size = min(NEW_TOKENS, limit - length), contract.kv_cache.block_size
    prompts = sequences[:PROMPTS, :length].tolist()
    manager = BlockManager(len(prompts) * -(-(length + count) // size), size)
    device, pools = program_device(program), _empty_pools(program, manager.num_blocks)
    for row in range(len(prompts)):
        manager.start(row)
    work, texts = prompts, [prompt[-1:] for prompt in prompts]
    guesses: list[Tensor] = []
    place = next(i for i, spec in enumerate(contract.outputs) if spec.role == "drafted")
    for step in range(count):
        inputs = manager.step(list(enumerate(work)))
        given = (*inputs, torch.full_like(inputs.input_ids, CAUSAL))
        outputs = program(*(item.to(device) for item in given), *pools)
        last = (inputs.cu_seqlens[1:].long() - 1).to(device)
        logits, drafted = outputs[0][last], outputs[place][last]
        guesses.append(drafted.cpu())
        work = logits.argmax(-1)[:, None].tolist()
        for text, new in zip(texts, work, strict=True):
            text += new
        if context.progress is not None:
            context.progress(step + 1, count, "guesses of the heads")
    return [text[:-1] for text in texts], list(torch.stack(guesses, 1))


def _empty_pools(program: Program, num_blocks: int) -> list[Tensor]:
    specs = [spec for spec in program.contract.inputs if spec.role in CACHE_ROLES]
    shapes = [[num_blocks if dim == "num_blocks" else int(dim) for dim in spec.dims] for spec in specs]
    return [
        torch.zeros(shape, dtype=getattr(torch, spec.dtype), device=program_device(program))
        for spec, shape in zip(specs, shapes, strict=True)
    ]
