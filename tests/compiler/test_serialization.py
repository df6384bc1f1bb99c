"""Saving and loading Programs: exact round trips, and refusal of damaged or hostile files."""

from __future__ import annotations

import json
import pickle
import random
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from optc.compiler.capture.module import capture_module
from optc.compiler.diagnostics import ArtifactError, InputError, OptcError, ResourceError
from optc.compiler.program import Program
from optc.compiler.serialization import load_program, save_program
from optc.compiler.surgery import add_weight

HEADS, SIZE, VOCABULARY = 2, 8, 32
WIDTH = HEADS * SIZE
KNOBS = {"scale": SIZE**-0.5, "window": 0, "softcap": 0.0}
FILES = ("graph.json", "weights.safetensors", "constants.safetensors")


class Decoder(nn.Module):
    """One layer with a tied head, a quantized projection, rotary embedding and optional caches."""

    def __init__(self, cache: str = "none") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cache = cache
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("codes", torch.randint(0, 16, (WIDTH, WIDTH), dtype=torch.uint8))
        self.register_buffer("scale", torch.rand(WIDTH, 2))
        self.register_buffer("inv_freq", 1.0 / 10 ** torch.linspace(0, 1, SIZE // 2), persistent=False)
        self.requires_grad_(False)

    def forward(self, ids: Tensor, position: Tensor, *caches: Tensor) -> Any:
        x = self.embed(ids)
        q, k, v = self.qkv(x).view(*ids.shape, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)
        rotary = {"scaling": 1.0, "interleaved": False}
        q, k = (torch.ops.optc.rotary(each, position, self.inv_freq, **rotary) for each in (q, k))
        out, grown = self.attend(q, k, v, position, caches)
        weight = torch.ops.optc.dequantize(self.codes, self.scale, None, bits=4, group_size=SIZE)
        x = x + nn.functional.linear(out.transpose(1, 2).reshape(x.shape), weight)
        return (self.head(x), *grown) if grown else self.head(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor, caches: tuple[Tensor, ...]) -> Any:
        if self.cache == "none":
            return torch.ops.optc.attention(q, k, v, None, None, causal=True, **KNOBS), ()
        past, total = position[:, 0], q.shape[2] + 4
        if self.cache == "in place":
            return torch.ops.optc.cached_attention_(q, k, v, *caches, past, total, None, **KNOBS), ()
        out, *grown = torch.ops.optc.cached_attention(q, k, v, *caches, past, total, None, **KNOBS)
        return out, tuple(grown)


def inputs(batch: int, length: int, cache: str = "none", seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (batch, length), generator=generator)
    position = torch.arange(4, 4 + length)[None].expand(batch, -1).contiguous()
    room = {"none": 0, "in place": 40, "functional": 4}[cache]
    shape = (batch, HEADS, room, SIZE)
    caches = [torch.randn(shape, generator=generator) for _ in range(2 if room else 0)]
    return [ids, position, *caches]


def decoder(cache: str = "none") -> Program:
    names = ["ids", "position", "keys", "values"][: 2 if cache == "none" else 4]
    dynamic = {"ids": {0: "batch", 1: "seq"}, "position": {0: "batch", 1: "seq"}}
    dynamic |= {name: {0: "batch"} for name in names[2:]}
    return capture_module(Decoder(cache), inputs(2, 7, cache), input_names=names, dynamic=dynamic)


def flat(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, tuple | list) else [outputs]


def same_results(a: Program, b: Program, arguments: list[Tensor]) -> bool:
    """Whether outputs, and inputs after the call (caches are mutated), are equal bit for bit."""
    copies = [[each.clone() for each in arguments] for _ in range(2)]
    results = [flat(program(*copy)) + copy for program, copy in zip((a, b), copies, strict=True)]
    return all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Program that nobody changes."""
    folder = tmp_path_factory.mktemp("saved")
    save_program(decoder(), folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A copy of a saved Program for a test to damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


# -- round trips ----------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["none", "in place", "functional"])
def test_round_trip_is_exact(cache: str, tmp_path: Path) -> None:
    program = decoder(cache)
    save_program(program, tmp_path / "a")
    loaded = load_program(tmp_path / "a")
    for batch, length in ((2, 7), (1, 1), (3, 20)):
        assert same_results(program, loaded, inputs(batch, length, cache, seed=length))
    assert loaded.contract == program.contract
    assert loaded.fingerprint() == program.fingerprint()
    assert loaded.exported.range_constraints == program.exported.range_constraints
    save_program(loaded, tmp_path / "b")
    for name in FILES:
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes(), name


def test_a_captured_model_round_trips(example_model: Path, tmp_path: Path) -> None:
    from optc.compiler.capture import capture_pretrained

    program, _ = capture_pretrained(example_model)
    save_program(program, tmp_path)
    loaded = load_program(tmp_path)
    ids = torch.randint(0, program.contract.model.vocab_size, (3, 33))
    assert same_results(program, loaded, [ids, torch.arange(33)[None].expand(3, -1).contiguous()])
    assert (loaded.fingerprint(), loaded.contract) == (program.fingerprint(), program.contract)


def test_source_lines_and_module_paths_are_kept(saved: Path) -> None:
    pairs = zip(decoder().graph.nodes, load_program(saved).graph.nodes, strict=True)
    kept = [
        (new.meta.get(key), old.meta.get(key)) for old, new in pairs
        for key in ("stack_trace", "nn_module_stack") if old.op == "call_function" and old.meta.get(key)
    ]  # fmt: skip
    assert len(kept) > 30
    assert all(new == old for new, old in kept)


def test_tied_weights_are_stored_once_and_stay_tied(saved: Path) -> None:
    assert sorted(load_file(saved / "weights.safetensors")) == [
        "codes", "embed.weight", "qkv.bias", "qkv.weight", "scale"
    ]  # fmt: skip
    state = load_program(saved).exported.state_dict
    assert state["head.weight"] is state["embed.weight"]
    constants = load_file(saved / "constants.safetensors")
    assert sorted(constants) == ["example/0", "example/1", "inv_freq"]


def test_example_inputs_are_kept(saved: Path) -> None:
    (args, kwargs) = load_program(saved).exported.example_inputs
    assert kwargs == {}
    assert all(torch.equal(a, b) for a, b in zip(args, inputs(2, 7), strict=True))


def test_strides_are_restored_and_views_of_one_memory_are_stored_apart(tmp_path: Path) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.randn(6, 4)
            self.register_buffer("turned", torch.randn(2, 3, 4).permute(2, 0, 1))
            self.register_buffer("top", whole[:2])
            self.register_buffer("rest", whole[2:])

        def forward(self, x: Tensor) -> Tensor:
            return self.turned.permute(1, 2, 0).view(6, 4) @ x + (self.top.sum() - self.rest.sum())

    program = capture_module(Views(), [torch.randn(4, 5)])
    save_program(program, tmp_path)
    loaded = load_program(tmp_path)
    assert loaded.weight("turned").stride() == program.weight("turned").stride() == (1, 12, 4)
    assert same_results(program, loaded, [torch.randn(4, 5)])


def test_outputs_that_nothing_reads_add_no_nodes(tmp_path: Path) -> None:
    class Largest(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.topk(x, 3).indices

    program = capture_module(Largest(), [torch.randn(4, 5)])
    for node in list(program.graph.nodes):
        if node.target.__class__ is not str and not node.users and node.op == "call_function":
            program.graph.erase_node(node)
    save_program(program.changed(), tmp_path)
    assert str(load_program(tmp_path).graph) == str(program.graph)


def test_a_loaded_program_can_be_edited(saved: Path) -> None:
    loaded = load_program(saved).clone()
    node = add_weight(loaded, "bias", torch.ones(VOCABULARY))
    head = loaded.calls(torch.ops.aten.linear.default)[-1]
    head.args = (*head.args, node)
    changed = loaded.changed()
    arguments = inputs(3, 5)
    assert torch.allclose(changed(*arguments), load_program(saved)(*arguments) + 1, atol=1e-6)


def test_saving_over_a_loaded_program_leaves_it_intact(copy: Path) -> None:
    loaded = load_program(copy)
    before = loaded.fingerprint()
    changed = decoder()
    for _, tensor in changed.weights():
        tensor.zero_()
    save_program(changed, copy)
    assert loaded.fingerprint() == before != load_program(copy).fingerprint()


def test_nothing_is_unpickled_or_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickle")

    for module, name in ((torch, "save"), (torch, "load"), (pickle, "loads"), (pickle, "dumps")):
        monkeypatch.setattr(module, name, refuse)
    sympify, texts = sympy.sympify, []

    def watch(value: Any, *args: Any, **kwargs: Any) -> Any:
        texts.extend([value] if isinstance(value, str) else [])
        return sympify(value, *args, **kwargs)

    program = decoder()
    monkeypatch.setattr(sympy, "sympify", watch)
    save_program(program, tmp_path)
    load_program(tmp_path)
    assert texts == []


# -- what cannot be saved -------------------------------------------------------------------


def test_an_operator_of_another_library_is_refused_with_its_name(tmp_path: Path) -> None:
    library = torch.library.Library("strange", "DEF")
    library.define("double(Tensor x) -> Tensor")
    library.impl("double", lambda x: x * 2, "CompositeExplicitAutograd")

    class Strange(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.strange.double(x)

    with pytest.raises(InputError, match=r"(?s)nodes\[0\] \(double\).*torch\.ops\.strange\.double\.default"):
        save_program(capture_module(Strange(), [torch.randn(3)]), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_that_safetensors_lacks_is_refused_with_its_name(tmp_path: Path) -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("factor", torch.ones(2, dtype=torch.complex128))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.factor).real

    with pytest.raises(InputError, match=r"(?s)where: factor.*complex128"):
        save_program(capture_module(Complex(), [torch.randn(2)]), tmp_path)


def test_a_full_disk_is_exit_code_8(tmp_path: Path) -> None:
    program = decoder()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        with pytest.raises(ResourceError, match="the disk is full while saving a program") as caught:
            save_program(program, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 8
    assert not (tmp_path / "out" / "graph.json").exists()


def test_a_file_in_the_place_of_the_folder_is_exit_code_3(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="failed while saving a program") as caught:
        save_program(decoder(), tmp_path / "out")
    assert caught.value.exit_code == 3


# -- hostile and damaged files --------------------------------------------------------------


def refusal(folder: Path) -> str:
    """The message of the ArtifactError that loading raises."""
    with pytest.raises(ArtifactError) as caught:
        load_program(folder)
    assert caught.value.exit_code == 7
    return str(caught.value)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((folder / "graph.json").read_text())
    change(data)
    (folder / "graph.json").write_text(json.dumps(data))


def graph_of(data: dict[str, Any]) -> dict[str, Any]:
    return data["program"]["graph_module"]["graph"]


def replace(data: Any, old: str, new: str) -> Any:
    """JSON values with a string replaced wherever it is all of a string or key."""
    if isinstance(data, dict):
        return {new if key == old else key: replace(value, old, new) for key, value in data.items()}
    if isinstance(data, list):
        return [replace(value, old, new) for value in data]
    return new if data == old else data


def expression(data: dict[str, Any]) -> dict[str, Any]:
    sizes = [s for v in graph_of(data)["tensor_values"].values() for s in v["sizes"] if "as_expr" in s]
    return sizes[0]["as_expr"]


def call_signature(data: dict[str, Any]) -> dict[str, Any]:
    return data["program"]["graph_module"]["module_call_graph"][0]["signature"]


def dict_spec(context: str, kind: str = "builtins.dict") -> str:
    return json.dumps([1, {"type": kind, "context": context, "children_spec": []}])


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "code in a shape": (
        lambda d: expression(d).update(expr_str="__import__('os').system('touch pwned')"),
        "is not allowed in a shape expression",
    ),
    "attribute in a shape": (
        lambda d: expression(d).update(expr_str="Symbol('s0').__class__"), "is not allowed in a shape expression"
    ),
    "code in a symbol": (
        lambda d: expression(d).update(expr_str="Symbol('s0; import os')"), "'s0; import os' is not the name of a size"
    ),
    "endless power": (
        lambda d: expression(d).update(expr_str="Pow(Integer(9), Integer(999999999))"), "Pow by 999999999"
    ),
    "code in a value name": (
        lambda d: d.update(program=replace(d["program"], "ids", "ids=print(1)")), "'ids=print(1)' cannot name a value"
    ),
    "keyword as a value name": (
        lambda d: d.update(program=replace(d["program"], "embedding", "import")), "'import' cannot name a value"
    ),
    "code in a weight name": (
        lambda d: d.update(program=replace(d["program"], "qkv.bias", 'a.b") or print(1) or ("')), "cannot name a tensor"
    ),
    "weight name of a module attribute": (
        lambda d: d.update(program=replace(d["program"], "qkv.bias", "__class__.forward")),
        "'__class__.forward' cannot name a tensor",
    ),
    "code in an argument name": (
        lambda d: call_signature(d).update(forward_arg_names=["a", "b=print(1)"]), "'b=print(1)' cannot name a value"
    ),
    "module named by a tree spec": (
        lambda d: call_signature(d).update(
            in_spec=dict_spec('{"__enum__": true, "fqn": "antigravity:X", "name": "Y"}')
        ),
        "in_spec|cannot name a value|tree spec",
    ),
    "type named by a tree spec": (
        lambda d: call_signature(d).update(in_spec=dict_spec("[]", "collections.defaultdict")),
        "type 'collections.defaultdict' is not allowed in a tree spec",
    ),
    "function as an operator": (
        lambda d: graph_of(d)["nodes"][0].update(target="torch.os.system"), "operator 'torch.os.system' is not allowed"
    ),
    "operator that opens files": (
        lambda d: graph_of(d)["nodes"][0].update(target="torch.ops.aten.from_file.default"),
        "operator 'torch.ops.aten.from_file.default' is not allowed",
    ),
    "unknown operator": (
        lambda d: graph_of(d)["nodes"][0].update(target="torch.ops.aten.nothing.default"), "is not known here"
    ),
    "attribute as an operator": (
        lambda d: graph_of(d)["nodes"][0].update(target="torch.ops.aten.__class__.mro"), "is not known here"
    ),
    "operator as an argument": (
        lambda d: graph_of(d)["nodes"][0]["inputs"][0].update(arg={"as_operator": "torch.os.system"}),
        "as_operator is not allowed",
    ),
    "metadata with types": (
        lambda d: graph_of(d)["nodes"][0]["metadata"].update(source_fn_stack="x,torch.os.system"),
        "metadata source_fn_stack is not allowed",
    ),
    "stack trace that ends a C++ string": (
        lambda d: graph_of(d)["nodes"][0]["metadata"].update(stack_trace='x)"; system("id");'), "a stack trace holds"
    ),
    "guard source": (lambda d: d["program"].update(guards_code=["print(1)"]), "guard source code is not allowed"),
    "custom object": (
        lambda d: graph_of(d)["custom_obj_values"].update(x={"name": "x", "class_fqn": "y"}), "CustomObjArgument"
    ),
    "unknown device": (
        lambda d: graph_of(d)["tensor_values"]["ids"]["device"].update(type="hpu"), "device hpu:None is not allowed"
    ),
    "float as a size": (
        lambda d: graph_of(d)["tensor_values"]["ids"].update(requires_grad=1.5), "expected bool, found float"
    ),
    "unknown field": (lambda d: graph_of(d).update(hook="x"), "Graph has unknown fields: hook"),
    "no nodes field": (lambda d: graph_of(d).pop("nodes"), "Graph lacks nodes"),
    "later schema": (
        lambda d: d["program"]["schema_version"].update(major=99), "schema 99 of torch"
    ),
    "endless counter": (
        lambda d: d["program"]["range_constraints"].update(u99999999999={"min_val": 0, "max_val": 1}), "is not a size"
    ),
    "value that nothing defines": (
        lambda d: graph_of(d)["outputs"][0].update(as_tensor={"name": "nothing"}), "KeyError: 'nothing'"
    ),
    "value defined twice": (
        lambda d: graph_of(d)["nodes"].append(graph_of(d)["nodes"][-1]), "has already been deserialized"
    ),
    "wrong format": (lambda d: d.update(format="zip"), "'zip' version 1"),
    "later version": (lambda d: d.update(version=2), "'optc-program' version 2"),
    "unknown part": (lambda d: d.update(hook="x"), "unknown field `hook`"),
    "contract of the wrong type": (lambda d: d["contract"].update(kind="x"), r"Invalid enum value 'x' - at `\$.contract"),
    "contract of other inputs": (
        lambda d: d["contract"]["inputs"][0].update(dtype="float32"), "input ids is torch.int64, the contract says"
    ),
    "control characters": (lambda d: d["contract"].update(passes=["\x1b[2J"]), "the contract holds"),
    "alias of nothing": (lambda d: d["aliases"].update(x="y"), "alias 'x' of 'y' has no source"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_graph_is_refused(name: str, copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    change, message = HOSTILE[name]
    monkeypatch.chdir(tmp_path)
    edit(copy, change)
    found = refusal(copy)
    assert re.search(message, found), found
    assert str(copy) in found
    assert not (tmp_path / "pwned").exists()


def test_the_place_in_the_graph_is_named(copy: Path) -> None:
    edit(copy, lambda data: graph_of(data)["nodes"][2].update(target="torch.os.system"))
    name = graph_of(json.loads((copy / "graph.json").read_text()))["nodes"][2]["name"]
    assert f"program.graph_module.graph.nodes[2] ({name})" in refusal(copy)


@pytest.mark.parametrize("name", FILES)
def test_missing_file(name: str, copy: Path) -> None:
    (copy / name).unlink()
    assert str(copy / name) in refusal(copy)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.999])
def test_truncated_file(name: str, keep: float, copy: Path) -> None:
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[: int(len(data) * keep)])
    assert str(copy / name) in refusal(copy)


def test_deeply_nested_json(copy: Path) -> None:
    (copy / "graph.json").write_text("[" * 100_000)
    assert "graph.json" in refusal(copy)


def change_tensor(name: str, change: Callable[[dict[str, Tensor]], object], folder: Path) -> str:
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)
    return refusal(folder)


def test_tensors_must_be_what_the_graph_says(saved: Path, tmp_path: Path) -> None:
    cases: list[tuple[str, Callable[[dict[str, Tensor]], object], str]] = [
        (FILES[1], lambda t: t.update({"qkv.bias": torch.zeros(49)}), "'qkv.bias' is torch.float32 [49], the graph"),
        (FILES[1], lambda t: t.update({"qkv.bias": torch.zeros(48).half()}), "'qkv.bias' is torch.float16 [48]"),
        (FILES[1], lambda t: t.pop("scale"), "tensor 'scale' is missing"),
        (FILES[1], lambda t: t.update(more=torch.zeros(1)), "tensor 'more' is not read by the graph"),
        (FILES[2], lambda t: t.pop("inv_freq"), "tensor 'inv_freq' is missing"),
        (FILES[2], lambda t: t.pop("example/0"), "1 example inputs for 2 inputs"),
        (FILES[2], lambda t: t.update({"example/0": torch.zeros(2, 7)}), "example input 0 is not what"),
    ]
    for i, (name, change, message) in enumerate(cases):
        folder = Path(shutil.copytree(saved, tmp_path / str(i)))
        assert message in change_tensor(name, change, folder)


def test_random_damage_never_escapes_as_another_error(tmp_path: Path) -> None:
    """Any change of one JSON value is either harmless or an OptcError."""

    class Small(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, x.reshape(x.shape[0], -1)], 1).softmax(-1)

    save_program(capture_module(Small(), [torch.randn(3, 4)], dynamic={"input_0": {0: "n"}}), tmp_path)
    text = (tmp_path / "graph.json").read_text()
    generator = random.Random(0)
    strange = [None, -1, 2**70, 1.5, "", "x", "\u0000", [], {}, [[]], {"as_int": 1}, True, "torch.ops.aten.add.Tensor"]
    refused = 0
    for _ in range(150):
        data = json.loads(text)
        places: list[tuple[Any, Any]] = []
        stack = [data]
        while stack:
            value = stack.pop()
            items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
            places += [(value, key) for key, _ in items]
            stack += [item for _, item in items if isinstance(item, dict | list)]
        parent, key = generator.choice(places)
        if generator.random() < 0.3:
            del parent[key]
        else:
            parent[key] = generator.choice(strange)
        (tmp_path / "graph.json").write_text(json.dumps(data))
        try:
            load_program(tmp_path)
        except OptcError:
            refused += 1
    assert 75 < refused < 150
