"""What an artifact of an encoder or a plain module computes beside its source or another, and how fast."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from optc.compiler.artifact.manifest import Manifest
from optc.compiler.diagnostics import InputError, UsageError, foreign_errors
from optc.compiler.files import open_plain
from optc.compiler.ir.contract import Contract
from optc.runtime.carried.pt2_runner import check_unpacked
from optc.runtime.measuring.benchmark import median_rate, peak_rss_bytes
from optc.runtime.measuring.pictures import SUFFIXES, picture_reader
from optc.runtime.sessions.tensor_model import Array, TensorModel

LABELS = "labels"
"""Key of the right classes in an .npz of inputs."""

Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]
"""Inputs by name to outputs by name."""


@dataclass(frozen=True)
class Batch:
    """Inputs of one call, with the right class of each row where it is known."""

    name: str
    inputs: dict[str, Array]
    labels: Array | None = None


@dataclass
class _Sums:
    """What the batches of one artifact add up to."""

    outputs: list[list[Array]] = field(default_factory=list)
    right: int = 0
    labelled: int = 0


def read_batches(path: Path, contract: Contract, artifact: Path | None = None) -> list[Batch]:
    """Inputs from a file or a folder of files, each a batch of its own, in the order of their names.

    `.npz` holds the inputs under their names (and `labels`); `.npy` is the input of a model that has one. Nothing is
    unpickled. Pictures go through the processor of the artifact.

    Args:
        artifact: its folder; None takes no pictures.

    Raises:
        InputError: no such file, none of this kind in the folder, a damaged one, or one without an input.
    """
    kinds = (".npy", ".npz") if artifact is None else (".npy", ".npz", *SUFFIXES)
    files = sorted(item for item in path.iterdir() if item.suffix.lower() in kinds) if path.is_dir() else [path]
    if not files:
        raise InputError("the folder has no inputs", where=str(path), remedy=f"put files into it: {', '.join(kinds)}")
    pictures = [file for file in files if artifact is not None and file.suffix.lower() in SUFFIXES]
    shown = picture_reader(artifact, contract) if artifact is not None and pictures else None
    names = [spec.name for spec in contract.inputs]
    return [
        Batch(file.name, {names[0]: shown(file)}) if shown is not None and file in pictures else _read(file, names)
        for file in files
    ]


def _read(path: Path, names: Sequence[str]) -> Batch:
    where = str(path)
    damaged = foreign_errors("the inputs cannot be read", where=where, remedy="write them by numpy.savez")
    with damaged, open_plain(path, "reading inputs") as file:
        check_unpacked(file)
        loaded = np.load(file, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            if len(names) > 1:
                remedy = f"give an .npz with {', '.join(names)}"
                raise InputError(f"the model has {len(names)} inputs", where=where, remedy=remedy)
            return Batch(path.name, {names[0]: np.asarray(loaded)})
        missing = [name for name in names if name not in loaded]
        if missing:
            raise InputError(
                f"the file has no '{missing[0]}'",
                where=where,
                why=f"it has {', '.join(list(loaded)[:20]) or 'nothing'}",
                remedy=f"name the arrays as the inputs: {', '.join(names)}",
            )
        labels = np.asarray(loaded[LABELS]) if LABELS in loaded else None
        return Batch(path.name, {name: np.asarray(loaded[name]) for name in names}, labels)


def evaluate_tensors(
    runs: Sequence[Run],
    contract: Contract,
    batches: Sequence[Batch],
    reference: Run | None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Each artifact beside the reference on the same inputs; a JSON-able dict for each.

    `relative_error` (L2), `cosine` and `max_abs_diff` are over all outputs (see `Drift`), `kl` in nats and `top1` over
    rows of classes; `accuracy` where the batches have labels. Padding of encoders does not count.
    """
    sums, expected = [_Sums() for _ in runs], _Sums()
    for done, batch in enumerate(batches, 1):
        for run, into in zip((*runs, *([reference] if reference else [])), (*sums, expected), strict=False):
            _add(into, run(batch.inputs), contract, batch)
        on_batch(done, len(batches))
    return [_figures(item, expected if reference else None, contract, batches) for item in sums]


def _add(into: _Sums, outputs: Mapping[str, Array], contract: Contract, batch: Batch) -> None:
    mask = _mask(contract, batch.inputs)
    kept = []
    for spec in contract.outputs:
        array = np.asarray(outputs[spec.name])
        answers = array.ndim == 3 or (array.ndim == 2 and spec.role == "output")
        token_wise = mask is not None and answers and array.shape[:2] == mask.shape
        kept.append(array[np.asarray(mask).astype(bool)] if token_wise else array)
    into.outputs.append(kept)
    if batch.labels is not None:
        if batch.labels.shape != kept[0].shape[:-1]:
            raise InputError(
                f"labels of shape {list(batch.labels.shape)} do not fit",
                where=batch.name,
                why=f"the first output is {list(kept[0].shape)}",
                remedy="give one class for each row",
            )
        into.right += int((kept[0].argmax(-1) == batch.labels).sum())
        into.labelled += batch.labels.size


def _figures(found: _Sums, expected: _Sums | None, contract: Contract, batches: Sequence[Batch]) -> dict[str, Any]:
    rows = sum(next(iter(batch.inputs.values())).shape[:1][0] if batch.inputs else 0 for batch in batches)
    result: dict[str, Any] = {"batches": len(batches), "rows": rows}
    if found.labelled:
        result |= {"accuracy": found.right / found.labelled, "labelled": found.labelled}
    if expected is None:
        return result
    import torch

    from optc.compiler.execution.drift import measure
    from optc.compiler.execution.stage_driver import StageRun

    role = "classes" if found.labelled else contract.compared_as
    if role == "output":
        flat = [[torch.from_numpy(array) for kept in side.outputs for array in kept] for side in (expected, found)]
    else:
        flat = [[torch.from_numpy(np.atleast_2d(kept[0])) for kept in side.outputs] for side in (expected, found)]
    drift = measure(StageRun(flat[0], [], role=role), StageRun(flat[1], [], role=role))
    result |= {"relative_error": drift.relative, "cosine": drift.cosine, "max_abs_diff": drift.max_abs_diff}
    result |= {"kl": drift.kl, "top1": drift.top1}
    if expected.labelled:
        result["reference_accuracy"] = expected.right / expected.labelled
    return result


def source_run(manifest: Manifest, source: Path | None) -> Run | None:
    """The model folder that an artifact was compiled from, in float32 by transformers; None where there is none.

    Raises:
        OptcError: the folder that was asked for cannot be read.
    """
    folder = source or (Path(manifest.source.path) if manifest.source.path else None)
    if folder is None or (source is None and not folder.is_dir()):
        return None
    import torch

    from optc.compiler.capture.attention import NAME
    from optc.compiler.capture.embedding import load_embedder
    from optc.compiler.capture.loading import load_model
    from optc.compiler.model_folder.sentence import sentence_modules

    names, facts = [spec.name for spec in manifest.contract.outputs], manifest.contract.embedding
    head = None
    if facts is None:
        attention = "eager" if manifest.contract.kind == "module" else NAME
        model, _ = load_model(folder, dtype=torch.float32, attention=attention)
    else:
        modules = sentence_modules(folder) or sentence_modules(folder, facts.pooling[0])
        assert modules is not None, "a way of pooling was asked for"
        model, head, _ = load_embedder(folder, modules)

    def run(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        with torch.no_grad():
            out = model(**{key: torch.from_numpy(np.asarray(value)) for key, value in inputs.items()})
            if all(out.get(name) is not None for name in names):
                return {name: out[name].float().numpy() for name in names}
            found = out[0]  # hidden states, which models name in their own ways
            if head is not None:
                masks = torch.from_numpy(np.asarray(_mask(manifest.contract, inputs))).bool()
                found = torch.stack([head.of_sequence(row[mask]) for row, mask in zip(found, masks, strict=True)])
        return {names[0]: found.float().numpy()}

    return run


def _mask(contract: Contract, inputs: Mapping[str, Array]) -> Array | None:
    """The padding mask among inputs."""
    return next((inputs[spec.name] for spec in contract.inputs if spec.role == "attention_mask"), None)


def random_inputs(contract: Contract, batch: int, length: int) -> dict[str, Array]:
    """Inputs to time a model with (seed 0): normal numbers, token ids, masks of ones.

    Args:
        batch: size of a dynamic first axis. length: tokens of an encoder.

    Raises:
        UsageError: another axis is dynamic; its size must come with inputs.
    """
    rng = np.random.default_rng(0)
    made = {}
    for spec in contract.inputs:
        shape: list[int] = []
        for axis, dim in enumerate(spec.dims):
            open_size = batch if axis == 0 else length if spec.role != "input" else None
            size = open_size if isinstance(dim, str) else dim
            if size is None:
                raise UsageError(
                    f"the size of the axis '{dim}' of '{spec.name}' is open", remedy="give inputs: --inputs FILE.npz"
                )
            shape.append(size)
        if spec.role == "input_ids":
            made[spec.name] = rng.integers(0, contract.model.vocab_size, shape)
        elif spec.role in ("attention_mask", "token_type_ids"):
            made[spec.name] = np.full(shape, int(spec.role == "attention_mask"), np.int64)
        elif spec.dtype.startswith(("float", "bfloat")):
            made[spec.name] = rng.standard_normal(shape).astype("float32" if spec.dtype == "bfloat16" else spec.dtype)
        else:
            made[spec.name] = np.ones(shape, spec.dtype)
    return made


def bench_tensors(
    model: TensorModel,
    inputs: Mapping[str, Array],
    *,
    samples: int,
    warmup: int,
    on_sample: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Latency of a call in ms and rows per second, medians with 95 % intervals (see `median_rate`)."""
    times = []
    for index in range(warmup + samples):
        begin = time.perf_counter()
        model.run(inputs)
        if index >= warmup:
            times.append(time.perf_counter() - begin)
        on_sample(index + 1, warmup + samples)
    rows = int(next(iter(inputs.values())).shape[0]) if next(iter(inputs.values())).ndim else 1
    return {
        "inputs": {name: [str(array.dtype), *map(int, array.shape)] for name, array in inputs.items()},
        "batch": rows,
        "samples": samples,
        "latency_ms": median_rate([value * 1e3 for value in times]).to_dict(),
        "rows_per_s": median_rate([rows / value for value in times]).to_dict(),
        "peak_rss_bytes": peak_rss_bytes(),
    }
