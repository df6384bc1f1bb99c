"""Attacks on an ONNX file and its external data, each refused before an engine sees the file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from optc.compiler.artifact.onnx_check import check_onnx
from optc.compiler.diagnostics import ArtifactError

WEIGHT = np.arange(16, dtype=np.float32)


def external(
    location: str = "model.onnx.data",
    offset: int | None = 0,
    length: int | None = 64,
    shape: tuple[int, ...] = (16,),
    name: str = "w",
    dtype: int = TensorProto.FLOAT,
    **extra: str,
) -> TensorProto:
    tensor = TensorProto(name=name, data_type=dtype, dims=list(shape), data_location=TensorProto.EXTERNAL)
    entries = {"location": location, "offset": offset, "length": length, **extra}
    for key, value in entries.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def model(*tensors: TensorProto, nodes: list[Any] | None = None, **imports: int) -> onnx.ModelProto:
    """One Identity of the first tensor, or the given nodes, which make `y`."""
    copy = helper.make_node("Identity", [tensors[0].name], ["y"], name="copy")
    made = nodes if nodes is not None else [copy]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(made, "g", [], [output], list(tensors))
    versions = {"": 24, "com.microsoft": 1, **imports}
    opsets = [helper.make_opsetid(name, number) for name, number in versions.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An artifact folder with one good data file, and files outside it that nobody may read."""
    (tmp_path / "secret.bin").write_bytes(WEIGHT.tobytes())
    path = tmp_path / "artifact"
    (path / "sub").mkdir(parents=True)
    (path / "model.onnx.data").write_bytes(WEIGHT.tobytes())
    return path


def check(folder: Path, message: onnx.ModelProto) -> Any:
    (folder / "model.onnx").write_bytes(message.SerializeToString())
    return check_onnx(folder, "model.onnx")


def refusal(folder: Path, message: onnx.ModelProto) -> str:
    with pytest.raises(ArtifactError) as caught:
        check(folder, message)
    assert caught.value.exit_code == 7
    assert caught.value.where == str(folder / "model.onnx")
    return str(caught.value.why)


def test_a_plain_model_is_summed_up(folder: Path) -> None:
    inline = helper.make_tensor("small", TensorProto.INT64, [2], [1, 2])
    summary = check(folder, model(external(), inline))
    assert summary.operators == {"Identity": 1}
    assert summary.outputs == ("y",)
    assert summary.weight_bytes == 64 + 16
    assert summary.data_files == ("model.onnx.data",)


PLACES: dict[str, tuple[TensorProto, str]] = {
    "parent": (external("../secret.bin"), "'../secret.bin' is not a bare file name"),
    "through a folder": (external("sub/../../secret.bin"), "'sub/../../secret.bin' is not a bare file name"),
    "backslashes": (external("..\\secret.bin"), r"'..\\secret.bin' is not a bare file name"),
    "absolute": (external("/etc/hostname"), "'/etc/hostname' is not a bare file name"),
    "a folder": (external("sub"), "'sub' is a link or something else that is not a regular file"),
    "the folder itself": (external("."), "'.' is not a bare file name"),
    "nowhere": (external("", 0), "'' is not a bare file name"),
    "missing": (external("nope.bin"), "the file 'nope.bin' is missing"),
    "memory tag": (external("*/_ORT_MEM_ADDR_/*", 4096), "'*/_ORT_MEM_ADDR_/*' is not a bare file name"),
    "the model": (external("model.onnx"), "weights lie in the model file itself"),
    "unknown key": (external(base_dir="/"), "unknown key 'base_dir'"),
    "no offset": (external(offset=None), "location, offset or length is missing"),
    "no length": (external(length=None), "location, offset or length is missing"),
    "negative offset": (external(offset=-64), "offset '-64'"),
    "negative length": (external(length=-64), "length '-64'"),
    "length behind the end": (external(length=4096, shape=(1024,)), "ends at byte 4096"),
    "offset behind the end": (external(offset=1 << 20), "ends at byte 1048640"),
    "length unlike the shape": (external(length=32), "32 bytes, but its shape takes 64"),
    "huge shape": (external(shape=(1 << 40,)), "64 bytes, but its shape takes 4398046511104"),
    "overflowing shape": (external(shape=(1 << 32, 1 << 32)), "has shape [4294967296, 4294967296]"),
    "negative shape": (external(shape=(-16,)), "has shape [-16]"),
    "not aligned": (external(offset=2, length=32, shape=(8,)), "offset 2 is not aligned"),
    "strings": (external(dtype=TensorProto.STRING), "has the element type 8"),
}


@pytest.mark.parametrize("case", PLACES)
def test_external_data_that_is_not_as_written(folder: Path, case: str) -> None:
    tensor, reason = PLACES[case]
    assert reason in refusal(folder, model(tensor))


def _symlink(folder: Path, name: str) -> None:
    (folder / name).symlink_to(folder.parent / "secret.bin")


def _inside(folder: Path, name: str) -> None:
    (folder / name).symlink_to("model.onnx.data")


def _hard(folder: Path, name: str) -> None:
    os.link(folder.parent / "secret.bin", folder / name)


def _pipe(folder: Path, name: str) -> None:
    os.mkfifo(folder / name)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_symlink, "is a link or something else that is not a regular file"),
        (_inside, "is a link or something else that is not a regular file"),
        (_hard, "has 1 more hard links"),
        (_pipe, "is a link or something else that is not a regular file"),
    ],
)
def test_a_data_file_that_is_not_plain(folder: Path, make: Callable[[Path, str], None], reason: str) -> None:
    make(folder, "other.bin")
    assert refusal(folder, model(external("other.bin"))) == f"'other.bin' {reason}"


def test_the_model_may_not_be_a_link(folder: Path) -> None:
    (folder / "real.onnx").write_bytes(model(external()).SerializeToString())
    (folder / "model.onnx").symlink_to("real.onnx")
    with pytest.raises(ArtifactError, match=r"'model\.onnx' is a link"):
        check_onnx(folder, "model.onnx")
    with pytest.raises(ArtifactError, match="is not a bare file name"):
        check_onnx(folder, "../artifact/model.onnx")


def test_weights_may_not_overlap(folder: Path) -> None:
    pair = external(length=32, shape=(8,)), external(offset=28, length=32, shape=(8,), name="v")
    assert refusal(folder, model(*pair)) == "initializers 'w' and 'v' overlap"
    beside = external(length=32, shape=(8,)), external(offset=32, length=32, shape=(8,), name="v")
    assert check(folder, model(*beside)).weight_bytes == 64


def _if() -> Any:
    branch = helper.make_graph([], "b", [], [])
    return helper.make_node("If", ["w"], ["y"], name="branch", then_branch=branch, else_branch=branch)


NODES: dict[str, tuple[Any, str]] = {
    "subgraph": (_if(), "node 'branch' (If): the operator is not allowed"),
    "hidden subgraph": (
        helper.make_node("Identity", ["w"], ["y"], name="n", body=helper.make_graph([], "b", [], [])),
        "node 'n' (Identity): attribute 'body' is not a number, string or tensor",
    ),
    "other domain": (
        helper.make_node("Evil", ["w"], ["y"], name="n", domain="custom"),
        "node 'n' (Evil): domain 'custom' is not allowed",
    ),
    "unknown operator": (
        helper.make_node("Tokenizer", ["w"], ["y"], name="n", domain="com.microsoft"),
        "node 'n' (Tokenizer): the operator is not allowed",
    ),
    "random": (
        helper.make_node("RandomNormalLike", ["w"], ["y"], name="n"),
        "node 'n' (RandomNormalLike): the operator is not allowed",
    ),
    "reads what is not there": (
        helper.make_node("Add", ["w", "x"], ["y"], name="n"),
        "node 'n' reads 'x', which is not computed yet",
    ),
    "attribute outside": (
        helper.make_node("Constant", [], ["y"], name="n", value=external("../secret.bin")),
        "node 'n' (Constant): attribute 'value' is kept outside the model",
    ),
}


@pytest.mark.parametrize("case", NODES)
def test_nodes_that_optc_does_not_write(folder: Path, case: str) -> None:
    node, reason = NODES[case]
    assert refusal(folder, model(external(), nodes=[node])) == reason


def test_values_are_made_once(folder: Path) -> None:
    twice = [helper.make_node("Identity", ["w"], ["y"], name=name) for name in ("one", "two")]
    assert refusal(folder, model(external(), nodes=twice)) == "node 'two' computes 'y' again"
    assert refusal(folder, model(external(), nodes=[])) == "output 'y' is never computed"
    same = external(length=32, shape=(8,)), external(offset=32, length=32, shape=(8,))
    assert refusal(folder, model(*same)) == "initializer 'w' has no name of its own"


def test_operator_sets_and_functions(folder: Path) -> None:
    newer = model(external())
    newer.opset_import[0].version = 25
    assert refusal(folder, newer) == "operator set '' 25"
    assert refusal(folder, model(external(), custom=1)) == "operator domain 'custom' is not allowed"
    function = model(external())
    function.functions.add(name="f", domain="")
    assert refusal(folder, function) == "it defines functions"


def test_inline_data_that_do_not_fit(folder: Path) -> None:
    short = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], raw_data=b"\0" * 8)
    assert refusal(folder, model(short)) == "initializer 'w': its data do not fit the shape [4]"
    both = external()
    both.raw_data = WEIGHT.tobytes()
    assert refusal(folder, model(both)) == "initializer 'w' is kept both in the model and outside"


@pytest.mark.parametrize("data", [b"", b"\xff" * 100, b"not a model"])
def test_a_file_that_is_no_message(folder: Path, data: bytes) -> None:
    (folder / "model.onnx").write_bytes(data)
    with pytest.raises(ArtifactError):
        check_onnx(folder, "model.onnx")


def test_damage_anywhere_is_an_artifact_error_or_harmless(folder: Path) -> None:
    """Flip single bits all over the message: never another exception than ArtifactError."""
    good = model(external()).SerializeToString()
    refused = 0
    for place in range(len(good) * 8):
        data = bytearray(good)
        data[place // 8] ^= 1 << place % 8
        (folder / "model.onnx").write_bytes(bytes(data))
        try:
            check_onnx(folder, "model.onnx")
        except ArtifactError:
            refused += 1
    assert refused > len(good) * 2


def test_a_truncated_file_is_an_artifact_error_or_harmless(folder: Path) -> None:
    """Cut the message at every byte: what is left is refused, or a whole message by itself."""
    good = model(external()).SerializeToString()
    refused = 0
    for length in range(len(good)):
        (folder / "model.onnx").write_bytes(good[:length])
        try:
            check_onnx(folder, "model.onnx")
        except ArtifactError:
            refused += 1
    assert refused > 0.9 * len(good)
