"""paged_tree_attention_: along each path of a tree it is paged_attention_ of that path alone."""

from __future__ import annotations

import pytest
import torch
from paged_cases import Case
from torch import Tensor
from trees import bits_of, path_to

from optc.compiler.ops.dialect.paged_tree import CAUSAL, seen_tokens
from optc.compiler.ops.library import reference

PARENTS = [-1, 0, 0, 1, 2, 3, 1]


def alone(inputs: list[Tensor], knobs: dict[str, float], path: list[int]) -> Tensor:
    """The last token of a path [H, Dv], as a request whose new tokens are those of the path; pools are written anew."""
    q, k, v = (item[path] for item in inputs[:3])
    past = int(inputs[7][0]) - len(inputs[0])
    place = torch.arange(past, past + len(path))
    size = inputs[3].shape[1]
    slots = inputs[6][0, place // size].long() * size + place % size
    lengths, starts = torch.tensor([past + len(path)]).int(), torch.tensor([0, len(path)]).int()
    pools = [pool.clone() for pool in inputs[3:5]]
    rows = reference("paged_attention_")(q, k, v, *pools, slots, inputs[6], lengths, starts, **knobs)
    return rows[-1]


@pytest.mark.parametrize("window", [0, 3, 9])
@pytest.mark.parametrize("past", [0, 6])
def test_each_path_is_a_text(past: int, window: int) -> None:
    """Blocks of 4, so that the tree crosses one."""
    inputs, knobs = Case(new=(len(PARENTS),), past=(past,), window=window, softcap=4.0).inputs()
    inputs[3], inputs[4] = (pool.nan_to_num(0.5) for pool in inputs[3:5])
    tree = torch.tensor(bits_of(PARENTS))
    pools = [pool.clone() for pool in inputs[3:5]]
    found = reference("paged_tree_attention_")(*inputs[:3], *pools, *inputs[5:], tree, **knobs)
    for token in range(len(PARENTS)):
        torch.testing.assert_close(found[token], alone(inputs, knobs, path_to(PARENTS, token)), rtol=0, atol=2e-6)
    for pool, new in zip(pools, inputs[1:3], strict=True):
        assert torch.equal(pool.flatten(0, 1)[inputs[5]], new)


def test_tokens_of_no_tree_see_all_before_them() -> None:
    inputs, knobs = Case(window=8).inputs()
    tree = torch.full((len(inputs[0]),), CAUSAL)
    plain = reference("paged_attention_")(*inputs[:3], *(pool.clone() for pool in inputs[3:5]), *inputs[5:], **knobs)
    found = reference("paged_tree_attention_")(*inputs, tree, **knobs)
    torch.testing.assert_close(found, plain, rtol=0, atol=2e-6)


def test_seen_tokens() -> None:
    assert seen_tokens(torch.tensor([1, 3, 5, CAUSAL])).int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 0, 1, 0],
        [1, 1, 1, 1],
    ]
