"""report.html: what a compile did, for people. Self-contained: no network, no fonts; one small script sorts a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from optc.compiler.artifact.drift_table import drift_table, pass_title, program_title
from optc.compiler.artifact.manifest import Manifest
from optc.compiler.artifact.sizes import group_text
from optc.compiler.ir.contract import Contract
from optc.exporters.reports.charts import Card
from optc.exporters.reports.drift import cumulative_charts, layer_chart, measure_text
from optc.exporters.reports.figures import plain_text
from optc.exporters.reports.numbers import count, number, percent, seconds, size
from optc.exporters.reports.page import write_page
from optc.exporters.reports.quality import quality_section
from optc.exporters.reports.quantization import quantization_section
from optc.exporters.reports.sizes import size_section
from optc.exporters.reports.speed import speed_section

_LONG = 40  # entries of a table's value beyond which only their number is shown
_SHOWN_ELSEWHERE = ("inputs", "outputs", "constants")
_TEXTS = 400  # characters of a value that are shown


def write_report(directory: Path, manifest: Manifest) -> None:
    """Write `report.html` into an artifact folder, from its manifest and its `ir/` texts.

    Raises:
        ResourceError, InputError: the file cannot be written.
    """
    titles, cells = drift_table(msgspec.to_builtins(manifest.passes), measure_text)
    rows = list(zip(manifest.passes, cells, strict=True))
    write_page(
        directory,
        "optc.exporters.reports",
        "report.html",
        m=manifest,
        contract=manifest.contract,
        title=_title(manifest),
        cards=list(_cards(manifest)),
        sizes=size_section(manifest.sizes, f"{manifest.target} artifact"),
        cumulative=cumulative_charts(manifest.passes, *_outcomes(manifest.contract)),
        layers=layer_chart(manifest.passes),
        lossy=any(row.lossy and row.matched for row in manifest.passes),
        reads_sounds=_reads_sounds(manifest),
        drift_titles=titles,
        passes=[(row, pass_title(row.name, row.program), found) for row, found in rows if row.matched],
        idle=[(row, pass_title(row.name, row.program)) for row, _ in rows if not row.matched],
        remarks=[(row, pass_title(row.name, row.program)) for row, _ in rows if row.notes or row.misses],
        quantized=quantization_section(manifest),
        quality=quality_section(manifest.quality),
        speed=speed_section(manifest.speed),
        engine=list(_engine_rows(manifest)),
        stages=list(_stages(directory)),
        capture_kl=manifest.capture is not None and any(row.kl is not None for row in manifest.capture.figures),
    )


def _title(manifest: Manifest) -> str:
    facts = manifest.contract.model
    name = Path(manifest.source.path).name or facts.architecture
    if not name and manifest.capture is not None and manifest.capture.reference.isidentifier():
        name = manifest.capture.reference  # the module's class
    return f"{name or 'Module'} for {manifest.target}"


def _cards(manifest: Manifest) -> Iterator[Card]:
    """What the artifact is, in a few figures; what it does not have is not there."""
    contract, source, sizes = manifest.contract, manifest.source, manifest.sizes
    ratio = (
        "" if sizes is None or not sizes.ratio or not sizes.source else f"{sizes.ratio:.2f} x of {size(sizes.source)}"
    )
    yield Card(size(manifest.weight_bytes), "weights as written", ratio)
    if source.parameters:
        yield Card(count(source.parameters), "parameters", f"stored as {source.dtype}" if source.dtype else "")
    yield Card(manifest.dtype, "compute type", f"in {manifest.engine}, on {manifest.device}")
    if manifest.quantization:
        table = manifest.quantization
        bits = "/".join(map(str, table["bits"]))
        note = f"{group_text(table['group_size'])}, {table['linears']} weights"
        yield Card(f"{bits}-bit {table['method']}", "quantization", note)
    activations = sorted({row.activations for row in contract.quantization.values() if row.activations})
    if activations:
        yield Card(", ".join(activations), "activations", "rounded while it runs")
    yield from _attention_cards(manifest)
    if contract.embedding is not None:
        facts = contract.embedding
        note = f"{' and '.join(facts.pooling)} pooling" + (", of length 1" if facts.normalized else "")
        yield Card(f"{facts.size} numbers", "embedding of a text", note)
    yield from _cost_cards(manifest)
    times = ((name, manifest.seconds.get(name)) for name in ("capture", "passes", "export"))
    parts = ", ".join(f"{name} {seconds(value)}" for name, value in times if value)
    yield Card(seconds(manifest.seconds.get("total", 0.0)), "compile time", parts)


def _attention_cards(manifest: Manifest) -> Iterator[Card]:
    """The KV cache of a decoder that has one, and how many attention layers there are."""
    contract, encoder = manifest.contract, manifest.programs.get("encoder")
    layers = f"{len(contract.layers)} attention layer{'s' if len(contract.layers) > 1 else ''}"
    cache = contract.kv_cache
    if encoder is not None:
        yield Card("encoder and decoder", "programs", "keys and values of the encoder are made once per request")
    if (draft := manifest.programs.get("draft")) is not None and draft.source is not None:
        name = Path(draft.source.path).name
        yield Card(name, "draft model", f"{count(draft.source.parameters)} parameters; optc run --speculative draft")
    if contract.kind == "decoder" and cache.kind != "none":
        kind = cache.kind + (" in place" if cache.in_place else "")
        sizes = (
            f", blocks of {cache.block_size}"
            if cache.block_size
            else f", {cache.capacity} tokens"
            if cache.capacity
            else ""
        )
        yield Card(kind, "KV cache", (layers if contract.layers else "") + sizes)
    elif contract.layers:
        yield Card(str(len(contract.layers)), "attention layers")


def _cost_cards(manifest: Manifest) -> Iterator[Card]:
    """What all passes together cost, where one of them may change the numbers."""
    contract = manifest.contract
    last = {row.program: row for row in manifest.passes if row.since_capture is not None}
    for program, row in last.items():
        drift = row.since_capture
        assert drift is not None
        if not any(item.lossy and item.matched for item in manifest.passes if item.program == program):
            continue
        of = "" if len(last) == 1 else f" of the {program_title(program, last)}"
        if drift.kl is not None:
            outcome = _outcomes(contract)[1]
            same = "" if drift.top1_agreement is None else f"{percent(drift.top1_agreement)} same most likely {outcome}"
            yield Card(f"KL {number(drift.kl)}", f"lost in all{of}", same)
        elif drift.relative_error is not None:
            near = "" if drift.cosine is None else f"cosine {drift.cosine:.5f}"
            yield Card(number(drift.relative_error), f"relative error in all{of}", near)


def _reads_sounds(manifest: Manifest) -> bool:
    """Whether an encoder takes something else than tokens."""
    encoder = manifest.programs.get("encoder")
    return encoder is not None and encoder.contract.input_index("input_ids") is None


def _outcomes(contract: Contract) -> tuple[str, str]:
    """What the model gives a distribution for, and over what."""
    return ("answer", "class") if contract.outputs[0].role == "classes" else ("token", "token")


def _engine_rows(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Facts of the exporter, of each program, and what a host must have."""
    for role, entry in manifest.programs.items():
        before = "" if len(manifest.programs) == 1 else f"{program_title(role, manifest.programs)}: "
        for key, text in _rows(entry.engine_info):
            if key not in _SHOWN_ELSEWHERE:
                yield before + key, text
        if entry.source is not None:
            yield f"{before}source", entry.source.path
        if entry.capture is not None and entry.capture.proved:
            errors = ", ".join(number(row.relative, 2) for row in entry.capture.figures)
            yield f"{before}capture", f"proved against {entry.capture.reference}, relative {errors}"
        if entry.opened is not None and entry.opened.relative is not None:
            yield (
                f"{before}written file",
                f"opened in {entry.opened.engine}, relative {number(entry.opened.relative, 2)}",
            )
    for key, value in manifest.needs.items():
        yield f"needs {key}", plain_text(value if isinstance(value, str | list) else str(value))


def _rows(table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """A flat table for people: nested values as short JSON; what is empty is not there."""
    for key, value in table.items():
        if value is None or value in ("", (), [], {}):
            continue
        long = isinstance(value, list | tuple | dict) and len(value) > _LONG
        yield key.replace("_", " "), f"{len(value)} entries" if long else plain_text(value, _TEXTS)


def _stages(directory: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of each stage, an encoder's first and a draft model's last."""
    for place, before in (("ir/encoder", "encoder: "), ("ir", ""), ("ir/draft", "draft: ")):
        for path in sorted((directory / place).glob("*.txt")):
            yield before + path.stem, path.read_text(encoding="utf-8", errors="replace")
