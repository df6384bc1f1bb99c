"""The bytes of what an exporter wrote, by parts of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from optc.compiler.analysis.weight_parts import WeightParts, part_of
from optc.compiler.artifact.sizes import Sizes
from optc.compiler.ir.contract import Contract
from optc.compiler.ir.program import Program
from optc.compiler.model_folder.checkpoint import CheckpointInfo


def written_sizes(
    parts: WeightParts,
    contract: Contract,
    tensor_bytes: Mapping[str, int],
    total: int,
    source: int | None,
    source_bytes: Mapping[str, int] | None = None,
) -> Sizes:
    """Sizes counted from what was written.

    Args:
        parts: of the captured program.
        contract: of the program that was exported.
        tensor_bytes: bytes of each written tensor, by the program's names.
        total: bytes of all weights as written; what no tensor accounts for is `rest`.
        source: bytes of the source's weight files, where there are some.
        source_bytes: see the function of this name.
    """
    stems = {f"{name.rpartition('_')[0]}_": name for name in contract.quantization}
    found: Counter[str] = Counter()
    for name, size in tensor_bytes.items():
        stem = next((item for item in stems if name.startswith(item)), None)
        found[_part(parts, contract, name, stem, stems)] += size
    known = sum(found.values())
    before = _before(parts, source_bytes or {})
    return Sizes(
        source=source, before=before, tied=parts.tied, **{**found, "rest": found["rest"] + max(total - known, 0)}
    )


def source_bytes(parts: WeightParts, programs: Iterable[Program], info: CheckpointInfo) -> dict[str, int]:
    """Bytes of each tensor of a model folder, by the name that the captured programs read it under.

    A table that is tied to the head has two names: the programs read one, and the folder may have the other. That is
    the tensor of its shape which is read under no name.
    """
    found = {name: tensor.nbytes for name, tensor in info.tensors.items()}
    read = parts.embedding | parts.head | parts.linears
    for program in programs:
        for name, weight in program.weights():
            sources = program.contract.sources.get(name, (name,))
            missing = [source for source in sources if source in read and source not in found]
            others = [item for item in found.keys() - read if info.tensors[item].shape == tuple(weight.shape)]
            if len(sources) == len(missing) == len(others) == 1:
                found[missing[0]] = found.pop(others[0])
    return found


def _before(parts: WeightParts, source_bytes: Mapping[str, int]) -> dict[str, int]:
    """The source's bytes by parts; empty where its files do not hold what the program reads."""
    if not parts.embedding | parts.head | parts.linears <= source_bytes.keys():
        return {}
    found: Counter[str] = Counter()
    for name, size in source_bytes.items():
        found[part_of(parts, {}, name)] += size
    return dict(found)


def _part(parts: WeightParts, contract: Contract, name: str, stem: str | None, stems: Mapping[str, str]) -> str:
    """The field of `Sizes` that a written tensor counts for."""
    if stem is None:
        return part_of(parts, contract.sources, name.removesuffix(".T"))
    suffix = name.removeprefix(stem)
    for start, part in (("scale", "scales"), ("zero", "zero_points")):
        if suffix.startswith(start):
            return part
    return part_of(parts, contract.sources, stems[stem])
