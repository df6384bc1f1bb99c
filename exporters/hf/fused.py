"""Linears that vLLM computes as one: it loads a folder only where they are quantized alike."""

from __future__ import annotations

from collections.abc import Sequence

from optc.compiler.diagnostics import TargetError
from optc.compiler.formats.layouts.joined import JOINED
from optc.exporters.hf.places import Quantized

FUSED = (*JOINED.values(), ("w1", "w3"))
"""Last names of linears of one module and one input that its models join, experts' too."""


def check_fused(quantized: Sequence[Quantized]) -> None:
    """Refuse linears that vLLM joins and that are quantized unlike each other.

    Raises:
        TargetError: names the two, and the patterns that would leave all of them alone.
    """
    schemes = {item.module: item.weight.scheme for item in quantized}
    for item in quantized:
        parent, _, last = item.module.rpartition(".")
        names = next((names for names in FUSED if last in names), ())
        for other in (f"{parent}.{name}" for name in names):
            if other in item.beside and schemes.get(other) != schemes[item.module]:
                raise TargetError(
                    f"vLLM computes {', '.join(names)} as one linear, and they are not quantized alike",
                    where=item.module,
                    why=f"{other} is quantized differently" if other in schemes else f"{other} is not quantized",
                    remedy=" ".join(f"--ignore {name}" for name in names) + ", or none of them",
                )
