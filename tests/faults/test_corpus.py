"""What once ended in a traceback, a hang or a crash is read again: each input succeeds or is refused (see `make fuzz`)."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from fuzz.campaign import READERS, outcome
from fuzz.readers import Reader, sealed
from fuzz.seeds import Seeds
from fuzz.whole import Command, Quantized

CORPUS = Path(__file__).parent.parent / "fuzz" / "corpus"
KEPT = sorted((path.name, tuple(sorted(path.iterdir()))) for path in CORPUS.iterdir())


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Seeds:
    return Seeds(tmp_path_factory.mktemp("seeds"))


@pytest.mark.parametrize(("name", "folders"), KEPT, ids=[name for name, _ in KEPT])
def test_what_failed_before_is_read_or_refused(
    name: str, folders: tuple[Path, ...], seeds: Seeds, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts = {path.name for folder in folders for path in folder.iterdir()}  # a sound folder of each takes seconds
    chosen = {key: value for key, value in Quantized._LAYOUTS.items() if key in layouts}
    monkeypatch.setattr(Quantized, "_LAYOUTS", chosen)
    reader: Reader = READERS[name](seeds, seeds.folder / name)
    faults = []
    for folder in folders:
        (path,) = (path for path in folder.rglob("*") if path.is_file())
        kind, more = outcome(reader, (str(path.relative_to(folder)), path.read_bytes()))
        if kind == "fault":
            faults.append((folder.name, more))
    assert not faults


def test_commands_take_hostile_manifests(seeds: Seeds, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fixed part of the campaign: each command reads manifests that were changed and sealed again."""
    reader = Command(seeds, seeds.folder / "commands")
    rng, faults, seen = random.Random(18), [], Counter[str]()
    for command in ("run", "eval", "bench", "diff", "verify") * 2:
        made = reader.make(rng)
        monkeypatch.setattr(reader, "command_of", lambda data, command=command: command)
        kind, more = outcome(reader, made)
        seen[kind] += 1
        if kind == "fault":
            faults.append((command, more))
    assert not faults
    assert seen["refused"] >= 3


@pytest.mark.parametrize(("context", "exit_code"), [(-1, 7), (1 << 62, 7), (1 << 63, 7), (16, None)])
def test_contexts_that_the_graph_does_not_have(
    seeds: Seeds, monkeypatch: pytest.MonkeyPatch, context: int, exit_code: int | None
) -> None:
    """A context below 0 left no window of the text to score; in a larger one the graph's tables end."""
    reader = Command(seeds, seeds.folder / "commands")
    monkeypatch.setattr(reader, "command_of", lambda data: "eval")
    tree = json.loads(reader.sound["a/manifest.json"])
    tree["programs"]["model"]["contract"]["model"]["context_length"] = context
    found = outcome(reader, ("a/manifest.json", sealed(json.dumps(tree).encode())))
    assert found == ("read" if exit_code is None else "refused", exit_code)
