"""The bytes of what an exporter wrote, by parts of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from optc.compiler.analysis.weight_parts import WeightParts, part_of
from optc.compiler.artifact.sizes import Sizes
from optc.compiler.ir.contract import Contract


def written_sizes(
    parts: WeightParts, contract: Contract, tensor_bytes: Mapping[str, int], total: int, source: int | None
) -> Sizes:
    """Sizes counted from what was written.

    Args:
        parts: of the captured program.
        contract: of the program that was exported.
        tensor_bytes: bytes of each written tensor, by the program's names.
        total: bytes of all weights as written; what no tensor accounts for is `rest`.
        source: bytes of the source's weight files, where there are some.
    """
    stems = {f"{name.rpartition('_')[0]}_": name for name in contract.quantization}
    found: Counter[str] = Counter()
    for name, size in tensor_bytes.items():
        stem = next((item for item in stems if name.startswith(item)), None)
        found[_part(parts, contract, name, stem, stems)] += size
    known = sum(found.values())
    return Sizes(source=source, tied=parts.tied, **{**found, "rest": found["rest"] + max(total - known, 0)})


def _part(parts: WeightParts, contract: Contract, name: str, stem: str | None, stems: Mapping[str, str]) -> str:
    """The field of `Sizes` that a written tensor counts for."""
    if stem is None:
        return part_of(parts, contract.sources, name.removesuffix(".T"))
    suffix = name.removeprefix(stem)
    for start, part in (("scale", "scales"), ("zero", "zero_points")):
        if suffix.startswith(start):
            return part
    return part_of(parts, contract.sources, stems[stem])
