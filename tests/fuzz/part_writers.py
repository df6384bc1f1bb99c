"""Writers of what is neither an artifact nor a training: stages, groups, recipes, compiled kernels, keys."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from fuzz.seeds import Seeds
from fuzz.writer import Writer, sums_state, unless_there

# -- of a compile ------------------------------------------------------------------------------------


def stage_writer(seeds: Seeds, work: Path) -> Writer:
    """A finished stage of a work folder; there is no old one in its place."""
    from optc.compiler.artifact.publishing import remove_abandoned_in
    from optc.compiler.pipeline.stages import load_stage, save_stage

    del work
    program, record = load_stage(seeds.stages()[-1])
    program = program.in_memory()

    def state(folder: Path) -> str:
        load_stage(folder)
        return sums_state(folder)

    def write(place: Path) -> None:
        save_stage(place, program, record)

    def again(place: Path) -> None:  # as the pipeline does
        remove_abandoned_in(place.parent)
        unless_there(write)(place)

    return Writer(write, state, again=again, name="03-quantize")


def group_writer(seeds: Seeds, work: Path) -> Writer:
    """A rounded group of a quantization that keeps them."""
    import torch

    from optc.compiler.rewriting.quantization_record import LinearRecord
    from optc.passes.quantization.arithmetic.grid import Grid
    from optc.passes.quantization.arithmetic.store import Entry, GroupStore

    del seeds, work
    numbers = {"bits": 4, "group_size": 32, "weight_error": 0.0, "scale_min": 1.0, "scale_max": 1.0}
    record = LinearRecord(name="w", shape=(64, 64), method="gptq", symmetric=True, **numbers)  # type: ignore[arg-type]
    entry = Entry(bits=4, group_size=32, symmetric=True, damping=None, note="", record=record)
    grid = Grid(torch.ones(64, 2), torch.ones(64, 2), 4, 32, True)

    def write(place: Path) -> None:
        store = GroupStore.open(place.parent, "k")
        if store.load(0) is None:
            store.save(0, [(entry, torch.ones(64, 64), grid)])

    def state(folder: Path) -> str:
        store = GroupStore(folder)
        names = sorted(path.name for path in folder.iterdir())
        return json.dumps(names) if store.load(0) is not None else ""

    return Writer(write, state, name="groups-k")


def recipe_writer(seeds: Seeds, work: Path) -> Writer:
    """`--save-recipe`, over an older one."""
    from optc.request import from_python
    from optc.saved_recipes import write_recipe

    del seeds
    old = work / "old.yaml"
    work.mkdir(parents=True, exist_ok=True)
    old.write_text("model: before\n")
    request = from_python("vllm", output="out", quant="rtn")
    return Writer(
        lambda place: write_recipe(place, "model", request), lambda path: path.read_text(), old, name="recipe.yaml"
    )


def library_writer(seeds: Seeds, work: Path) -> Writer:
    """The op library in the user's cache; what the compiler says is remembered, and written as it writes it."""
    from optc.compiler.kernels.cpu import library
    from optc.compiler.kernels.kernel import CppSources, kernels_for

    del seeds
    kernel = next(item for item in kernels_for("cpu") if isinstance(item.sources, CppSources))
    real, made = library.run_compiler, dict[tuple[str, ...], tuple[str, bytes]]()

    def run_compiler(command: list[str], what: str) -> str:
        output = Path(command[command.index("-o") + 1]) if "-o" in command else None
        key = tuple(Path(word).name for word in command)
        if key not in made:
            said = real(command, what)
            made[key] = said, b"" if output is None else output.read_bytes()
        if output is not None:
            output.write_bytes(made[key][1])
        return made[key][0]

    def write(place: Path) -> None:
        os.environ["XDG_CACHE_HOME"] = str(place)
        library.build_library([kernel])

    def state(folder: Path) -> str:
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
        sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        return json.dumps(sums) if library.FILE_NAME in sums else ""

    library.run_compiler = run_compiler  # type: ignore[assignment]
    write(work / "first")
    return Writer(write, state)


# -- of trust ----------------------------------------------------------------------------------------


def keys_writer(seeds: Seeds, work: Path) -> Writer:
    """`optc sign --new-key`: the private key, and its public half beside it."""
    from cryptography.hazmat.primitives import serialization

    from optc.compiler.artifact.trust import new_keys, read_public_key

    del seeds, work

    def write(place: Path) -> None:
        place.mkdir(exist_ok=True)
        new_keys(place / "maker.pem")

    def again(place: Path) -> None:
        if not (place / "maker.pem.pub").exists():
            write(place)

    def state(folder: Path) -> str:
        names = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
        if names in ([], ["maker.pem"]):  # nobody has the other half: the next run adds it
            return ""
        key: Any = serialization.load_pem_private_key((folder / "maker.pem").read_bytes(), password=None)
        assert key.public_key().public_bytes_raw() == read_public_key(folder / "maker.pem.pub")
        return json.dumps(sorted(names))

    return Writer(write, state, again=again)


def mark_writer(seeds: Seeds, work: Path) -> Writer:
    """The machine's own key, made with the first artifact. A machine that can keep none goes on without."""
    from optc.compiler.artifact.trust import machine_mark

    del seeds, work

    def write(place: Path) -> None:
        os.environ["XDG_STATE_HOME"] = str(place)
        machine_mark(b"data")

    def state(folder: Path) -> str:
        files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
        assert all(len(path.read_bytes()) == 32 for path in files)
        return json.dumps([path.name for path in files]) if files else ""

    return Writer(write, state, optional=True)
