"""How far one run of a program is from another: on distributions, on plain tensors, on layers.

Logits of a vocabulary or of classes are compared as distributions (Kullback and Leibler, 1951), everything else by
relative error and direction. Measuring only: what may be lost is decided by the pipeline's gate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optc.compiler.execution.stage_driver import OutputRole, StageRun
from optc.compiler.execution.wide_rows import Seen, WideRows, plain
from optc.compiler.ir.row_blocks import row_blocks


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Difference of a run from a reference run.

    Attributes:
        max_abs_diff: largest absolute difference of the outputs; infinite when only one side is NaN, or when an output
            has another shape.
        scale: largest magnitude of the reference's outputs.
        relative: |after - before| / |before| (L2); of logits over a vocabulary after each token's mean is taken off,
            as a softmax does not see it; of several outputs the worst.
        cosine: mean cosine of the rows (tokens); of the outputs of a plain module the least.
        kl: mean KL(before || after) in nats per row; None where the outputs are no distribution.
        top1: share of rows whose most likely class (successor) is the same.
        entropy: mean entropy of the reference's distribution in nats; log(classes) is a flat one.
        classes: size of the vocabulary, or number of classes.
        kept, flipped: lead log(p1 / p2) of the reference's most likely class over its second, for each row where
            the most likely class stayed, and where it changed.
        perplexity: after / before - 1; None on anything but text fed to a decoder.
        layers: per attention layer, relative L2 difference of its output.
    """

    max_abs_diff: float
    scale: float
    relative: float = 0.0
    cosine: float = 1.0
    kl: float | None = None
    top1: float | None = None
    entropy: float | None = None
    classes: int = 0
    kept: tuple[float, ...] = ()
    flipped: tuple[float, ...] = ()
    perplexity: float | None = None
    layers: tuple[float, ...] = ()

    def decided(self, lead: float) -> tuple[int, float]:
        """Rows whose most likely class leads by more than `lead`, and the share of them that kept it (1 of none)."""
        kept = sum(value > lead for value in self.kept)
        count = kept + sum(value > lead for value in self.flipped)
        return count, kept / count if count else 1.0

    @property
    def flatness(self) -> float:
        """Entropy of the reference as a share of a flat distribution's; 0 without a distribution."""
        return self.entropy / math.log(self.classes) if self.entropy is not None and self.classes > 1 else 0.0


def measure(before: StageRun, after: StageRun, text: Sequence[Sequence[int]] = ()) -> Drift:
    """Compare two runs on the same inputs.

    Args:
        before: the reference.
        text: the token sequences that were fed, where they are text; for the perplexity of decoders.
    """
    return measure_each([before], after, text)[0]


def measure_each(befores: Sequence[StageRun], after: StageRun, text: Sequence[Sequence[int]] = ()) -> list[Drift]:
    """Compare a run with several references, which gave outputs of one kind; what needs the run alone is computed once."""
    after, befores = after.beside(befores[0]), [before.beside(befores[0]) for before in befores]
    for before in befores:
        list(zip(before.logits, after.logits, strict=True))  # as many
    equal = [before.equals(after) for before in befores]
    for before in itertools.compress(befores, equal):
        after.seen.update(before.seen)
    role = befores[0].role
    alike = [same or _alike(before, after) for before, same in zip(befores, equal, strict=True)]
    parts: list[list[_Part]] = [[] for _ in befores]
    for index, new in enumerate(after.logits):
        for begin, end in _blocks(new, role):
            right = WideRows(_block(new, begin, end), role, Seen(after, role, index, begin, end))
            for before, same, found in itertools.compress(zip(befores, equal, parts, strict=True), alike):
                old = _block(before.logits[index], begin, end)
                if old.numel():
                    left = WideRows(old, role, Seen(before, role, index, begin, end))
                    found.append(_part(old, right.rows, role, left, right, equal=same))
    return [
        _drift(before, after, found, text) if fits else _OTHER_SHAPE
        for before, found, fits in zip(befores, parts, alike, strict=True)
    ]


_OTHER_SHAPE = Drift(max_abs_diff=math.inf, scale=0.0, relative=math.inf, cosine=-1.0)
"""Outputs that cannot be put side by side: arithmetic would repeat the smaller, or leave out what the other lacks."""


def _alike(before: StageRun, after: StageRun) -> bool:
    """Whether all outputs have the same shape; a number is a row of one."""
    return all(_shape(old) == _shape(new) for old, new in zip(before.logits, after.logits, strict=True))


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return (*tensor.shape, 2) if tensor.is_complex() else tuple(tensor.shape) or (1,)


def _blocks(tensor: Tensor, role: OutputRole) -> list[tuple[int, int]]:
    """(begin, end) of rows that are compared together; (0, 0) of a tensor that is compared whole, as an output of its own."""
    if role == "output" or not tensor.numel():
        return [(0, 0)]
    return row_blocks(len(tensor), tensor[0].numel())


def _block(tensor: Tensor, begin: int, end: int) -> Tensor:
    return tensor[begin:end] if end else tensor


@dataclass(frozen=True)
class _Part:
    """What one tensor of outputs says: see the fields of `Drift`, row by row where they are means.

    Attributes:
        errors: squared norms of the difference and of the reference.
    """

    gap: float
    scale: float
    errors: tuple[float, float]
    cosine: Tensor
    distribution: _Rows | None


class _Rows(NamedTuple):
    """Of each row: nats, nats, log of a ratio, whether it is the same."""

    kl: Tensor
    entropy: Tensor
    lead: Tensor
    same: Tensor


def _part(old: Tensor, new: Tensor, role: OutputRole, left: WideRows, right: WideRows, *, equal: bool) -> _Part:
    """Compare one output, or some of its rows.

    Args:
        left, right: of `old` and of `new`. equal: nothing differs, so that most of the arithmetic is about nothing.
    """
    if role == "output":  # each is one row
        old, new = comparable(old, new)
        left, right = _as_row(old), _as_row(new)
    first, other = plain(old), plain(new)
    return _Part(
        gap=0.0 if equal else _largest_gap(first, other),
        scale=left.magnitude,
        errors=(0.0, 1.0) if equal else _squares(left, right),
        cosine=torch.ones(first.shape[:-1].numel()) if equal else _cosines(left, right),
        distribution=_distribution(left, right, equal=equal) if _classes(role, first) > 1 else None,
    )


def _as_row(tensor: Tensor) -> WideRows:
    """All numbers of a tensor."""
    return WideRows(plain(tensor).reshape(1, -1), "output", Seen())


def _classes(role: OutputRole, rows: Tensor) -> int:
    return int(rows.shape[-1]) if role in ("logits", "classes") else 0


def _drift(before: StageRun, after: StageRun, parts: Sequence[_Part], text: Sequence[Sequence[int]]) -> Drift:
    if not parts:
        return Drift(max_abs_diff=0.0, scale=0.0)  # outputs without numbers
    whole = before.role == "output"
    errors = [part.errors for part in parts]
    cosine = torch.cat([part.cosine for part in parts])
    rows = [part.distribution for part in parts if part.distribution is not None]
    return Drift(
        max_abs_diff=max(part.gap for part in parts),
        scale=max(part.scale for part in parts),
        relative=max(_ratio(*error) for error in (errors if whole else [tuple(map(sum, zip(*errors, strict=True)))])),
        cosine=float(cosine.min() if whole else cosine.mean()),
        perplexity=_perplexity_change(before, after, text),
        layers=_layer_drift(before, after),
        **(_as_distributions(rows, _classes(before.role, before.logits[0])) if rows else {}),
    )


def comparable(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Both without the infinities and NaNs that they share: masks are made of them."""
    if not (old.is_floating_point() or old.is_complex()):
        return old, new
    if old.itemsize == 1:  # torch 2.11 has no isfinite for float8
        old, new = old.float(), new.float()
    shared = ~torch.isfinite(old) & ((old == new) | (old.isnan() & new.isnan()))
    return old.masked_fill(shared, 0), new.masked_fill(shared, 0)


def _largest_gap(old: Tensor, new: Tensor) -> float:
    gap = (new - old).abs_()
    largest = float(gap.max())
    if math.isfinite(largest):
        return largest
    # NaN on both sides at the same place is no drift; NaN on one side is.
    return float(gap.masked_fill_(old.isnan() & new.isnan(), 0.0).nan_to_num(nan=math.inf).max())


def _squares(left: WideRows, right: WideRows) -> tuple[float, float]:
    """Squared norms of the difference and of the reference."""
    return float((right.values - left.values).square_().sum()), left.square


def _ratio(gap: float, reference: float) -> float:
    if gap == 0.0:
        return 0.0
    return math.sqrt(gap / reference) if reference else math.inf


def _cosines(left: WideRows, right: WideRows) -> Tensor:
    """Cosines along the last axis; 1 where both sides are zero."""
    cosine = (left.values * right.values).sum(-1) / (left.norms * right.norms)
    return torch.where((left.norms == 0) & (right.norms == 0), 1.0, cosine)


def _distribution(left: WideRows, right: WideRows, *, equal: bool) -> _Rows:
    """Rows compared as distributions."""
    entropy = left.entropy
    divergence = torch.zeros_like(entropy) if equal else left.divergence(right)
    return _Rows(divergence, entropy, left.lead, left.top == right.top)


def _as_distributions(rows: Sequence[_Rows], classes: int) -> dict[str, Any]:
    """The fields of a Drift that compare rows as distributions."""
    kl, entropy, lead, kept = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return {
        "kl": float(kl.mean()),
        "top1": float(kept.double().mean()),
        "entropy": float(entropy.mean()),
        "classes": classes,
        "kept": tuple(lead[kept].tolist()),
        "flipped": tuple(lead[~kept].tolist()),
    }


def _perplexity_change(before: StageRun, after: StageRun, text: Sequence[Sequence[int]]) -> float | None:
    if not text or not before.predicts_next or before.role != "logits":
        return None
    return _perplexity(after, text) / _perplexity(before, text) - 1


def _perplexity(run: StageRun, text: Sequence[Sequence[int]]) -> float:
    key = "perplexity", tuple(map(tuple, text))
    if key not in run.seen:
        run.seen[key] = _perplexity_of(run.logits, text)
    return float(run.seen[key])


def _perplexity_of(logits: Sequence[Tensor], sequences: Sequence[Sequence[int]]) -> float:
    losses = [
        torch.nn.functional.cross_entropy(
            row[:-1].float(), torch.tensor(tokens[1:], device=row.device), reduction="none"
        )
        for row, tokens in zip(logits, sequences, strict=True)
        if len(tokens) > 1
    ]
    return math.exp(min(float(torch.cat(losses).double().mean()), 80.0))


def _layer_drift(before: StageRun, after: StageRun) -> tuple[float, ...]:
    if len(before.taps) != len(after.taps):
        return ()  # attention operators were made or removed; only the outputs can be compared
    rows = zip(before.taps, after.taps, strict=True)
    return tuple(_layer_error(torch.cat(list(old)), torch.cat(list(new))) for old, new in rows)


def _layer_error(before: Tensor, after: Tensor) -> float:
    return float((after.float() - before.float()).norm() / before.float().norm().clamp(min=1e-12))
