"""Programs of torch.export that others made: in memory, and in files of `torch.export.save`."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from command_line import optc as call
from torch import Tensor, nn

import optc
from optc.compiler.diagnostics import InputError, TargetError, UsageError


class _Net(nn.Module):
    """Containers, a tied and a transposed weight, buffers that are saved and that are not, a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.mix = nn.Parameter(torch.randn(4, 4).t())
        self.register_buffer("shift", torch.randn(4))
        self.register_buffer("scale", torch.randn(4), persistent=False)
        self.constant = torch.randn(4)

    def forward(self, x: Tensor, more: dict[str, Tensor]) -> dict[str, Any]:
        hidden = self.second(self.first(x)) * self.scale + self.shift + self.constant
        rows = torch.nn.functional.embedding(more["ids"], self.mix)
        return {"out": hidden + rows, "pair": (x @ self.mix, hidden.sum(-1))}


@pytest.fixture(scope="module")
def net() -> _Net:
    torch.manual_seed(0)
    return _Net().eval()


@pytest.fixture(scope="module")
def file(net: _Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "net.pt2"
    rows = torch.export.Dim("rows", min=2, max=64)
    inputs = (torch.randn(3, 4), {"ids": torch.tensor([0, 1, 2])})
    shapes = {"x": {0: rows}, "more": {"ids": {0: rows}}}
    torch.export.save(torch.export.export(net, inputs, dynamic_shapes=shapes), path)
    return path


def outputs_of(net: _Net, x: Tensor, ids: Tensor) -> list[Tensor]:
    with torch.no_grad():
        found = net(x, {"ids": ids})
    return [found["out"], *found["pair"]]


def test_a_file_computes_what_its_module_does(net: _Net, file: Path) -> None:
    x, ids = torch.randn(5, 4), torch.tensor([3, 0, 2, 1, 1])
    for program in (optc.capture(file), optc.capture(torch.export.load(file))):
        rows, labels = (spec.dims[0] for spec in program.contract.inputs)
        assert rows == labels
        for found, expected in zip(program(x, ids), outputs_of(net, x, ids), strict=True):
            assert torch.equal(found, expected)


def test_a_file_is_compiled(net: _Net, file: Path, tmp_path: Path) -> None:
    assert call("compile", str(file), "--target", "onnx-cpu", "-o", str(tmp_path / "out")) == 0
    session = ort.InferenceSession(tmp_path / "out" / "model.onnx")
    x, ids = torch.randn(7, 4), torch.tensor([3, 0, 2, 1, 1, 0, 3])
    names = [item.name for item in session.get_inputs()]
    found = session.run(None, dict(zip(names, (x.numpy(), ids.numpy()), strict=True)))
    for ours, expected in zip(found, outputs_of(net, x, ids), strict=True):
        np.testing.assert_allclose(ours, expected.numpy(), atol=1e-5, rtol=0)


def test_what_says_nothing_of_a_file_is_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--dtype bf16 has no effect on an exported program"):
        optc.compile(file, target="inductor-cpu", dtype="bf16", output=tmp_path / "out")
    with pytest.raises(UsageError, match="--text needs a model folder"):
        optc.compile(file, target="onnx-cpu", text=file, output=tmp_path / "out")
    with pytest.raises(TargetError, match="takes decoders, not a model of kind 'module'"):
        optc.compile(file, target="executorch", output=tmp_path / "out")


# -- files that are not trusted ------------------------------------------------------------------


class _Runs:
    """A pickle that makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self._path,))


def rewritten(file: Path, to: Path, change: Callable[[dict[str, bytes]], None], **options: Any) -> Path:
    """The archive with other members."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(to, "w", **options) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return to


def edited(name: str, change: Callable[[Any], None]) -> Callable[[dict[str, bytes]], None]:
    """A change of a member of JSON."""

    def run(members: dict[str, bytes]) -> None:
        key = next(key for key in members if key.endswith(name))
        data = json.loads(members[key])
        change(data)
        members[key] = json.dumps(data).encode()

    return run


def test_no_pickle_is_read(file: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    hostile = pickle.dumps(_Runs(made))

    def change(members: dict[str, bytes]) -> None:
        key = next(key for key in members if "sample_inputs" in key)
        members[key] = hostile

    optc.capture(rewritten(file, tmp_path / "net.pt2", change))
    assert not made.exists()
    pickle.loads(hostile)  # it is one
    assert made.exists()


WEIGHTS = "model_weights_config.json"


def _set(path: str, value: Any) -> Callable[[Any], None]:
    def run(data: Any) -> None:
        *parents, last = path.split("/")
        for part in parents:
            data = data[int(part) if part.isdigit() else part]
        data[last] = value

    return run


def _repeat(data: Any) -> None:
    """A tensor of one number that stands for as many as no memory holds."""
    meta = data["config"]["mix"]["tensor_meta"]
    meta["sizes"], meta["strides"] = [{"as_int": 1 << 20}] * 2, [{"as_int": 0}] * 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (edited(WEIGHTS, _set("config/mix/use_pickle", True)), "it is a pickle"),
        (edited(WEIGHTS, _set("config/mix/path_name", "../../../etc/passwd")), "is missing"),
        (edited(WEIGHTS, _set("config/mix/tensor_meta/sizes", [{"as_int": 4}, {"as_int": 1 << 40}])), "do not hold"),
        (edited(WEIGHTS, _repeat), "stand for 1099511627776 numbers"),
        (edited(WEIGHTS, _set("config/mix/tensor_meta/storage_offset", {"as_int": -1})), "its sizes are no numbers"),
        (edited(WEIGHTS, _set("config/mix/more", 1)), "unknown fields: more"),
        (edited(WEIGHTS, lambda data: data["config"].pop("mix")), "tensor 'mix' is missing"),
        (edited("model.json", _set("graph_module/graph/nodes/0/target", "torch.ops.own.op.default")), "is not allowed"),
        (edited("model.json", _set("graph_module/graph/nodes/0/target", "os.system")), "is not allowed"),
        (edited("model.json", _set("schema_version/major", 99)), "schema 99 of torch"),
        (lambda members: members.update({"other/file": b""}), "more than one folder"),
        (lambda members: members.pop(next(key for key in members if key.endswith("format"))), "no archive of torch"),
        (lambda members: members.update({f"{next(iter(members)).split('/')[0]}/models/b.json": b"{}"}), "2 graphs"),
    ],
)
def test_what_a_file_may_not_say(
    file: Path, tmp_path: Path, change: Callable[[dict[str, bytes]], None], words: str
) -> None:
    with pytest.raises(InputError, match="exported program") as raised:
        optc.capture(rewritten(file, tmp_path / "net.pt2", change))
    assert words in str(raised.value)


def test_archives_are_neither_compressed_nor_cut(file: Path, tmp_path: Path) -> None:
    packed = rewritten(file, tmp_path / "packed.pt2", lambda _: None, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="compressed or encrypted"):
        optc.capture(packed)
    (tmp_path / "cut.pt2").write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="it is no archive"):
        optc.capture(tmp_path / "cut.pt2")
    damaged = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        member = next(item for item in archive.infolist() if "weight_0" in item.filename)
    place = damaged.index(member.filename.encode()) + len(member.filename)
    damaged[place + 60 : place + 64] = b"\xff\xff\xff\xff"
    (tmp_path / "bit.pt2").write_bytes(damaged)
    with pytest.raises(InputError, match=r"Bad CRC|header"):
        optc.capture(tmp_path / "bit.pt2")
