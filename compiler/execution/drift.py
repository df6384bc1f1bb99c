"""How far one run of a program is from another: on distributions, on plain tensors, on layers.

Logits of a vocabulary or of classes are compared as distributions (Kullback and Leibler, 1951), everything else by
relative error and direction. Measuring only: what may be lost is decided by the pipeline's gate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optc.compiler.execution.stage_driver import StageRun


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Difference of a run from a reference run.

    Attributes:
        max_abs_diff: largest absolute difference of the outputs; infinite when only one side is NaN.
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
    after = after.beside(before)
    centred = before.role == "logits"
    whole = before.role == "output"  # each tensor is an output of its own; else each is a sequence of rows
    rows = [(old, new) for old, new in zip(before.logits, after.logits, strict=True) if old.numel()]
    pairs = [(_plain(old), _plain(new)) for old, new in (itertools.starmap(comparable, rows) if whole else rows)]
    if not pairs:
        return Drift(max_abs_diff=0.0, scale=0.0)  # outputs without numbers
    classes = pairs[0][0].shape[-1] if before.role in ("logits", "classes") else 0
    scale = max(float(old.nan_to_num().abs().max()) for old, _ in pairs)
    if all(torch.equal(old, new) and bool(torch.isfinite(old).all()) for old, new in pairs):
        return Drift(  # as most rewrites leave them: nothing more is to be computed
            max_abs_diff=0.0,
            scale=scale,
            perplexity=_perplexity_change(before, after, text),
            layers=_layer_drift(before, after),
            **(_unchanged([old for old, _ in pairs]) if classes > 1 else {}),
        )
    errors, cosines = zip(*(_errors(old, new, centred, whole) for old, new in pairs), strict=True)
    return Drift(
        max_abs_diff=max(_largest_gap(old, new) for old, new in pairs),
        scale=scale,
        relative=max(_ratio(*error) for error in (errors if whole else [tuple(map(sum, zip(*errors, strict=True)))])),
        cosine=min(map(float, cosines)) if whole else float(torch.cat(cosines).mean()),
        perplexity=_perplexity_change(before, after, text),
        layers=_layer_drift(before, after),
        **(_distribution(pairs) if classes > 1 else {}),
    )


def comparable(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Both without the infinities and NaNs that they share: masks are made of them."""
    if not (old.is_floating_point() or old.is_complex()):
        return old, new
    if old.itemsize == 1:  # torch 2.11 has no isfinite for float8
        old, new = old.float(), new.float()
    shared = ~torch.isfinite(old) & ((old == new) | (old.isnan() & new.isnan()))
    return old.masked_fill(shared, 0), new.masked_fill(shared, 0)


def _plain(tensor: Tensor) -> Tensor:
    """As real numbers, fp32 at least, with a last axis."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return torch.atleast_1d(real if real.dtype == torch.float64 else real.float())


def _largest_gap(old: Tensor, new: Tensor) -> float:
    # NaN on both sides at the same place is no drift; NaN on one side is.
    gap = torch.where(old.isnan() & new.isnan(), 0.0, (new - old).abs())
    return float(gap.nan_to_num(nan=math.inf).max())


def _errors(old: Tensor, new: Tensor, centred: bool, whole: bool) -> tuple[tuple[float, float], Tensor]:
    """Squared norms of the difference and of the reference, and the cosine of each row, [rows], or of all, []."""
    left, right = (_centre(side, centred).flatten(0, -1 if whole else -2) for side in (old, new))
    cosine = _cosines(left, right)
    right -= left
    return (float(right.square().sum()), float(left.square().sum())), cosine


def _centre(tensor: Tensor, centred: bool) -> Tensor:
    """In float64, in memory of its own."""
    wide = tensor.to(torch.float64, copy=True)
    return wide.sub_(wide.mean(-1, keepdim=True)) if centred else wide


def _ratio(gap: float, reference: float) -> float:
    if gap == 0.0:
        return 0.0
    return math.sqrt(gap / reference) if reference else math.inf


def _cosines(left: Tensor, right: Tensor) -> Tensor:
    """Cosines along the last axis; 1 where both sides are zero."""
    sizes = left.norm(dim=-1), right.norm(dim=-1)
    cosine = (left * right).sum(-1) / (sizes[0] * sizes[1])
    return torch.where((sizes[0] == 0) & (sizes[1] == 0), 1.0, cosine)


def _unchanged(rows: Sequence[Tensor]) -> dict[str, Any]:
    """The same of rows [..., classes] that stayed as they were."""
    logs = [row.flatten(0, -2).double().log_softmax(-1) for row in rows]
    leads, entropies = zip(*(_lead_and_entropy(row, row.exp()) for row in logs), strict=True)
    return {
        "kl": 0.0,
        "top1": 1.0,
        "entropy": float(torch.cat(entropies).mean()),
        "classes": rows[0].shape[-1],
        "kept": tuple(torch.cat(leads).tolist()),
        "flipped": (),
    }


def _lead_and_entropy(logs: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Of probabilities and their logarithms [n, classes]: log(p1 / p2) of the most likely two, entropy in nats, [n]."""
    first = logs.topk(2, -1).values
    # 0 log 0 is 0: a class that is ruled out (a logit of minus infinity) says nothing.
    return first[..., 0] - first[..., 1], -(weights * logs).masked_fill_(logs == -math.inf, 0.0).sum(-1)


def _distribution(pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """The fields of a Drift that compare rows [..., classes] as distributions."""
    divergences, entropies, leads, same = [], [], [], []
    for old, new in pairs:
        log_old, log_new = (side.flatten(0, -2).double().log_softmax(-1) for side in (old, new))
        ruled_out, weights = log_old == -math.inf, log_old.exp()
        lead, entropy = _lead_and_entropy(log_old, weights)
        leads.append(lead)
        entropies.append(entropy)
        same.append(log_old.argmax(-1) == log_new.argmax(-1))
        divergences.append(log_old.sub_(log_new).mul_(weights).masked_fill_(ruled_out, 0.0).sum(-1))
    led, kept = torch.cat(leads), torch.cat(same)
    return {
        "kl": float(torch.cat(divergences).mean()),
        "top1": float(kept.double().mean()),
        "entropy": float(torch.cat(entropies).mean()),
        "classes": pairs[0][0].shape[-1],
        "kept": tuple(led[kept].tolist()),
        "flipped": tuple(led[~kept].tolist()),
    }


def _perplexity_change(before: StageRun, after: StageRun, text: Sequence[Sequence[int]]) -> float | None:
    if not text or not before.predicts_next or before.role != "logits":
        return None
    return _perplexity(after.logits, text) / _perplexity(before.logits, text) - 1


def _perplexity(logits: Sequence[Tensor], sequences: Sequence[Sequence[int]]) -> float:
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
