"""Which drafted tokens a model keeps, of T positions of R requests, laid end to end: decided on the device of its logits.

A request feeds its last token and k drafted ones, so that one forward gives k + 1 rows of logits. At each of these
positions a token is decided by the model's own distribution there, *processed*: penalties, temperature, top-k, top-p and
min-p come first (`drawable`). The draft is kept as far as it is what was decided, and the decided token behind it is kept
as well: the correction of the first drafted token that is not, or the bonus behind a draft that is kept whole.

The output distribution is the model's own, by the rejection sampling of Leviathan et al. 2023
(https://arxiv.org/abs/2211.17192): a drafted token x of probability q(x) is kept with probability min(1, p(x) / q(x)), else
a token of (p - q)+ takes its place. For a drafter that is sure (q is 1 for its token) this is: draw from p, and keep the
draft if it is what was drawn. It is done so here, with the uniform numbers of plain decoding: the tokens are those that it
draws, whatever was drafted. A drafter that has a distribution of its own may draw from it by the same numbers, so that it
often comes to the same token (a coupling of the two, see Daliri et al. 2024, https://arxiv.org/abs/2408.07978).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from optc.compiler.execution.paged_call import Ints
from optc.compiler.ops.dialect.sampling import NO_TOKEN
from optc.runtime.sampling import Sampling

NOT_DRAFTED = -3
"""In place of a drafted token where none is; it is neither a token nor `NO_TOKEN`."""


class Cuts(NamedTuple):
    """How tokens are drawn at T positions; see `Sampling`.

    Attributes:
        temperature: float32 [T]; 0 takes the largest score.
        top_k: int64 [T], 0 keeps all. top_p, min_p: float64 [T]; 1 and 0 keep all.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    @classmethod
    def of(cls, samplings: Sequence[Sampling], device: torch.device) -> Self:
        """Those of T samplings."""
        most = torch.iinfo(torch.int64).max
        return cls(
            torch.tensor([item.heat for item in samplings], device=device),
            torch.tensor([min(item.top_k, most) for item in samplings], device=device),
            torch.tensor([item.top_p for item in samplings], dtype=torch.float64, device=device),
            torch.tensor([item.min_p for item in samplings], dtype=torch.float64, device=device),
        )


def drawable(scores: Tensor, cuts: Cuts) -> Tensor:
    """Unnormalized probabilities float32 [T, V] that tokens are drawn by; those that were cut off have exactly 0.

    Args:
        scores: [T, V], after penalties; finite where a row has a temperature above 0.
    """
    heated = scores.float() / torch.where(cuts.temperature > 0, cuts.temperature, 1.0)[:, None]
    weights = torch.exp(heated - heated.amax(1, keepdim=True))
    size = scores.shape[1]
    if bool((cuts.top_k > 0).any()):
        place = torch.where(cuts.top_k > 0, cuts.top_k.clamp(max=size), size) - 1
        least = heated.sort(1, descending=True).values.gather(1, place[:, None])
        weights = weights.masked_fill(heated < least, 0.0)
    if bool((cuts.top_p < 1).any()):
        largest = weights.sort(1, descending=True).values.double()
        total = largest.cumsum(1)
        inside = ((total - largest) < (cuts.top_p[:, None] * total[:, -1:])).sum(1).clamp(min=1)
        least = largest.gather(1, inside[:, None] - 1).float()
        weights = weights.masked_fill((weights < least) & (cuts.top_p < 1)[:, None], 0.0)
    return weights.masked_fill(weights < cuts.min_p[:, None], 0.0)  # the likeliest weighs 1


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """int64 [T]: by inversion, the first token whose cumulative weight exceeds a uniform number's share of the whole.

    Args:
        weights: [T, V], not all 0 in a row. uniforms: float64 [T], from 0 on and below 1.
    """
    cumulative = weights.double().cumsum(1)
    total = cumulative[:, -1]
    share = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, share[:, None], right=True)[:, 0]


def decide(scores: Tensor, cuts: Cuts, uniforms: Tensor) -> Tensor:
    """int64 [T]: the token of each position; `NO_TOKEN` where scores are not finite.

    Args:
        scores: float32 [T, V], after biases, grammars and penalties. uniforms: float64 [T], see `draw`.
    """
    top = scores.amax(1)
    sound = torch.isfinite(top / torch.where(cuts.temperature > 0, cuts.temperature, 1.0))
    greedy: Tensor = torch.ops.optc.argmax(scores)
    if bool((cuts.temperature > 0).any()):
        safe = torch.where(sound[:, None], scores, 0.0)
        greedy = torch.where(cuts.temperature > 0, draw(drawable(safe, cuts), uniforms), greedy)
    return torch.where(sound, greedy, NO_TOKEN)


def accept(decided: Ints, drafted: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """The tokens of each request, and how many of them are its next ones: numbers of the host, which plans with them.

    Args:
        decided: int64 [T]. drafted: int64 [T], the token drafted behind each position; `NOT_DRAFTED` at a request's last.
        counts: int64 [R], positions of each request, one at least; their sum is T.

    Returns:
        int64 [R, W], the decided tokens, filled up with `NOT_DRAFTED`; and int64 [R], 1 to W.
    """
    columns = np.arange(int(counts.max()))
    real = columns < counts[:, None]
    places = np.minimum((counts.cumsum() - counts)[:, None] + columns, len(decided) - 1)
    said = decided[places]
    agrees = real & (said == drafted[places])
    return np.where(real, said, NOT_DRAFTED), 1 + np.logical_and.accumulate(agrees, 1).sum(1)


def accept_tree(decided: Tensor, drafted: Tensor, counts: Tensor, parents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of drafts that are trees: the path that agrees with what was decided, as far as it goes.

    A token behind which nothing can be decided is not kept: the one in front of it comes to it by itself, and the request
    ends there (an answer that is complete by its grammar), or fails at it in the next step.

    Args:
        decided, counts: as `accept` has them. drafted: int64 [T], the tokens that were fed.
        parents: int64 [W or more], the token of its request that each one follows, a smaller one; the first one's is of no
            meaning.

    Returns:
        As `accept`; and int64 [R, D], which tokens of each request those are that the decided ones stand behind, filled
        up with the last of them.
    """
    width = int(counts.max())
    columns = torch.arange(width, device=decided.device)
    places = ((counts.cumsum(0) - counts)[:, None] + columns).clamp(max=len(decided) - 1)
    said, fed, real = decided[places], drafted[places], columns < counts[:, None]
    kept = torch.zeros_like(real)
    kept[:, 0] = True
    open_end = kept.clone()  # kept tokens behind which none is kept yet: of equal guesses the first one is
    for column in range(1, width):
        parent = int(parents[column])
        agrees = (said[:, parent] == fed[:, column]) & (said[:, column] != NO_TOKEN)
        kept[:, column] = real[:, column] & open_end[:, parent] & agrees
        open_end[:, parent] &= ~kept[:, column]
        open_end[:, column] = kept[:, column]
    lengths = kept.sum(1)
    order = torch.where(kept, columns, width).sort(1).values[:, : int(lengths.max())]
    last = (lengths - 1)[:, None]
    path = order.gather(1, torch.minimum(torch.arange(order.shape[1], device=order.device)[None], last))
    tokens = torch.where(torch.arange(path.shape[1], device=path.device) <= last, said.gather(1, path), NOT_DRAFTED)
    return tokens, lengths, path
