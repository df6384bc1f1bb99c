"""`optc inspect`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import click
import msgspec
from msgspec import Meta

from optc.cli.common import emit, json_option, say
from optc.cli.options import struct_flags
from optc.compiler.artifact.drift_table import EMPTY, drift_table, pass_title
from optc.compiler.artifact.sizes import Sizes, group_text, megabytes
from optc.compiler.diagnostics import InputError, UsageError
from optc.compiler.target.options import ComputeType

_WORST = 5
_REASONS = 5


class InspectOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What is printed."""

    ir: Annotated[bool, Meta(description="Print the text IR: of a model as captured, of an artifact's last stage.")] = (
        False
    )
    stage: Annotated[str, Meta(description="With --ir on an artifact: this stage, by number or name.")] | None = None
    dtype: (
        Annotated[ComputeType, Meta(description="With --ir on a model: compute type.", extra={"default": "fp32"})]
        | None
    ) = None


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@struct_flags(InspectOptions)
@json_option
def inspect(path: Path, options: InspectOptions, as_json: bool) -> None:
    """Show what an artifact is (manifest, contract, passes with match counts and drift), or a model's IR.

    \b
    optc inspect out/fiction-onnx
    optc inspect examples/fiction-3m --ir
    optc inspect out/fiction-onnx --ir --stage fuse-norm
    """
    is_artifact = (path / "manifest.json").is_file()
    _refuse_idle(options, is_artifact)
    if is_artifact:
        _artifact(path, options.ir, options.stage, as_json)
    elif path.exists() and not options.ir:
        _model(path, as_json)
    else:
        from optc.api import capture
        from optc.compiler.ir.text import format_program

        text = format_program(capture(path, dtype=options.dtype or "fp32"))
        emit({"model": str(path), "ir": text}, as_json, lambda result: say(result["ir"]))


def _refuse_idle(options: InspectOptions, is_artifact: bool) -> None:
    """Refuse options that would do nothing."""
    if options.stage is not None and not (options.ir and is_artifact):
        raise UsageError("--stage has no effect here", remedy="use it with --ir on an artifact")
    if options.dtype is not None and (is_artifact or not options.ir):
        raise UsageError("--dtype has no effect here", remedy="use it with --ir on a model folder")


def _artifact(path: Path, as_ir: bool, stage: str | None, as_json: bool) -> None:
    from optc.cli.diff import find_stage, read_stage
    from optc.compiler.artifact.folder import verify

    manifest = verify(path)
    if as_ir:
        files = sorted((path / "ir").glob("*.txt"))
        if not files and stage is None:
            raise InputError(
                "the artifact holds no IR",
                where=str(path),
                remedy="inspect the artifact that it was made of: bundles leave the IR out",
            )
        file = find_stage(path, stage) if stage else files[-1]
        emit({"stage": file.stem, "ir": read_stage(file)}, as_json, lambda result: say(result["ir"]))
        return
    emit(msgspec.to_builtins(manifest), as_json, _show)


def _model(path: Path, as_json: bool) -> None:
    from optc.compiler.model_folder.checkpoint import check_folder

    info = check_folder(path)
    rows = {name: {"file": t.file, "dtype": t.dtype, "shape": list(t.shape)} for name, t in info.tensors.items()}
    result = {"model": str(path), "config": info.config, "tokenizer": info.has_tokenizer, "tensors": rows}
    emit(result, as_json, _show_model)


def _show_model(result: dict[str, Any]) -> None:
    config = result["config"]
    say(f"{result['model']}: {', '.join(config.get('architectures', []))} ({config.get('model_type')})")
    say(f"tokenizer: {'yes' if result['tokenizer'] else 'none (works on token ids)'}")
    for name, row in result["tensors"].items():
        say(f"  {name}  {row['dtype']}{row['shape']}  {row['file']}")


def _show(manifest: dict[str, Any]) -> None:
    contract = manifest["programs"]["model"]["contract"]
    source = manifest["source"]
    say(
        f"{manifest['target']} artifact ({manifest['engine']}, {manifest['dtype']}), optc {manifest['optc_version']}, {manifest['created']}"
    )
    say(f"source: {source['path'] or 'a module in memory'} ({source['parameters'] / 1e6:.1f} M parameters)")
    if manifest["command"]:
        say(f"command: {manifest['command']}")
    say(f"weights: {_sizes(manifest)}")
    say(f"quantization: {_quantization(manifest['quantization'])}")
    say(f"needs: {', '.join(f'{key} {value}' for key, value in manifest['needs'].items())}")
    for role, entry in sorted(manifest["programs"].items()):
        facts = entry["engine_info"]
        say("inputs:" if role == "model" else f"inputs of the {role}, {facts.get('model') or facts['graph']}:")
        _show_inputs(entry["contract"]["inputs"])
    for line in _attention(contract):
        say(line)
    if contract["embedding"] is not None:
        say(_embedding(contract["embedding"]))
    say("\n".join(_capture(manifest["capture"])))
    for role, entry in sorted(manifest["programs"].items()):
        if entry["source"] is not None:
            say("\n".join(_of_other_model(role, entry)))
    say("passes:")
    titles, cells = drift_table(manifest["passes"])
    for row, values in zip(manifest["passes"], cells, strict=True):
        drift = "".join(f", {title} {value}" for title, value in zip(titles, values, strict=True) if value != EMPTY)
        say(
            f"  {pass_title(row['name'], row['program'])}: matched {row['matched']} of {row['candidates']}{drift}, {row['seconds']:.2f} s"
        )
        for line in (*row["notes"], *reasons(row["misses"])):
            say(f"    {line}")
    worst = _worst(manifest)
    if manifest["limits"]:
        say(f"limits given: {', '.join(f'{flag} {limit}' for flag, limit in manifest['limits'].items())}")
    say(_opened(manifest["opened"]))
    if worst:
        say("largest errors of quantized weights:")
        say("\n".join(worst))
    say("files:")
    for entry in manifest["files"]:
        say(f"  {entry['path']}  {entry['size']}  {entry['sha256'][:12]}")
    for title in ("quality", "speed"):
        if manifest[title]:
            say(f"{title}: {manifest[title]}")


def _show_inputs(inputs: list[dict[str, Any]]) -> None:
    for spec in inputs[:4]:
        say(f"  {spec['name']}: {spec['dtype']}[{', '.join(map(str, spec['dims']))}] ({spec['role']})")
    if len(inputs) > 4:
        say(f"  and {len(inputs) - 4} more")


def reasons(misses: list[str]) -> list[str]:
    """Why sites were left alone, each reason once with their number, the commonest first."""
    counts = Counter(miss.partition(": ")[2] for miss in misses).most_common()
    lines = [f"left alone, {count} x: {reason}" for reason, count in counts[:_REASONS]]
    more = len(counts) - len(lines)
    return [*lines, f"and {more} more reasons; --json lists all"] if more else lines


def _capture(row: dict[str, Any] | None) -> list[str]:
    """How the capture was proved, a line per comparison and note."""
    if row is None or not row["proved"]:
        return ["capture: not proved", *(f"  {note}" for note in (row or {}).get("notes", ()))]
    lines = [f"capture: proved against {row['reference']}, {row['seconds']:.2f} s: {'; '.join(row['inputs'])}"]
    for item in row["figures"]:
        kl = "" if item["kl"] is None else f", KL {item['kl']:.1e}, top-1 {item['top1']:.3f}"
        lines.append(
            f"  {item['dtype']}: max |diff| {item['max_abs_diff']:.1e} on outputs of up to {item['scale']:.1f}, "
            f"relative {item['relative']:.1e}{kl}"
        )
    return [*lines, *(f"  {note}" for note in row["notes"])]


def _of_other_model(role: str, entry: dict[str, Any]) -> list[str]:
    """A program of another model than the artifact's: where it comes from, and how it was proved."""
    source = entry["source"]
    lines = [f"source: {source['path']} ({source['parameters'] / 1e6:.1f} M parameters)", *_capture(entry["capture"])]
    lines += [_opened(entry["opened"])] if entry["opened"] else []
    return [f"{role}:", *(f"  {line}" for line in lines)]


def _opened(row: dict[str, Any] | None) -> str:
    """What the written file computed in its engine."""
    if row is None or not row["opened"]:
        return f"written file: not opened: {row['why'] if row else 'made by an optc that did not'}"
    if row["scale"] is None:  # read, not run
        return f"written file: {row['why']}, {row['seconds']:.2f} s"
    kl = "" if row["kl"] is None else f", KL {row['kl']:.1e}, top-1 {row['top1']:.3f}"
    note = f" ({row['why']})" if row["why"] else ""
    limit = "" if row["limit"] is None else f" of {row['limit']:.1e}"
    return (
        f"written file: opened in {row['engine']} {row['version']}{note}: max |diff| {row['max_abs_diff']:.1e} on outputs "
        f"of up to {row['scale']:.1f}, relative {row['relative']:.1e}{limit}{kl}, {row['seconds']:.2f} s"
    )


def _embedding(facts: dict[str, Any]) -> str:
    parts = [f"embeddings: {facts['size']} numbers", f"pooling {' and '.join(facts['pooling'])}"]
    parts += ["length 1"] if facts["normalized"] else []
    parts += ["lower case"] if facts["lower_case"] else []
    default = facts["default_prompt"]
    names = [f"{name} (default)" if name == default else name for name in facts["prompts"]]
    return ", ".join(parts) + (f"; prompts: {', '.join(names)}" if names else "")


def _attention(contract: dict[str, Any]) -> list[str]:
    """The KV cache of a decoder, and how many attention layers there are; nothing of a program without any."""
    layers = f"{len(contract['layers'])} attention layers"
    if contract["kind"] != "decoder":
        return [layers] if contract["layers"] else []
    cache = contract["kv_cache"]
    return [f"KV cache: {cache['kind']}{' in place' if cache['in_place'] else ''}; {layers}"]


def _sizes(manifest: dict[str, Any]) -> str:
    """The size of the weights by parts, and of the whole folder."""
    row = manifest["sizes"]
    weights = str(Sizes.read(row)) if row else megabytes(manifest["weight_bytes"])
    return f"{weights}; all files {megabytes(sum(entry['size'] for entry in manifest['files']))}"


def _quantization(row: dict[str, Any]) -> str:
    if not row:
        return "none"
    bits = "/".join(map(str, row["bits"]))
    kind = "symmetric" if row["symmetric"] else "asymmetric"
    text = f"{row['method']}, {bits} bits, {group_text(row['group_size'])}, {kind}, {row['linears']} weights"
    if "bits_per_parameter" not in row:
        return text
    return f"{text}; {row['bits_per_parameter']:.3f} bits per parameter, {row['ratio_to_ideal']:.3f} x ideal"


def _worst(manifest: dict[str, Any]) -> list[str]:
    """The linears with the largest errors, one line each; the report and --json have all."""
    rows = {row["name"]: row for record in manifest["passes"] for row in record["linears"]}
    measured = any(row["error"] is not None for row in rows.values())
    key = "error" if measured else "weight_error"
    known = [row for row in rows.values() if row[key] is not None]
    worst = sorted(known, key=lambda row: row[key], reverse=True)[:_WORST]
    title = "output error" if measured else "weight error"
    before = {
        row["name"]: f" (round to nearest {row['error_rtn']:.2e})" for row in worst if row["error_rtn"] is not None
    }
    return [f"  {row['name']}: {title} {row[key]:.2e}{before.get(row['name'], '')}" for row in worst]
