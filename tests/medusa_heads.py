"""Folders of small Medusa heads."""

from __future__ import annotations

from pathlib import Path

import torch

from optc.compiler.model_folder.draft_origin import Origin
from optc.compiler.model_folder.medusa import MedusaConfig, MedusaFolder, MedusaHead


def write_heads(
    folder: Path,
    size: int,
    *,
    heads: int = 2,
    layers: int = 1,
    vocabulary: int | None = None,
    weights: str = "",
    scale: float = 0.3,
) -> MedusaFolder:
    """Write random heads for a hidden size, with linears of their own where a vocabulary is given.

    Args:
        weights: hash of the base's; "" leaves draft.json out.
        scale: of their values.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    def head() -> MedusaHead:
        blocks = tuple((random(size, size), random(size)) for _ in range(layers))
        return MedusaHead(blocks, None if vocabulary is None else random(vocabulary, size))

    origin = Origin(config="0" * 64, weights=weights, tokenizer="") if weights else None
    config = MedusaConfig(medusa_num_heads=heads, medusa_num_layers=layers)
    made = MedusaFolder(config, tuple(head() for _ in range(heads)), origin)
    folder.mkdir(exist_ok=True)
    made.write(folder)
    return made
