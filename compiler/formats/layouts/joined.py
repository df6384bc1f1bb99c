"""Linears of one input that vLLM and SGLang join, and by which name they then look for their quantization."""

from __future__ import annotations

from collections.abc import Collection, Iterator

JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Last name of the joined linear -> last names of its parts (`packed_modules_mapping` of their models)."""


def joined_names(linears: Collection[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(name of the joined linear, its parts) of all that are there whole; `linears` by name."""
    for joined, (first, *others) in JOINED.items():
        for name in linears:
            parent, _, last = name.rpartition(".")
            parts = (name, *(f"{parent}.{other}" for other in others))
            if last == first and all(part in linears for part in parts):
                yield f"{parent}.{joined}", parts
