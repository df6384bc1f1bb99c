"""The source model as the reference that an artifact is measured against: transformers, fp32."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from optc.compiler.artifact.manifest import Manifest
from optc.compiler.capture.loading import load_model
from optc.compiler.diagnostics import InputError
from optc.compiler.ir.devices import choose_device
from optc.compiler.model_folder.checkpoint import check_folder, weights_digest


@dataclass(frozen=True)
class SourceModel:
    """Calls the source model on one sequence: tokens [n] -> logits float32 [n, V].

    Attributes:
        path: its folder.
        matches: whether its weights are those the artifact was compiled from.
    """

    path: Path
    matches: bool
    model: torch.nn.Module

    def __call__(self, tokens: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            ids = torch.tensor([tokens], device=next(self.model.parameters()).device)
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits[0].float().cpu()

    def continued(self, tokens: Sequence[int], count: int, stop_ids: Collection[int] = ()) -> list[int]:
        """Up to `count` tokens behind others, the likeliest each time; one of `stop_ids` is the last."""
        chosen: list[int] = []
        while len(chosen) < count and not (chosen and chosen[-1] in stop_ids):
            chosen.append(int(self([*tokens, *chosen])[-1].argmax()))
        return chosen


def open_reference(manifest: Manifest, source: Path | None = None, device: str = "cpu") -> SourceModel:
    """Load the source model of an artifact in fp32 with transformers' own attention.

    Args:
        source: compare with this folder, whatever its weights; None takes the folder that the
            manifest names, whose weights must still be those that were compiled.
        device: cpu, cuda, cuda:N or auto.

    Raises:
        UsageError, TargetError: an unknown device, or one that is not here.
        InputError: the folder is gone, unusable, changed since, or has another vocabulary.
    """
    place = choose_device(device)
    folder = source or _recorded(manifest)
    info = check_folder(folder)
    matches = weights_digest(info) == manifest.source.weights_sha256
    if not matches and source is None:
        raise InputError(
            "the source model is not the one that was compiled",
            where=str(folder),
            why="its weights have changed since",
            remedy="compile again, or name a model to compare with: --source DIR",
        )
    # Eager attention, because it is the definition: some models have no other (softcap).
    model, _ = load_model(folder, dtype=torch.float32, attention="eager")
    vocab = int(model.config.get_text_config().vocab_size)  # type: ignore[union-attr,operator]
    if vocab != manifest.contract.model.vocab_size:
        raise InputError(
            f"the source model has {vocab} token ids, the artifact {manifest.contract.model.vocab_size}",
            where=str(folder),
            remedy="name the model that was compiled: --source DIR",
        )
    return SourceModel(folder, matches, model.to(place))


def _recorded(manifest: Manifest) -> Path:
    path = manifest.source.path
    if path and Path(path).is_dir():
        return Path(path)
    raise InputError(
        "the source model is not there" if path else "the artifact was compiled from a module in memory",
        where=path or None,
        remedy="name its folder: --source DIR, or leave the comparison out with --no-reference",
    )
