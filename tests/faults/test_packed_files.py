"""Files that are small and stand for much, or that name others: refused before anything is unpacked or opened."""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import optc

from optc.compiler.calibration import dataset_rows
from optc.compiler.calibration.documents import draw_documents, read_documents
from optc.compiler.calibration.windows import Draw
from optc.compiler.diagnostics import ArtifactError, InputError
from optc.compiler.ir.contract import Contract, Input, Output
from optc.compiler.ir.saved.exported_archive import read_exported
from optc.compiler.ir.saved.programs import MOST_GRAPH, read_program
from optc.runtime.carried.check_device import report
from optc.runtime.carried.pt2_runner import MOST_MANIFEST, PackageError, _read_arrays, open_folder
from optc.runtime.carried.run_trt import RunnerError, read_description
from optc.runtime.measuring.tensors import read_batches

CONTRACT = Contract(
    kind="module",
    inputs=(Input(name="x", role="input", dtype="float32", dims=("batch", 4)),),
    outputs=(Output(name="y", role="output"),),
)
MOST_GROWTH = 300 << 20


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# -- arrays ----------------------------------------------------------------------------------------


def declared(sizes: dict[str, int | None]) -> bytes:
    """An .npz whose members are said to have so many bytes; None says the truth."""
    array = io.BytesIO()
    np.save(array, np.zeros((2, 4), np.float32))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for name, size in sizes.items():
            file.writestr(name, array.getvalue())
            if size is not None:
                file.getinfo(name).file_size = size  # of the list of members, which is what readers believe
    return packed.getvalue()


ARRAYS: dict[str, tuple[dict[str, int | None], str]] = {
    "ten gigabytes of zeros": ({"x.npy": 10 << 30}, "bytes would be unpacked to 10737418240"),
    "of a member beside it": ({"x.npy": None, "y.npy": 10 << 30}, "would be unpacked to 10737"),
    "many members": ({f"{i}.npy": 1 << 24 for i in range(65)}, "would be unpacked to 1090519040"),
    "less than it has": ({"x.npy": 150}, "BadZipFile|ValueError"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays(case: str, tmp_path: Path) -> None:
    sizes, why = ARRAYS[case]
    path = tmp_path / "inputs.npz"
    path.write_bytes(declared(sizes))
    with pytest.raises(InputError, match=why) as caught:
        read_batches(path, CONTRACT)
    assert caught.value.where == str(path)
    with pytest.raises(PackageError, match=why):
        _read_arrays(path, [{"name": "x"}])


def test_an_array_larger_than_its_file(tmp_path: Path) -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 4), }\n"
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    with pytest.raises(InputError, match="more than the file has"):
        read_batches(tmp_path / "x.npy", CONTRACT)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.write(tmp_path / "x.npy", "x.npy")
    with pytest.raises(InputError, match="more than the file has"):
        read_batches(tmp_path / "x.npz", CONTRACT)


# -- JSON ------------------------------------------------------------------------------------------


def sparse(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def of_values(path: Path) -> Path:
    path.write_bytes(b"[" + b"[]," * 4_100_000 + b"0]")
    return path


def exported(path: Path, graph: bytes, word: bytes = b"pt2") -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in (("archive_format", word), ("models/model.json", graph)):
            file.writestr(f"net/{name}", data)
    return path


JSON: dict[str, tuple[str, Callable[[Path], Any], Callable[[Path], Any], str]] = {
    "a graph of 257 MiB": (
        "graph.json",
        lambda path: sparse(path, MOST_GRAPH + 1),
        lambda path: read_program(path.parent),
        f"more than {MOST_GRAPH}",
    ),
    "a graph of 8 million values": ("graph.json", of_values, lambda path: read_program(path.parent), "values; at most"),
    "a graph of an exported program": (
        "net.pt2",
        lambda path: exported(path, b"[" + b"[]," * 4_100_000 + b"0]"),
        read_exported,
        "values; at most",
    ),
    "a word of an exported program": (
        "net.pt2",
        lambda path: exported(path, b"{}", word=b"pt2" + b" " * 100),
        read_exported,
        "it has 103 bytes, more than 100",
    ),
    "a manifest that optc check reads": (
        "manifest.json",
        lambda path: sparse(path, MOST_MANIFEST + 1),
        lambda path: report(str(path.parent)),
        "more than",
    ),
    "a description that optc check reads": (
        "engine.json",
        lambda path: sparse(path, MOST_MANIFEST + 1),
        lambda path: report(str(path.parent)),
        "more than",
    ),
    "a manifest that a package's script reads": (
        "manifest.json",
        lambda path: sparse(path, MOST_MANIFEST + 1),
        lambda path: open_folder(path.parent),
        "more than",
    ),
    "a manifest that is a pipe": (
        "manifest.json",
        lambda path: os.mkfifo(path),
        lambda path: open_folder(path.parent),
        "not a plain file",
    ),
    "a description that a plan's script reads": (
        "engine.json",
        lambda path: sparse(path, 2 << 20),
        lambda path: read_description(str(path.parent)),
        "more than",
    ),
}


@pytest.mark.parametrize("case", JSON)
def test_json(case: str, tmp_path: Path) -> None:
    name, make, read, why = JSON[case]
    make(tmp_path / name)
    before = peak_bytes()
    with pytest.raises((ArtifactError, InputError, PackageError, RunnerError, ValueError), match=why):
        read(tmp_path / name)
    assert peak_bytes() - before < MOST_GROWTH


# -- datasets --------------------------------------------------------------------------------------


class Letters:
    def encode(self, text: str) -> list[int]:
        return [1] * min(len(text), 10)


def test_a_column_that_is_unpacked_to_far_more(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    text = pa.array(["a" * (17 << 20)] * 16)
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 20
    with pytest.raises(InputError, match="unpacked to far more than it is") as caught:
        read_documents(tmp_path / "a.parquet", Letters())
    assert "group 0, text" in str(caught.value.where)


def test_equal_values_of_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of equal token ids is a few bytes of the file, however long it is."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    ids = pa.ListArray.from_arrays([0, 5, 1_000_000], pa.array(np.ones(1_000_000, np.int8)))
    pq.write_table(pa.table({"tokens": ids}), tmp_path / "a.parquet")
    assert len(read_documents(tmp_path / "a.parquet", None)[1]) == 999_995
    monkeypatch.setattr(dataset_rows, "_VALUES", 4_000_000)
    with pytest.raises(InputError, match="unpacked to far more than it is") as caught:
        read_documents(tmp_path / "a.parquet", None)
    assert "group 0, tokens" in str(caught.value.where)
    assert "stand for 8000000" in str(caught.value.why)


def test_a_text_that_stands_in_many_rows_is_in_memory_once(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 500, pa.int32()), pa.array(["a" * (4 << 20)]))
    pq.write_table(pa.table({"text": repeated}), tmp_path / "a.parquet", compression="zstd", store_schema=False)
    before = peak_bytes()
    assert len(read_documents(tmp_path / "a.parquet", Letters())) == 500  # 2 GB of text
    assert peak_bytes() - before < MOST_GROWTH


def _image(folder: Path) -> None:
    info = json.loads((folder / "dataset_info.json").read_text())
    info["features"]["text"] = {"_type": "Image"}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def _elsewhere(folder: Path) -> None:
    state = json.loads((folder / "state.json").read_text())
    os.rename(folder / state["_data_files"][0]["filename"], folder.parent / "elsewhere.arrow")
    state["_data_files"] = [{"filename": "../elsewhere.arrow"}]
    (folder / "state.json").write_text(json.dumps(state))


def _link(folder: Path) -> None:
    (rows,) = folder.glob("*.arrow")
    os.rename(rows, folder.parent / "elsewhere.arrow")
    rows.symlink_to("../elsewhere.arrow")


def _pipe(folder: Path) -> None:
    (rows,) = folder.glob("*.arrow")
    rows.unlink()
    os.mkfifo(rows)


def _pipe_of_state(folder: Path) -> None:
    (folder / "dataset_info.json").unlink()
    os.mkfifo(folder / "dataset_info.json")


def _deep(folder: Path) -> None:
    (folder / "dataset_info.json").write_text("[" * 100_000)


def _large(folder: Path) -> None:
    sparse(folder / "dataset_info.json", 17 << 20)


DATASETS: dict[Callable[[Path], None], str] = {
    _image: "neither text nor token ids",
    _elsewhere: "is damaged",
    _link: "failed while reading a dataset",
    _pipe: "failed while reading a dataset",
    _pipe_of_state: "failed while reading a dataset",
    _deep: "is damaged",
    _large: "failed while reading a dataset",
}


@pytest.mark.parametrize("damage", DATASETS, ids=lambda damage: damage.__name__.strip("_"))
def test_folders_of_datasets(damage: Callable[[Path], None], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    path = "http://127.0.0.1:9/x.png"  # what an image's decoder would fetch
    types = datasets.Features({"text": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})
    rows = datasets.Dataset.from_list([{"text": {"bytes": None, "path": path}}], features=types)
    rows.save_to_disk(tmp_path / "rows")
    damage(tmp_path / "rows")
    with pytest.raises(InputError, match=DATASETS[damage]):
        read_documents(tmp_path / "rows", Letters())


def test_texts_that_lie_outside_of_their_file(tmp_path: Path) -> None:
    """Arrow reads where the offsets of a mapped file say, and the process was gone."""
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"text": "a" * 1000}, {"text": "b" * 24}]).save_to_disk(tmp_path / "rows")
    (rows,) = (tmp_path / "rows").glob("*.arrow")
    offsets = struct.pack("<3i", 0, 1000, 1024)
    assert rows.read_bytes().count(offsets) == 1
    for wrong in ((0, 1000, 1 << 30), (1 << 30, (1 << 30) + 5, (1 << 30) + 9), (0, -5, 1024), (1000, 0, 1024)):
        rows.write_bytes(rows.read_bytes().replace(offsets, struct.pack("<3i", *wrong)))
        offsets = struct.pack("<3i", *wrong)
        with pytest.raises(InputError, match="is damaged"):
            read_documents(tmp_path / "rows", Letters())
        with pytest.raises(InputError, match="is damaged"):
            draw_documents(tmp_path / "rows", Letters(), Draw(tokens=100, windows=2, seed=0))


def test_a_parquet_file_that_is_a_pipe(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    os.mkfifo(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="pipe"):
        read_documents(tmp_path / "a.parquet", Letters())


def test_stages_that_repeat_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("00-a.txt", "01-b.txt"):
        (tmp_path / name).write_text("%x\n" * 5000 + name)
    assert optc("diff", tmp_path, "00", "01") == 3
    assert "25000000 pairs of lines are equal" in capsys.readouterr().err
    sparse(tmp_path / "01-b.txt", (256 << 20) + 1)
    assert optc("diff", tmp_path, "00", "01") == 3
    assert "more than 268435456" in capsys.readouterr().err
