"""Damaged and hostile files of arrays: calibration of modules, inputs of `optc run`, and of the script beside a package."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from optc.compiler.diagnostics import InputError
from optc.compiler.ir.contract import Contract, Input, Output
from optc.runtime.carried.pt2_runner import PackageError, _read_arrays
from optc.runtime.measuring.tensors import read_batches

CONTRACT = Contract(
    kind="module",
    inputs=(Input(name="x", role="input", dtype="float32", dims=("batch", 4)),),
    outputs=(Output(name="y", role="output"),),
)


def npy(header: str, data: bytes = bytes(32)) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def npz(member: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x.npy", member)
    return packed.getvalue()


def described(shape: str, descr: str = "<f4") -> str:
    return f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"


GOOD = npz(npy(described("(2, 4)")))
DIRECTORY = GOOD.index(b"PK\x01\x02")
CASES: dict[str, bytes] = {
    "empty": b"",
    "pickled": b"\x80\x04K\x01.",
    "cut": GOOD[:-30],
    "start of a zip": b"PK\x03\x04",
    "flipped bits": GOOD[:50] + bytes(byte ^ 255 for byte in GOOD[50:54]) + GOOD[54:],
    "encrypted": GOOD[: DIRECTORY + 8] + b"\x01\x00" + GOOD[DIRECTORY + 10 :],
    "another compression": GOOD[: DIRECTORY + 10] + b"\x63\x00" + GOOD[DIRECTORY + 12 :],
    "header without end": npz(npy("{'descr': '<f4', 'shape': (2, 4")),
    "deep header": npz(npy("(" * 5000)),
    "flag as a size": npz(npy(described("(True, 4)"))),
    "negative size": npz(npy(described("(-2, 4)"))),
    "more than there is": npz(npy(described("(3, 4)"))),
    "objects": npz(npy(described("(1,)", "|O"))),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "inputs.npz"
    path.write_bytes(CASES[case])
    with pytest.raises(InputError, match="the inputs cannot be read") as caught:
        read_batches(path, CONTRACT)
    assert caught.value.where == str(path)
    assert caught.value.why
    assert "savez" in caught.value.remedy
    with pytest.raises(PackageError, match=r"inputs\.npz cannot be read: "):
        _read_arrays(path, [{"name": "x"}])


def test_what_is_whole_is_read_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "inputs.npz"
    path.write_bytes(GOOD)
    (batch,) = read_batches(path, CONTRACT)
    assert batch.inputs["x"].tolist() == np.zeros((2, 4)).tolist()
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("beside.npy", b"no array")
    assert list(read_batches(path, CONTRACT)[0].inputs) == ["x"]
    assert len(_read_arrays(path, [{"name": "x"}])) == 1


def test_pipes_do_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "inputs.npz")
    with pytest.raises(InputError, match="pipe"):
        read_batches(tmp_path / "inputs.npz", CONTRACT)
    with pytest.raises(PackageError, match="is no file"):
        _read_arrays(tmp_path / "inputs.npz", [{"name": "x"}])
