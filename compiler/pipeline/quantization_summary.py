"""What a compile says about its quantized linears: a record for each, and sizes counted from what was written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.dataflow import evaluate
from optc.compiler.analysis.linears import Linear, linear_sites, weight_calls
from optc.compiler.formats.weight_format import weight_format
from optc.compiler.ir.contract import Contract
from optc.compiler.ir.lazy_weights import materialized
from optc.compiler.ir.program import Program
from optc.compiler.ir.row_blocks import row_blocks
from optc.compiler.rewriting.quantization_record import LinearRecord

IDEAL = (
    "bits + 16 / group_size (nvfp4: 8), and bits / group_size more with zero points; a whole row is one group at size 0"
)


def measured_records(before: Program, after: Program) -> tuple[LinearRecord, ...]:
    """A record for each weight that `after` holds as codes and `before` does not, from the tensors alone.

    For passes that give no records of their own: error on calibration inputs and times stay unknown.
    """
    old = before.contract.quantization
    sites = {_codes_name(before, site): site for site in linear_sites(before) if site.placeholder is not None}
    found: dict[str, LinearRecord] = {}
    for node in weight_calls(after):
        name = after.weight_of(node.args[0])
        entry = after.contract.quantization.get(name or "")
        if name is None or entry is None or name in old or name in found or name not in sites:
            continue
        values, scale = _value(after, node), _value(after, node.args[1])
        label, weight = _weight(before, sites[name])
        found[name] = linear_record(
            label,
            weight,
            values,
            scale,
            method=entry.method,
            format=entry.format,
            bits=entry.bits,
            group_size=entry.group_size,
            symmetric=entry.symmetric,
        )
    return tuple(found.values())


def _value(program: Program, node: Node) -> Tensor:
    """The value of what is computed from weights alone."""
    weights: dict[Node, Tensor] = {}
    pending = [node]
    while pending:
        current = pending.pop()
        name = program.weight_of(current)
        if name is not None:
            weights[current] = program.weight(name)
        assert name is not None or current.op == "call_function", f"{node.name} reads the input {current.name}"
        pending += current.all_input_nodes
    value: Tensor = evaluate(node, weights)
    return value


def _codes_name(program: Program, site: Linear) -> str:
    """What the codes of a linear are called: after its weight, with the expert's number for a stacked one."""
    name = program.weight_of(site.placeholder)
    return f"{name}_codes" if site.index is None else f"{name}_{site.index}_codes"


def _weight(program: Program, site: Linear) -> tuple[str, Tensor]:
    """The label of a linear's weight, and the weight as [N, K]."""
    name = program.weight_of(site.placeholder)
    assert name is not None
    weight = program.weight(name).detach()
    if site.index is not None:
        name, weight = f"{name}[{site.index}]", weight[site.index]
    weight = materialized(weight)
    return name, weight.t() if site.transposed else weight


def summarize(contract: Contract, records: Sequence[LinearRecord], tensor_bytes: Mapping[str, int]) -> dict[str, Any]:
    """The manifest's summary of a quantization; empty without one.

    Args:
        contract: of the program that was exported.
        records: one per rounded weight.
        tensor_bytes: bytes of each tensor in the written files, by the program's names.

    Returns:
        method, bits, group_size, symmetric, linears (products that read codes, merged ones once), and, where the
        sizes are known: parameters, bytes (codes, scales and zero points as written), bits_per_parameter, ideal_bits
        (see `IDEAL`, the mean over parameters), ratio_to_ideal, ratio_to_bf16.
    """
    rows = list(contract.quantization.values())
    if not rows:
        return {}
    methods = list(dict.fromkeys(row.method for row in rows))
    summary: dict[str, Any] = {
        "method": "+".join(methods),
        "bits": sorted({row.bits for row in rows}),
        "group_size": sorted({row.group_size for row in rows}),
        "symmetric": all(row.symmetric for row in rows),
        "linears": len(rows),
    }
    parameters = sum(row.shape[0] * row.shape[1] for row in records)
    written = sum(tensor_bytes[name] for name in _tensors(contract, tensor_bytes))
    if parameters and written:
        ideal = sum(row.shape[0] * row.shape[1] * ideal_bits(row) for row in records) / parameters
        bits = 8 * written / parameters
        summary |= {
            "parameters": parameters,
            "bytes": written,
            "bits_per_parameter": round(bits, 4),
            "ideal_bits": round(ideal, 4),
            "ideal": IDEAL,
            "ratio_to_ideal": round(bits / ideal, 4),
            "ratio_to_bf16": round(bits / 16, 4),
        }
    return summary


def ideal_bits(record: LinearRecord) -> float:
    """Bits per parameter of perfectly packed codes with 16-bit scales; see `IDEAL`."""
    size = record.group_size or record.shape[1]
    return weight_format(record.format).ideal_bits(record.bits, size, symmetric=record.symmetric)


def _tensors(contract: Contract, tensor_bytes: Mapping[str, int]) -> Iterator[str]:
    """The written tensors of quantized weights: those called as the codes are, up to the last underscore."""
    stems = tuple(f"{name.rpartition('_')[0]}_" for name in contract.quantization)
    return (name for name in tensor_bytes if name.startswith(stems))


def quantized_linears(passes: Sequence[Any]) -> tuple[LinearRecord, ...]:
    """The records of all passes of a manifest, the last one for each weight."""
    table = {row.name: row for record in passes for row in record.linears}
    return tuple(table.values())


def finite(value: float | None) -> float | None:
    """None for what JSON cannot hold; a manifest with NaN in it could not be read back."""
    return value if value is not None and math.isfinite(value) else None


def _squares(weight: Tensor, values: Tensor) -> tuple[float, float]:
    """Squared norms of a weight [N, K] and of what `values` are off by, a block of rows at a time."""
    size = gap = 0.0
    whole = weight.device.type != "cpu" or not weight.numel()
    blocks = [(0, len(weight))] if whole else row_blocks(len(weight), weight[0].numel())
    for begin, end in blocks:
        rows = weight[begin:end].double()
        size += float(rows.square().sum())
        gap += float(rows.sub_(values[begin:end]).square_().sum())
    return size, gap


def linear_record(
    name: str,
    weight: Tensor,
    values: Tensor,
    scale: Tensor,
    *,
    method: str,
    bits: int,
    group_size: int,
    symmetric: bool,
    format: str = "int",
    error_rtn: float | None = None,
    error: float | None = None,
    clip: float = 1.0,
    damping: float | None = None,
    tokens: int = 0,
    seconds: float = 0.0,
    note: str = "",
) -> LinearRecord:
    """A record with what can be computed from the tensors.

    Args:
        weight, values: [N, K], before and after rounding.
        scale: [N, G].
    """
    size, gap = _squares(materialized(weight.detach()), materialized(values.detach()))
    return LinearRecord(
        name=name,
        shape=(int(weight.shape[0]), int(weight.shape[1])),
        method=method,
        format=format,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        weight_error=gap / size if size else 0.0,
        scale_min=float(scale.float().min()),
        scale_max=float(scale.float().max()),
        error_rtn=finite(error_rtn),
        error=finite(error),
        clip=clip,
        damping=damping,
        tokens=tokens,
        seconds=round(seconds, 3),
        note=note,
    )
