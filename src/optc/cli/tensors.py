"""run, eval and bench of artifacts that take tensors: encoders and plain modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from optc.cli.common import emit, read_text, say
from optc.cli.session_options import SessionOptions, save_figures
from optc.compiler.artifact.folder import read_manifest
from optc.compiler.artifact.manifest import ProgramEntry
from optc.compiler.diagnostics import InputError, UsageError, os_errors
from optc.compiler.model_folder.config_file import CONFIG, read_json
from optc.compiler.model_folder.pictures import class_names
from optc.progress import part

if TYPE_CHECKING:
    from optc.cli.bench import BenchOptions
    from optc.cli.evaluate import EvalOptions
    from optc.cli.run import RunOptions
    from optc.runtime.measuring.tensors import Batch
    from optc.runtime.sessions.tensor_model import TensorModel

Inputs = Annotated[
    Path,
    Meta(
        description="Of a model that takes tensors: .npz with arrays by input, .npy, of a model of pictures .png, .jpg, .webp or "
        ".bmp, or a folder of them."
    ),
]
"""The type of a field that names inputs of an encoder or a module."""

_SHOWN = 8
"""Numbers of an output that are printed."""

_LIKELIEST = 5
"""Classes of an answer that are named; of a token or an object the first alone."""

_TOGETHER = 32
"""Texts of a batch that is evaluated: a file may have many."""


def takes_tensors(artifact: Path) -> bool:
    """Whether an artifact is that of an encoder or a module.

    Raises:
        OptcError: there is no readable manifest.
    """
    return read_manifest(artifact).contract.kind != "decoder"


def refuse_others(
    options: msgspec.Struct, allowed: Sequence[str], on: str = "on a model that does not generate text"
) -> None:
    """Refuse flags that have no effect on what is done.

    Raises:
        UsageError: names the first.
    """
    for field in msgspec.structs.fields(options):
        if field.name not in allowed and getattr(options, field.name) != field.default:
            raise UsageError(
                f"--{field.name.replace('_', '-')} has no effect {on}",
                remedy="leave it out",
            )


def refuse_inputs(options: Any, artifact: Path) -> None:
    """Refuse --inputs for a model that generates text.

    Raises:
        UsageError: it was given.
    """
    for name in ("inputs", "save_outputs"):
        if getattr(options, name, None) is not None:
            raise UsageError(
                f"--{name.replace('_', '-')} has no effect on a model that generates text",
                where=str(artifact),
                remedy="leave it out",
            )


def reads_sounds(artifact: Path) -> bool:
    """Whether a model's encoder reads features of sounds.

    Raises:
        OptcError: there is no readable manifest.
    """
    return _sounds(artifact) is not None


def _sounds(artifact: Path) -> ProgramEntry | None:
    """The encoder of a model that reads sounds; None of another model."""
    entry = read_manifest(artifact).programs.get("encoder")
    return entry if entry is not None and entry.contract.input_index("input_ids") is None else None


def read_sounds(artifact: Path, options: RunOptions) -> list[Any] | None:
    """Features of the sounds that a model's encoder reads, one array each; None of a model that reads text.

    Raises:
        UsageError: a prompt, or no inputs. InputError: a file that holds no features, such as one of audio.
    """
    entry = _sounds(artifact)
    if entry is None:
        return None
    (spec,) = entry.contract.inputs
    how = f"--inputs FILE.npz with {spec.name} {list(spec.dims)}, as transformers' feature extractor of the model makes it"
    if options.prompt or options.prompt_tokens or options.inputs is None:
        raise UsageError("the model reads sounds, not text", where=str(artifact), remedy=f"give {how}")
    if options.save_outputs is not None:
        raise UsageError("--save-outputs has no effect on a model that generates text", remedy="leave it out")
    if not options.inputs.is_dir() and options.inputs.suffix not in (".npz", ".npy"):
        raise InputError("optc does not read audio", where=str(options.inputs), remedy=f"give {how}")
    from optc.runtime.measuring.tensors import read_batches

    return [row for batch in read_batches(options.inputs, entry.contract) for row in batch.inputs[spec.name]]


def load_for(artifact: Path, options: SessionOptions) -> TensorModel:
    from optc.runtime.sessions.load import load_tensors

    return load_tensors(artifact, threads=options.threads, trust=options.trust)


def text_lines(path: Path) -> list[str]:
    """The texts of a file, a line each; empty lines are none.

    Raises:
        InputError: it cannot be read.
    """
    return [line for line in read_text(path).splitlines() if line.strip()]


def _batches(
    model: TensorModel, artifact: Path, inputs: Path | None, texts: Sequence[str], *, together: int | None = None
) -> list[Batch]:
    """What the model of an artifact is called with; `together` texts make a batch, None takes all."""
    from optc.runtime.measuring.tensors import Batch, read_batches

    contract = model.manifest.contract
    if (inputs is None) == (not texts):
        takes_text = any(spec.role == "input_ids" for spec in contract.inputs)
        raise UsageError(
            "give either inputs or texts, not both" if texts else "there are no inputs",
            remedy=f"--inputs FILE.npz with {', '.join(model.inputs)}" + (", or a text" if takes_text else ""),
        )
    if inputs is not None:
        return read_batches(inputs, contract, artifact)
    size = together or len(texts)
    return [
        Batch("texts" if size >= len(texts) else f"texts from {start}", model.encode(texts[start : start + size]))
        for start in range(0, len(texts), size)
    ]


# -- run ------------------------------------------------------------------------------------------


def run_tensors(artifact: Path, as_json: bool, options: RunOptions) -> None:
    """Print what a model computes, and write it where that was asked for."""
    refuse_others(options, ("prompt", "inputs", "save_outputs", "threads", "trust"))
    model = load_for(artifact, options)
    batches = _batches(model, artifact, options.inputs, options.prompt)
    outputs = [model.run(batch.inputs) for batch in batches]
    if options.save_outputs is not None:
        _write(options.save_outputs, batches, outputs)
    roles = {spec.name: spec.role for spec in model.manifest.contract.outputs}
    names = class_names(read_json(artifact / CONFIG)) if (artifact / CONFIG).is_file() else {}
    rows = [
        {
            "name": name,
            "dtype": str(array.dtype),
            "shape": list(array.shape),
            "values": array.tolist(),
            "inputs": batch.name,
            **({"classes": likely_classes(array, names)} if roles[name] == "classes" else {}),
        }
        for batch, found in zip(batches, outputs, strict=True)
        for name, array in found.items()
    ]
    emit({"outputs": rows}, as_json, _show_outputs)


def likely_classes(logits: Any, names: Mapping[int, str]) -> list[list[dict[str, Any]]]:
    """The most likely classes of each row of logits [..., classes], with their shares of a softmax.

    Args:
        names: of classes; the others are called by their numbers.
    """
    import numpy as np

    flat = np.asarray(logits, np.float64).reshape(-1, np.shape(logits)[-1])
    shares = np.exp(flat - flat.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    best = np.argsort(-shares, axis=-1, kind="stable")[:, : _LIKELIEST if np.ndim(logits) == 2 else 1]
    return [
        [{"label": names.get(int(index), str(index)), "score": float(row[index])} for index in chosen]
        for row, chosen in zip(shares, best, strict=True)
    ]


def _write(path: Path, batches: Sequence[Batch], outputs: Sequence[dict[str, Any]]) -> None:
    """Outputs under their names; of several batches each under `name of its file/output`. Names are without their endings
    where that tells them apart."""
    import numpy as np

    if path.suffix != ".npz":
        raise UsageError(f"--save-outputs {path} is no .npz", remedy="name a file that ends in .npz")
    stems = [Path(batch.name).stem for batch in batches]
    places = stems if len(set(stems)) == len(stems) else [batch.name for batch in batches]
    named = {
        name if len(batches) == 1 else f"{place}/{name}": array
        for place, found in zip(places, outputs, strict=True)
        for name, array in found.items()
    }
    with os_errors("writing outputs", str(path)):
        np.savez(path, **named)


def _show_outputs(result: dict[str, Any]) -> None:
    import numpy as np

    for row in result["outputs"]:
        flat = np.asarray(row["values"]).ravel()
        shown = ", ".join(
            f"{value:.6g}" if isinstance(value, float) else str(value) for value in flat[:_SHOWN].tolist()
        )
        more = ", ..." if flat.size > _SHOWN else ""
        say(f"{row['inputs']}: {row['name']} {row['dtype']}{row['shape']}: {shown}{more}")
        for index, found in enumerate(row.get("classes", ())):
            place = f"[{index}] " if len(row["classes"]) > 1 else ""
            say(f"  {place}" + ", ".join(f"{item['label']} {item['score']:.4f}" for item in found))


# -- eval -----------------------------------------------------------------------------------------


def evaluate_tensors(artifacts: Sequence[Path], options: EvalOptions) -> dict[str, Any]:
    """Artifacts beside their source, or beside the first of them, on the same inputs."""
    allowed = ("compare", "text", "inputs", "source", "no_reference", "threads", "trust", "save")
    refuse_others(options, allowed)
    models = [load_for(path, options) for path in artifacts]
    rows = _evaluation(
        [*zip(map(str, artifacts), models, strict=True)],
        options.inputs,
        options.text,
        options.source,
        options.no_reference,
    )
    if options.save:
        for path, row in zip(artifacts, rows, strict=True):
            save_figures(path, quality={key: value for key, value in row.items() if key != "artifact"})
    if options.compare:
        return {"results": rows}
    return {key: value for key, value in rows[0].items() if key != "artifact"}


def _evaluation(
    named: Sequence[tuple[str, TensorModel]],
    inputs: Path | None,
    text: Path | None,
    source: Path | None,
    no_reference: bool,
) -> list[dict[str, Any]]:
    """A row for each artifact: its figures beside the source, or where there is none beside the first artifact.

    Raises:
        UsageError: nothing to compare with. InputError: as the inputs, or artifacts of other inputs and outputs.
    """
    from optc.runtime.measuring import tensors

    first = named[0][1]
    for path, model in named[1:]:
        if (model.inputs, model.outputs) != (first.inputs, first.outputs):
            raise InputError(
                "the artifacts have other inputs or outputs", where=path, remedy="compare those of one model"
            )
    texts = [] if text is None else text_lines(text)
    batches = _batches(first, Path(named[0][0]), inputs, texts, together=_TOGETHER)
    contract = first.manifest.contract
    from_folder = contract.kind == "encoder" or bool(first.manifest.source.path)
    reference, beside = None, None
    if not no_reference:
        if from_folder:
            reference = tensors.source_run(first.manifest, source)
            beside = None if reference is None else str(source or first.manifest.source.path)
        elif source is not None:
            raise UsageError(
                "--source is a model folder, which a plain module has not", remedy="add --compare and an artifact"
            )
        if reference is None and len(named) > 1:
            reference, beside = first.run, named[0][0]
    labelled = all(batch.labels is not None for batch in batches)
    if reference is None and not labelled:
        raise UsageError(
            "there is nothing to compare with",
            remedy=f"add --compare and another artifact, or '{tensors.LABELS}' to the inputs"
            + (", or name the model by --source" if from_folder else ""),
        )
    with part("batches", total=len(batches)) as update:
        figures = tensors.evaluate_tensors(
            [model.run for _, model in named],
            contract,
            batches,
            reference,
            on_batch=lambda done, total: update(done, f"{done} of {total}"),
        )
    return [{"artifact": path, "beside": beside, **row} for (path, _), row in zip(named, figures, strict=True)]


def show_quality(result: dict[str, Any]) -> None:
    for row in result.get("results", [result]):
        figures = ", ".join(
            f"{key.replace('_', ' ')} {value:.4g}"
            for key, value in row.items()
            if isinstance(value, float) or (key in ("rows", "batches") and value is not None)
        )
        name = f"{row['artifact']}: " if "artifact" in row else ""
        say(f"{name}{figures}" + (f" (beside {row['beside']})" if row["beside"] else ""))


# -- bench ----------------------------------------------------------------------------------------


def bench_tensors(artifact: Path, options: BenchOptions) -> dict[str, Any]:
    """Time calls of a model on given inputs, or on random ones."""
    refuse_others(options, ("inputs", "batch", "prompt_length", "samples", "warmup", "threads", "trust", "save"))
    from optc.runtime.measuring.benchmark import environment
    from optc.runtime.measuring.tensors import bench_tensors, random_inputs
    from optc.runtime.sessions.session import default_threads

    model = load_for(artifact, options)
    if options.inputs is not None:
        if options.prompt_length or options.batch != 1:
            raise UsageError("--batch and --prompt-length have no effect with --inputs", remedy="leave them out")
        inputs = _batches(model, artifact, options.inputs, [])[0].inputs
    else:
        lengths = options.prompt_length or (min(128, model.manifest.contract.model.context_length or 128),)
        if len(lengths) > 1:
            raise UsageError("give one --prompt-length", remedy="run the command once for each")
        inputs = random_inputs(model.manifest.contract, options.batch, lengths[0])
    with part("samples") as update:
        result = bench_tensors(
            model,
            inputs,
            samples=options.samples,
            warmup=1 if options.warmup is None else options.warmup,
            on_sample=lambda done, total: update(done, f"{done} of {total}"),
        )
    threads = options.threads or default_threads()
    result |= {"weight_bytes": model.manifest.weight_bytes, "environment": environment(threads)}
    if options.save:
        save_figures(artifact, speed=result)
    return result


def show_speed(result: dict[str, Any]) -> None:
    shapes = ", ".join(f"{name} {kind}{size}" for name, (kind, *size) in result["inputs"].items())
    say(f"{shapes}, {result['samples']} samples")
    for name, unit in (("latency_ms", "ms"), ("rows_per_s", "rows/s")):
        row = result[name]
        say(f"  {name.split('_')[0]:8} {row['median']:10.3f}  [{row['ci95'][0]:.3f}, {row['ci95'][1]:.3f}] {unit}")
    say(f"weights  {result['weight_bytes'] / 1e6:.2f} MB, peak RSS {result['peak_rss_bytes'] / 1e6:.0f} MB")
