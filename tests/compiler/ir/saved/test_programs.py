"""Saving and loading Programs: round trips are exact, and what cannot be saved is refused."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from optc.compiler.capture.module import capture_module
from optc.compiler.diagnostics import InputError, ResourceError
from optc.compiler.ir.program import Program
from optc.compiler.ir.saved.tensors import read_tensors, write_tensors
from optc.compiler.ir.surgery import add_weight
from optc.compiler.ir.text import format_program

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

    def forward(self, ids: Tensor, position: Tensor, keys: Tensor | None = None, values: Tensor | None = None) -> Any:
        x = self.embed(ids)
        q, k, v = self.qkv(x).view(*ids.shape, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)
        rotary = {"scaling": 1.0, "interleaved": False}
        q, k = (torch.ops.optc.rotary(each, position, self.inv_freq, **rotary) for each in (q, k))
        out, grown = self.attend(q, k, v, position, (keys, values))
        weight = torch.ops.optc.dequantize(self.codes, self.scale, None, bits=4, group_size=SIZE)
        x = x + nn.functional.linear(out.transpose(1, 2).reshape(x.shape), weight)
        return (self.head(x), *grown) if grown else self.head(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor, caches: tuple[Any, Any]) -> Any:
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
    decoder().save(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A copy of a saved Program for a test to damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


# -- round trips ----------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["none", "in place", "functional"])
def test_round_trip_is_exact(cache: str, tmp_path: Path) -> None:
    program = decoder(cache)
    program.save(tmp_path / "a")
    loaded = Program.load(tmp_path / "a")
    for batch, length in ((2, 7), (1, 1), (3, 20)):
        assert same_results(program, loaded, inputs(batch, length, cache, seed=length))
    assert loaded.contract == program.contract
    assert loaded.fingerprint() == program.fingerprint()
    assert loaded.exported.range_constraints == program.exported.range_constraints
    loaded.save(tmp_path / "b")
    for name in FILES:
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes(), name


def test_a_captured_model_round_trips(example_model: Path, tmp_path: Path) -> None:
    from optc.compiler.capture import capture_pretrained

    program, _ = capture_pretrained(example_model)
    program.save(tmp_path)
    loaded = Program.load(tmp_path)
    ids = torch.randint(0, program.contract.model.vocab_size, (3, 33))
    assert same_results(program, loaded, [ids, torch.arange(33)[None].expand(3, -1).contiguous()])
    assert (loaded.fingerprint(), loaded.contract) == (program.fingerprint(), program.contract)


def test_source_lines_and_module_paths_are_kept(saved: Path) -> None:
    pairs = zip(decoder().graph.nodes, Program.load(saved).graph.nodes, strict=True)
    kept = [
        (new.meta.get(key), old.meta.get(key))
        for old, new in pairs
        for key in ("stack_trace", "nn_module_stack")
        if old.op == "call_function" and old.meta.get(key)
    ]
    assert len(kept) > 30
    assert all(new == old for new, old in kept)


def test_tied_weights_are_stored_once_and_stay_tied(saved: Path) -> None:
    assert sorted(load_file(saved / "weights.safetensors")) == [
        "codes",
        "embed.weight",
        "qkv.bias",
        "qkv.weight",
        "scale",
    ]
    state = Program.load(saved).exported.state_dict
    assert state["head.weight"] is state["embed.weight"]
    constants = load_file(saved / "constants.safetensors")
    assert sorted(constants) == ["example/0", "example/1", "inv_freq"]


def test_example_inputs_can_be_left_out(saved: Path, tmp_path: Path) -> None:
    program = Program.load(saved)
    program.save(tmp_path / "bare", examples=False)
    assert sorted(load_file(tmp_path / "bare" / "constants.safetensors")) == ["inv_freq"]
    found = Program.load(tmp_path / "bare")
    assert found.exported.example_inputs is None
    assert format_program(found) == format_program(program)


def test_example_inputs_are_kept(saved: Path) -> None:
    (args, kwargs) = Program.load(saved).exported.example_inputs
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
    program.save(tmp_path)
    loaded = Program.load(tmp_path)
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
    program.changed().save(tmp_path)
    assert str(Program.load(tmp_path).graph) == str(program.graph)


def test_a_loaded_program_can_be_edited(saved: Path) -> None:
    loaded = Program.load(saved).clone()
    node = add_weight(loaded, "bias", torch.ones(VOCABULARY))
    head = loaded.calls(torch.ops.aten.linear.default)[-1]
    head.args = (*head.args, node)
    changed = loaded.changed()
    arguments = inputs(3, 5)
    assert torch.allclose(changed(*arguments), Program.load(saved)(*arguments) + 1, atol=1e-6)


def test_saving_over_a_loaded_program_leaves_it_intact(copy: Path) -> None:
    loaded = Program.load(copy)
    before = loaded.fingerprint()
    changed = decoder()
    for _, tensor in changed.weights():
        tensor.zero_()
    changed.save(copy)
    assert loaded.fingerprint() == before != Program.load(copy).fingerprint()


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
    program.save(tmp_path)
    Program.load(tmp_path)
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
        capture_module(Strange(), [torch.randn(3)]).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_that_safetensors_lacks_is_refused_with_its_name(tmp_path: Path) -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("factor", torch.ones(2, dtype=torch.complex128))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.factor).real

    with pytest.raises(InputError, match=r"(?s)where: factor.*complex128"):
        capture_module(Complex(), [torch.randn(2)]).save(tmp_path)


def test_a_full_disk_is_exit_code_8(tmp_path: Path) -> None:
    program = decoder()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        with pytest.raises(ResourceError, match="the disk is full while saving a program") as caught:
            program.save(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 8
    assert not (tmp_path / "out" / "graph.json").exists()


def test_a_file_in_the_place_of_the_folder_is_exit_code_3(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="failed while saving a program") as caught:
        decoder().save(tmp_path / "out")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_tensor_files_have_the_permissions_of_new_files(tmp_path: Path, mask: int, mode: int) -> None:
    path = tmp_path / "model.safetensors"
    before = os.umask(mask)
    try:
        write_tensors(path, {"a": torch.ones(3)})
        write_tensors(path, {"a": torch.zeros(3)})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode
    assert [item.name for item in tmp_path.iterdir()] == ["model.safetensors"]
    assert torch.equal(read_tensors(path)["a"], torch.zeros(3))
