"""Damaged and hostile program folders: each is refused with exit code 7 and the place of the fault."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from optc.compiler.capture.module import capture_module
from optc.compiler.diagnostics import ArtifactError, OptcError
from optc.compiler.ir.program import Program

FILES = ("graph.json", "weights.safetensors", "constants.safetensors")
Json = dict[str, Any]


class Model(nn.Module):
    """Tied weights, a buffer outside the state dict, and a size that is a product."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.proj = nn.Linear(4, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.ones(4), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.embed(ids).reshape(ids.shape[0] * ids.shape[1], 4)
        return self.head(self.proj(rows) + self.shift).reshape(*ids.shape, 8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Program that nobody changes."""
    folder = tmp_path_factory.mktemp("saved")
    ids = torch.randint(0, 8, (2, 3))
    axes = {"ids": {0: "batch", 1: "seq"}}
    capture_module(Model(), [ids], input_names=["ids"], dynamic=axes).save(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A copy of a saved Program for a test to damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def refusal(folder: Path) -> str:
    """The message of the ArtifactError that loading raises."""
    with pytest.raises(ArtifactError) as caught:
        Program.load(folder)
    assert caught.value.exit_code == 7
    assert caught.value.remedy
    return str(caught.value)


def edit(folder: Path, change: Callable[[Json], object]) -> None:
    data = json.loads((folder / "graph.json").read_text())
    change(data)
    (folder / "graph.json").write_text(json.dumps(data))


def top(data: Json) -> Json:
    return data


def program(data: Json) -> Any:
    return data["program"]


def call(data: Json) -> Any:
    return data["program"]["graph_module"]["module_call_graph"][0]["signature"]


def graph(data: Json) -> Any:
    return data["program"]["graph_module"]["graph"]


def node(data: Json) -> Any:
    return graph(data)["nodes"][0]


def metadata(data: Json) -> Any:
    return node(data)["metadata"]


def argument(data: Json) -> Any:
    return node(data)["inputs"][0]


def meta(data: Json) -> Any:
    return graph(data)["tensor_values"]["ids"]


def size(data: Json) -> Any:
    return meta(data)["sizes"][0]["as_expr"]


def ranges(data: Json) -> Any:
    return program(data)["range_constraints"]


def contract_input(data: Json) -> Any:
    return data["contract"]["inputs"][0]


def spec(kind: str, context: str, children: int = 0) -> str:
    leaf = {"type": None, "context": None, "children_spec": []}
    return json.dumps([1, {"type": kind, "context": context, "children_spec": [leaf] * children}])


ENUM = '{"__enum__": true, "fqn": "antigravity:X", "name": "Y"}'
CUSTOM = {"x": {"name": "x", "class_fqn": "y"}}
HOSTILE: list[tuple[Callable[[Json], Any], Json, str]] = [
    (size, {"expr_str": "__import__('os').mkdir('pwned')"}, "is not allowed in a shape expression"),
    (size, {"expr_str": "Symbol('s0').__class__"}, "is not allowed in a shape expression"),
    (size, {"expr_str": "Symbol('s0; import os')"}, "'s0; import os' is not the name of a size"),
    (size, {"expr_str": "Pow(Integer(9), Integer(999999999))"}, "Pow by 999999999 is not allowed"),
    (size, {"expr_str": 5}, "expected str, found int"),
    (call, {"forward_arg_names": ["b=print(1)"]}, "'b=print(1)' cannot name a value"),
    (call, {"in_spec": spec("builtins.dict", ENUM, 3)}, 'keys \'{"__enum__": true'),
    (call, {"in_spec": spec("builtins.dict", f"[{ENUM}]", 1)}, "not a tree spec"),
    (call, {"in_spec": spec("builtins.tuple", ENUM)}, 'context \'{"__enum__": true'),
    (call, {"in_spec": spec("collections.defaultdict", "[]")}, "type 'collections.defaultdict' in a"),
    (call, {"out_spec": "[1, {}]"}, "not a tree spec"),
    (node, {"target": "torch.os.system"}, "operator 'torch.os.system' is not allowed"),
    (node, {"target": "_operator.methodcaller"}, "operator '_operator.methodcaller' is not allowed"),
    (node, {"target": "torch.ops.aten.from_file.default"}, "aten.from_file.default' is not allowed"),
    (node, {"target": "torch.ops.aten.nothing.default"}, "is not known here"),
    (node, {"target": "torch.ops.aten.__class__.mro"}, "is not known here"),
    (node, {"target": "torch.ops.aten.add"}, "operator 'torch.ops.aten.add' is not allowed"),
    (node, {"name": "x\n"}, "cannot name a value"),
    (argument, {"arg": {"as_operator": "torch.os.system"}}, "as_operator is not allowed"),
    (argument, {"arg": {"as_string": 'a"b'}}, "string argument 'a\"b' is not allowed"),
    (argument, {"arg": {"as_int": 1, "as_float": 1.0}}, "Argument must hold one value, found 2"),
    (metadata, {"source_fn_stack": "x,torch.os.system"}, "metadata source_fn_stack is not allowed"),
    (metadata, {"stack_trace": 'x)"; system("id");'}, "a stack trace holds characters"),
    (metadata, {"nn_module_stack": "x\r\n"}, "a stack trace holds characters"),
    (metadata, {"nn_module_stack": "x"}, "AssertionError: expected metadata_split to return 3 parts"),
    (program, {"guards_code": ["print(1)"]}, "guard source code is not allowed"),
    (program, {"verifiers": ["EDGE"]}, "dialect ['EDGE'] is not known"),
    (program, {"schema_version": {"major": 99, "minor": 0}}, "schema 99 of torch"),
    (graph, {"custom_obj_values": CUSTOM}, "CustomObjArgument is not allowed"),
    (graph, {"hook": 1}, "Graph has unknown fields: hook"),
    (graph, {"outputs": [{"as_tensor": {"name": "nothing"}}]}, "KeyError: 'nothing'"),
    (meta, {"device": {"type": "hpu", "index": None}}, "device hpu:None is not allowed"),
    (meta, {"requires_grad": 1}, "expected bool, found int"),
    (meta, {"dtype": 99}, "expected ScalarType, found int '99'"),
    (meta, {"layout": 1}, "not a dense tensor"),
    (meta, {"strides": []}, "sizes and strides differ in number"),
    (meta, {"sizes": [{"as_int": 2**60}, {"as_int": 1}]}, f"{2**60} is not a size"),
    (ranges, {"u99999999999": {"min_val": 0, "max_val": 1}}, "'u99999999999' is not a size"),
    (ranges, {"s1": {"min_val": 2, "max_val": 1}}, "range 2..1 is empty"),
    (top, {"format": "zip"}, "'zip' version 1"),
    (top, {"version": 2}, "'optc-program' version 2"),
    (top, {"hook": 1}, "unknown field `hook`"),
    (top, {"contract": {"kind": "x"}}, "Invalid enum value 'x' - at `$.contract.kind`"),
    (top, {"aliases": {"x": "y"}}, "alias 'x' of 'y' has no source"),
    (contract_input, {"dtype": "float32"}, "input ids is torch.int64, the contract says float32"),
    (contract_input, {"dims": ["batch"]}, "input ids has 2 axes, the contract says 1"),
    (contract_input, {"name": "\x1b[2J"}, "the contract holds '\\x1b[2J'"),
]


@pytest.mark.parametrize(("place", "values", "message"), HOSTILE)
def test_hostile_value_is_refused(
    place: Callable[[Json], Any], values: Json, message: str, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy)
    edit(copy, lambda data: place(data).update(values))
    found = refusal(copy)
    assert message in found
    assert str(copy) in found
    assert sorted(path.name for path in copy.iterdir()) == sorted(FILES)


def rename(data: Any, old: str, new: str) -> Any:
    """JSON values with a string replaced wherever it is all of a key or value."""
    if isinstance(data, dict):
        return {new if key == old else key: rename(value, old, new) for key, value in data.items()}
    if isinstance(data, list):
        return [rename(value, old, new) for value in data]
    return new if data == old else data


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("linear", "x=print(1)", "cannot name a value: torch writes names into Python source"),
        ("linear", "import", "'import' cannot name a value"),
        ("p_proj_bias", "self.x", "'self.x' cannot name a value"),
        ("proj.bias", 'a.b") or print(1) or ("', "cannot name a tensor"),
        ("proj.bias", "__class__.forward", "'__class__.forward' cannot name a tensor"),
        ("proj.bias", "a..b", "'a..b' cannot name a tensor"),
        ("linear", "embedding", "has already been deserialized before"),
    ],
)
def test_names_that_would_become_source_are_refused(old: str, new: str, message: str, copy: Path) -> None:
    edit(copy, lambda data: data.update(program=rename(data["program"], old, new)))
    assert message in refusal(copy)


def test_the_place_in_the_graph_is_named(copy: Path) -> None:
    edit(copy, lambda data: graph(data)["nodes"][1].update(target="torch.os.system"))
    name = graph(json.loads((copy / "graph.json").read_text()))["nodes"][1]["name"]
    assert f"graph.json: program.graph_module.graph.nodes[1] ({name})\n" in refusal(copy)


# -- damaged files --------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_missing_file(name: str, copy: Path) -> None:
    (copy / name).unlink()
    assert f"where: {copy / name}\n" in refusal(copy)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.999])
def test_truncated_file(name: str, keep: float, copy: Path) -> None:
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[: int(len(data) * keep)])
    assert f"where: {copy / name}\n" in refusal(copy)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "\x00\xff", "null", "[]", "{}", "NaN"])
def test_what_is_no_graph_file(text: str, copy: Path) -> None:
    (copy / "graph.json").write_text(text, encoding="latin-1")
    assert f"where: {copy / 'graph.json'}\n" in refusal(copy)


TENSORS: list[tuple[str, Callable[[dict[str, Tensor]], object], str]] = [
    (FILES[1], lambda t: t.update({"proj.bias": torch.zeros(5)}), "is torch.float32 [5], the graph says"),
    (FILES[1], lambda t: t.update({"proj.bias": torch.zeros(4).half()}), "'proj.bias' is torch.float16 [4]"),
    (FILES[1], lambda t: t.pop("proj.bias"), "tensor 'proj.bias' is missing"),
    (FILES[1], lambda t: t.pop("embed.weight"), "alias 'head.weight' of 'embed.weight' has no source"),
    (FILES[1], lambda t: t.update(more=torch.zeros(1)), "tensor 'more' is not read by the graph"),
    (FILES[2], lambda t: t.pop("shift"), "tensor 'shift' is missing"),
    (FILES[2], lambda t: t.update({"example/1": torch.zeros(1)}), "2 example inputs for 1 inputs"),
    (FILES[2], lambda t: t.update({"example/0": torch.zeros(2, 3)}), "example input 0 is not what"),
]


@pytest.mark.parametrize(("name", "change", "message"), TENSORS)
def test_tensors_must_be_what_the_graph_says(
    name: str, change: Callable[[dict[str, Tensor]], object], message: str, copy: Path
) -> None:
    tensors = load_file(copy / name)
    change(tensors)
    save_file(tensors, copy / name)
    assert message in refusal(copy)


def _places(data: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in JSON data."""
    found = []
    for key in list(data) if isinstance(data, dict) else range(len(data)):
        found.append((data, key))
        found += _places(data[key]) if isinstance(data[key], dict | list) else []
    return found


def test_random_damage_is_harmless_or_refused(copy: Path) -> None:
    """A change of one JSON value never escapes as an error that is not optc's."""
    text = (copy / "graph.json").read_text()
    generator = random.Random(0)
    strange = [None, -1, 2**70, 1.5, "", "x", "\0", [], {}, [[]], {"as_int": 1}, True, "_operator.neg"]
    refused = 0
    for _ in range(150):
        data = json.loads(text)
        container, key = generator.choice(_places(data))
        if generator.random() < 0.3:
            del container[key]
        else:
            container[key] = generator.choice(strange)
        (copy / "graph.json").write_text(json.dumps(data))
        try:
            Program.load(copy)
        except OptcError:
            refused += 1
    assert 75 < refused < 150
