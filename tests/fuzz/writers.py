"""optc's writers, as the campaign against the disk runs them (`disk.py`): over and over, each time over what was there."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz.seeds import Seeds


@dataclass
class Writer:
    """Something that is written to `place`.

    Attributes:
        write: writes it, once more.
        state: what it is, of equal outputs equal; raises of one that is not whole.
        again: what is run after a kill, a power loss or a failing disk; without it `write`.
        kept: names beside `place` that may be left for `again` to go on from; none may be left after it.
    """

    place: Path
    write: Callable[[], None]
    state: Callable[[Path], str]
    again: Callable[[], None] | None = None
    kept: tuple[str, ...] = ()


def _run_optc(*arguments: object) -> None:
    from optc.cli.main import main

    try:
        main([str(item) for item in arguments])
    except SystemExit as done:
        if done.code not in (0, None):
            raise RuntimeError(f"optc {arguments} ended with {done.code}") from done


def _optc_code(*arguments: object) -> None:
    """A command whose exit code is that of the process."""
    from optc.cli.main import main

    main([str(item) for item in arguments])


def _artifact_state(folder: Path) -> str:
    from optc.compiler.artifact.folder import verify

    entries = verify(folder).files
    return json.dumps([entry.sha256 for entry in entries if entry.path != "report.html"])


def _old_artifact(seeds: Seeds) -> Path:
    """What the writers of artifacts replace."""
    return seeds.compiled("old", "--target", "vllm", "--quant", "rtn", "--group-size", "32")


def artifact_writer(seeds: Seeds, work: Path, *target: str) -> Writer:
    """The last part of a compile: export, check, manifest, publishing."""
    import optc.api as api

    place, got = work / "place" / "output", list[Any]()
    place.parent.mkdir(parents=True, exist_ok=True)
    real = api._write
    api._write = lambda *given: (got.append(given), real(*given))[1]  # type: ignore[assignment]
    try:
        _run_optc("compile", seeds.model(), *target, "-o", place, "--force")
    finally:
        api._write = real
    shutil.rmtree(place)
    shutil.copytree(_old_artifact(seeds), place)
    return Writer(place, lambda: got and real(*got[0]), _artifact_state)  # type: ignore[func-returns-value]


def quantize_writer(seeds: Seeds, work: Path) -> Writer:
    """`optc quantize --work-dir`: stages, rounded groups and the artifact; again goes on from what is there."""
    place = work / "place" / "output"
    place.parent.mkdir(parents=True, exist_ok=True)
    model, text = seeds.model(), seeds.text()
    calibration = ("--calibration", text, "--calibration-samples", 2, "--calibration-seq-len", 32)
    shutil.copytree(_old_artifact(seeds), place, dirs_exist_ok=True)
    quantized = ("quantize", model, "--quant", "gptq", "--group-size", 32, *calibration)
    words = (*quantized, "-o", place, "--force", "--work-dir", place.parent / "work")
    return Writer(place, lambda: _optc_code(*words), _artifact_state, kept=("work",))


def stage_writer(seeds: Seeds, work: Path) -> Writer:
    """A finished stage of a work folder; there is no old one in its place."""
    from optc.compiler.pipeline.stages import load_stage, save_stage

    program, record = load_stage(seeds.stages()[-1])
    place = work / "place" / "03-quantize"

    def state(folder: Path) -> str:
        load_stage(folder)
        return hashlib.sha256((folder / "SHA256SUMS").read_bytes()).hexdigest()

    def again() -> None:  # as the pipeline does
        from optc.compiler.artifact.publishing import remove_abandoned_in

        remove_abandoned_in(place.parent)
        if not place.exists():
            save_stage(place, program, record)

    return Writer(place, lambda: save_stage(place, program, record), state, again)


def group_writer(seeds: Seeds, work: Path) -> Writer:
    """A rounded group of a quantization that keeps them."""
    import torch

    from optc.compiler.rewriting.quantization_record import LinearRecord
    from optc.passes.quantization.arithmetic.grid import Grid
    from optc.passes.quantization.arithmetic.store import Entry, GroupStore

    place = work / "place" / "groups-k"
    numbers = {"bits": 4, "group_size": 32, "weight_error": 0.0, "scale_min": 1.0, "scale_max": 1.0}
    record = LinearRecord(name="w", shape=(64, 64), method="gptq", symmetric=True, **numbers)  # type: ignore[arg-type]
    entry = Entry(bits=4, group_size=32, symmetric=True, damping=None, note="", record=record)
    grid = Grid(torch.ones(64, 2), torch.ones(64, 2), 4, 32, True)

    def write() -> None:
        store = GroupStore.open(place.parent, "k")
        if store.load(0) is None:
            store.save(0, [(entry, torch.ones(64, 64), grid)])

    def state(folder: Path) -> str:
        store = GroupStore(folder)
        names = sorted(path.name for path in folder.iterdir())
        return json.dumps(names) if store.load(0) is not None else ""

    return Writer(place, write, state)


def checkpoint_writer(seeds: Seeds, work: Path) -> Writer:
    """A checkpoint of a training run; there is no old one in its place."""
    import torch

    from optc.training import checkpoint
    from optc.training.data import Position

    run = work / "place"
    run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    given = checkpoint.RunState(step=1, position=Position(), model="m", corpus="c", config={}, run="r")
    place = checkpoint.folder_of(run, 1)

    def state(folder: Path) -> str:
        checkpoint.check_whole(folder)
        return hashlib.sha256((folder / "SHA256SUMS").read_bytes()).hexdigest()

    def write() -> None:
        checkpoint.save(run, given, model, optimizer)

    def again() -> None:  # a resumed run starts from a checkpoint that is there
        if not place.exists():
            write()

    return Writer(place, write, state, again)


def train_writer(seeds: Seeds, work: Path) -> Writer:
    """`optc train --resume`: log, checkpoints, the model folder, and the run's folder that goes in the end."""
    from training_runs import small_config, small_model, token_file

    from optc.training.loop import train

    place = work / "place" / "output"
    place.parent.mkdir(parents=True, exist_ok=True)
    model, text = work / "model", token_file(work / "text.jsonl")
    if not model.exists():
        small_model(model)
    config = small_config(model, text, place, max_steps=5, saving={"every": 2})

    def state(folder: Path) -> str:
        losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
        weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        json.loads((folder / "train.json").read_text())
        return json.dumps([losses, weights, sorted(path.name for path in folder.iterdir())])

    return Writer(place, lambda: train(config, resume=True) and None, state, kept=("output.run",))


def exporter(*target: str) -> Callable[[Seeds, Path], Writer]:
    """The writer of a target's artifacts."""
    return lambda seeds, work: artifact_writer(seeds, work, "--target", *target)


WRITERS: dict[str, Callable[[Seeds, Path], Writer]] = {
    "onnx": exporter("onnx-cpu"),
    "folder": exporter("vllm"),
    "trtllm": exporter("trtllm", "--quant", "fp8"),
    "cuda": exporter("inductor-cuda"),
    "executorch": exporter("executorch"),
    "inductor": exporter("inductor-cpu"),
    "stage": stage_writer,
    "group": group_writer,
    "checkpoint": checkpoint_writer,
    "quantize": quantize_writer,
    "train": train_writer,
}
LIGHT = {"stage", "group", "checkpoint", "train"}
"""Those that import neither an engine nor the command line."""
SLOW = {"inductor"}
"""Those of which one writing takes many seconds: named, or left out."""
