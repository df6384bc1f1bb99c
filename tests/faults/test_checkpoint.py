"""Hostile and damaged model folders: every one is refused with its file, cause and remedy (exit code 3)."""

from __future__ import annotations

import hashlib
import json
import math
import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from optc.compiler.diagnostics import InputError
from optc.compiler.formats.safetensors_header import read_header
from optc.compiler.model_folder.checkpoint import (
    check_folder,
    check_values,
    compare_shapes,
    config_digest,
    tied_names,
    weights_digest,
)

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
INDEX = "model.safetensors.index.json"
AGAIN = "download or copy the file again"


def tensors() -> dict[str, torch.Tensor]:
    return {
        "embed.weight": torch.arange(12, dtype=torch.float32).reshape(4, 3),
        "layers.0.weight": torch.ones(3, 3, dtype=torch.bfloat16),
        "layers.1.weight": torch.ones(3, 3, dtype=torch.bfloat16),
        "ids": torch.arange(5),
    }


def make_model(folder: Path, shards: int = 1, config: object = CONFIG) -> Path:
    """A valid model folder, to be damaged."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if shards == 1:
        save_file(tensors(), folder / "model.safetensors")
        return folder
    placed = {}
    for index, (name, tensor) in enumerate(tensors().items()):
        file = f"model-{index % shards + 1:05}-of-{shards:05}.safetensors"
        placed[name] = file
        path = folder / file
        save_file({**(load_file(path) if path.exists() else {}), name: tensor}, path)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refused(call: Callable[[], object], what: str, where: Path | str, why: str, remedy: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    error = caught.value
    assert error.exit_code == 3
    assert error.what == what
    assert error.where == str(where)
    assert why in str(error.why or "")
    assert error.remedy == remedy


# -- what is accepted ----------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_valid_folder(tmp_path: Path, shards: int) -> None:
    info = check_folder(make_model(tmp_path, shards))
    check_values(info)
    assert info.config == CONFIG
    assert not info.has_tokenizer
    assert len(info.files) == shards
    for name, tensor in tensors().items():
        found = info.tensors[name]
        assert found.shape == tuple(tensor.shape)
        assert found.nbytes == tensor.nbytes
        data = (tmp_path / found.file).read_bytes()[found.offset : found.offset + found.nbytes]
        assert data == bytes(tensor.contiguous().view(torch.uint8).reshape(-1).tolist())


def test_tokenizer_is_seen(tmp_path: Path) -> None:
    (make_model(tmp_path) / "tokenizer.json").write_text("{}")
    assert check_folder(tmp_path).has_tokenizer


def test_the_single_file_wins_over_an_index(tmp_path: Path) -> None:
    """As in transformers: what is checked must be what is loaded."""
    make_model(tmp_path, shards=2)
    save_file({"only": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list(check_folder(tmp_path).tensors) == ["only"]


def test_linked_files_are_followed(tmp_path: Path) -> None:
    """A downloaded snapshot is a folder of links into a store."""
    make_model(tmp_path / "store")
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "store").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    check_values(check_folder(tmp_path / "snapshot"))


def test_digests_are_those_of_sha256sum(tmp_path: Path) -> None:
    info = check_folder(make_model(tmp_path, shards=3))
    listing = subprocess.run(["sha256sum", *info.files], cwd=tmp_path, capture_output=True, check=True).stdout
    assert weights_digest(info) == hashlib.sha256(listing).hexdigest()
    assert config_digest(info) == hashlib.sha256((tmp_path / "config.json").read_bytes()).hexdigest()


@pytest.mark.shared
@pytest.mark.parametrize(("name", "parameters"), [("fiction-26m", 27795968), ("fiction-3m", None)])
def test_reference_models(shared_model: Callable[[str], Path], name: str, parameters: int | None) -> None:
    info = check_folder(shared_model(name))
    check_values(info)
    assert info.has_tokenizer
    count = sum(math.prod(tensor.shape) for tensor in info.tensors.values())
    assert parameters in (None, count)


# -- folder and config ---------------------------------------------------------------------------


def test_missing_folder(tmp_path: Path) -> None:
    path = tmp_path / "nothing"
    remedy = "give a folder with config.json and *.safetensors"
    refused(lambda: check_folder(path), "the model folder does not exist", path, "", remedy)


def test_a_file_for_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    remedy = "give a folder with config.json and *.safetensors"
    refused(lambda: check_folder(path), "the model is a file, not a folder", path, "", remedy)


def test_no_config(tmp_path: Path) -> None:
    what = "the model folder has no config.json"
    refused(lambda: check_folder(tmp_path), what, tmp_path, "", "give a model saved by transformers")
    (tmp_path / "adapter_config.json").write_text("{}")
    remedy = "merge the adapter into its model first"
    refused(lambda: check_folder(tmp_path), what, tmp_path, "it holds an adapter, not a model", remedy)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "Expecting value"),
        ('{"model_type": ', "Expecting value"),
        ("[]", "it is not an object"),
        ("[" * 200_000, "recursion"),
        ('{"a": ' + "9" * 5000 + "}", "digits"),
    ],
)
def test_malformed_config(tmp_path: Path, text: str, why: str) -> None:
    make_model(tmp_path, config=text)
    where = tmp_path / "config.json"
    refused(lambda: check_folder(tmp_path), "malformed JSON", where, why, "download the file again")


def test_config_that_is_not_text(tmp_path: Path) -> None:
    (make_model(tmp_path) / "config.json").write_bytes(b'{"model_type": "\xff\xfe"}')
    where = tmp_path / "config.json"
    refused(lambda: check_folder(tmp_path), "malformed JSON", where, "utf-8", "download the file again")


def test_oversized_config_is_not_read(tmp_path: Path) -> None:
    with (make_model(tmp_path) / "config.json").open("ab") as file:
        file.truncate(33 << 20)  # sparse
    where, why = tmp_path / "config.json", f"it has {33 << 20} bytes, more than {32 << 20}"
    refused(lambda: check_folder(tmp_path), "failed while reading the model's files", where, why, "give a smaller file")


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({}, "it names no model_type"),
        ({"model_type": 3}, "it names no model_type"),
        ({"model_type": "llama"}, "it names no architectures"),
        ({"model_type": "llama", "architectures": "LlamaForCausalLM"}, "it names no architectures"),
        ({"model_type": "llama", "architectures": [None]}, "it names no architectures"),
    ],
)
def test_config_without_identity(tmp_path: Path, config: object, why: str) -> None:
    make_model(tmp_path, config=config)
    where, remedy = tmp_path / "config.json", "download the file again"
    refused(lambda: check_folder(tmp_path), "the model's config is unusable", where, why, remedy)


# -- code and weights from elsewhere -------------------------------------------------------------

REMOTE = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [("mystery", "MysteryForCausalLM"), ("llama", "MysteryForCausalLM"), ("mystery", "LlamaForCausalLM")],
)
def test_remote_code_is_refused_unless_asked_for(tmp_path: Path, model_type: str, architecture: str) -> None:
    make_model(tmp_path, config={"model_type": model_type, "architectures": [architecture], "auto_map": REMOTE})
    (tmp_path / "code.py").write_text("raise SystemExit('executed')")
    refused(
        lambda: check_folder(tmp_path, trust_remote_code=False),
        f"'{architecture}' needs code from the model folder",
        f"{tmp_path / 'config.json'}: auto_map",
        "code of a model is never executed unless asked for",
        "read the code, then allow it with --trust-remote-code, or use a model of transformers",
    )
    assert check_folder(tmp_path, trust_remote_code=True).config["auto_map"] == REMOTE


def test_remote_code_beside_a_known_architecture_is_ignored(tmp_path: Path) -> None:
    make_model(tmp_path, config={**CONFIG, "auto_map": REMOTE})
    (tmp_path / "code.py").write_text("raise SystemExit('executed')")
    assert check_folder(tmp_path).tensors


def test_config_that_names_its_own_weight_file(tmp_path: Path) -> None:
    make_model(tmp_path, config={**CONFIG, "transformers_weights": "adapter_model.bin"})
    where, why = tmp_path / "config.json", "transformers_weights sends the loader to another file"
    refused(lambda: check_folder(tmp_path), "the model's config is unusable", where, why, "remove that key")


def test_adapter_beside_the_model(tmp_path: Path) -> None:
    (make_model(tmp_path) / "adapter_config.json").write_text("{}")
    what, where = "the model folder holds an adapter as well", tmp_path / "adapter_config.json"
    remedy = "merge the adapter into the model first, or move it away"
    refused(lambda: check_folder(tmp_path), what, where, "", remedy)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.ckpt"])
def test_pickled_weights(tmp_path: Path, name: str) -> None:
    (make_model(tmp_path) / "model.safetensors").rename(tmp_path / name)
    what, why = "the weights are pickled", "unpickling can run code"
    remedy = "convert the weights to safetensors (in transformers: model.save_pretrained)"
    refused(lambda: check_folder(tmp_path), what, tmp_path / name, why, remedy)


def test_no_weights(tmp_path: Path) -> None:
    (make_model(tmp_path) / "model.safetensors").rename(tmp_path / "weights.safetensors")
    what, remedy = "the model folder has no weights", f"it needs model.safetensors, or {INDEX} and its shards"
    refused(lambda: check_folder(tmp_path), what, tmp_path, "found weights.safetensors instead", remedy)
    (tmp_path / "weights.safetensors").unlink()
    refused(lambda: check_folder(tmp_path), what, tmp_path, "", remedy)


def test_weights_without_a_tensor(tmp_path: Path) -> None:
    make_model(tmp_path)
    path = raw_file(tmp_path / "model.safetensors", {})
    refused(lambda: check_folder(tmp_path), "the safetensors file is damaged", path, "it holds no tensors", AGAIN)


# -- index and shards ----------------------------------------------------------------------------


def test_missing_shard(tmp_path: Path) -> None:
    (make_model(tmp_path, shards=3) / "model-00002-of-00003.safetensors").unlink()
    what = "the shard model-00002-of-00003.safetensors is missing"
    refused(lambda: check_folder(tmp_path), what, tmp_path, f"{INDEX} names it", "download the missing file")


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": null}'])
def test_malformed_index(tmp_path: Path, text: str) -> None:
    (make_model(tmp_path, shards=2) / INDEX).write_text(text)
    remedy = "download the file again"
    refused(lambda: check_folder(tmp_path), "malformed index", tmp_path / INDEX, "weight_map: ", remedy)


@pytest.mark.parametrize(
    "shard",
    ["../secret.safetensors", "/x.safetensors", "a/b.safetensors", "x.bin", "", "\0.safetensors", "é.bin"],
)
def test_shard_outside_the_folder(tmp_path: Path, shard: str) -> None:
    make_model(tmp_path / "model", shards=2)
    save_file(tensors(), tmp_path / "secret.safetensors")
    (tmp_path / "model" / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors(), shard)}))
    what, why = (
        "the index names a bad file",
        f"{shard!r} is not the name of a safetensors file in this folder",
    )
    refused(lambda: check_folder(tmp_path / "model"), what, tmp_path / "model" / INDEX, why, "use another copy")


def test_tensor_missing_in_its_shard(tmp_path: Path) -> None:
    file = "model-00001-of-00002.safetensors"
    save_file({"embed.weight": tensors()["embed.weight"]}, make_model(tmp_path, shards=2) / file)
    where = f"{tmp_path / file}: tensor 'layers.1.weight'"
    why = f"{INDEX} says that the tensor is here, and it is not"
    refused(lambda: check_folder(tmp_path), "the safetensors file is damaged", where, why, AGAIN)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    file = "model-00002-of-00002.safetensors"
    save_file(tensors(), make_model(tmp_path, shards=2) / file)
    where, why = (
        f"{tmp_path / file}: tensor 'embed.weight'",
        "model-00001-of-00002.safetensors has the same tensor",
    )
    refused(lambda: check_folder(tmp_path), "the safetensors file is damaged", where, why, AGAIN)


# -- safetensors headers -------------------------------------------------------------------------

TWO = {"a": entry(0, 8), "b": entry(8, 16)}


@pytest.mark.parametrize(
    ("header", "data", "length", "tensor", "why"),
    [
        (b"", b"", None, None, "its header is not a JSON object"),
        (b"[]", b"", None, None, "its header is not a JSON object"),
        (b"{", b"", None, None, "its header is malformed: "),
        (b'{"\xff": 1}', b"", None, None, "its header is malformed: "),
        (b'{"a": ' * 50_000, b"", None, None, "its header is malformed: "),
        ({"__metadata__": {"a": 1}}, b"", None, None, "its header is malformed: Expected `str`, got `int`"),
        (TWO, bytes(16), 1 << 62, None, f"its header claims {1 << 62} bytes; the format allows 100000000"),
        (TWO, bytes(16), 5000, None, "its header claims 5000 bytes and the file has 147: truncated"),
        (TWO, bytes(15), None, "b", "it ends at byte 147 and the file has 146: truncated"),
        (TWO, bytes(17), None, None, "1 bytes follow the last tensor"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), None, "b", "overlaps the tensor before it"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20), None, "b", "leaves a hole before it"),
        ({"a": entry(4, 8)}, bytes(8), None, "a", "leaves a hole before it"),
        ({"a": entry(0, 1 << 70)}, bytes(8), None, "a", ""),
        ({"a": entry(8, 0, [0])}, bytes(8), None, "a", "F32 [0] takes 0 bytes; its offsets [8, 0] span -8"),
        ({"a": entry(0, 8, [3])}, bytes(8), None, "a", "F32 [3] takes 12 bytes; its offsets [0, 8] span 8"),
        ({"a": entry(0, 8, [2], "F64")}, bytes(8), None, "a", "F64 [2] takes 16 bytes"),
        ({"a": entry(0, 8, [-2])}, bytes(8), None, "a", "Expected `int` >= 0 - at `$.shape[0]`"),
        ({"a": entry(0, 8, [1] * 65)}, bytes(8), None, "a", "it has 65 dimensions; at most 64 are allowed"),
        ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), None, "a", "missing required field `data_offsets`"),
        ({"a": {**entry(0, 8), "code": "x"}}, bytes(8), None, "a", "unknown field `code`"),
        ({"a": None}, b"", None, "a", "Expected `object`, got `null`"),
        ({"\x1b[2J": None}, b"", None, "\\x1b[2J", "Expected `object`, got `null`"),
    ],
)
def test_hostile_headers(
    tmp_path: Path, header: object, data: bytes, length: int | None, tensor: str | None, why: str
) -> None:
    path = raw_file(tmp_path / "model.safetensors", header, data, length)
    where = path if tensor is None else f"{path}: tensor '{tensor}'"
    refused(lambda: read_header(path), "the safetensors file is damaged", where, why, AGAIN)


def test_too_short_for_a_header(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1234567")
    why = "it has 7 bytes, too few for a header: truncated"
    refused(lambda: read_header(tmp_path / "x"), "the safetensors file is damaged", tmp_path / "x", why, AGAIN)


def test_unknown_dtype_lists_the_known(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "x", {"a": entry(0, 4, [8], "F4")}, bytes(4))
    known = "BOOL, U8, I8, U16, I16, U32, I32, U64, I64, F8_E4M3, F8_E5M2, BF16, F16, F32, F64"
    remedy = f"convert the tensor to one of {known}"
    refused(lambda: read_header(path), "dtype F4 is not supported", f"{path}: tensor 'a'", "", remedy)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bool, torch.uint16, torch.int64])
@pytest.mark.parametrize("shape", [(), (0, 4), (3, 1)])
def test_every_shape_and_dtype_is_read(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    save_file({"t": torch.zeros(shape).to(dtype), "u": torch.ones(2)}, make_model(tmp_path) / "model.safetensors")
    info = check_folder(tmp_path)
    check_values(info)
    assert info.tensors["t"].shape == shape


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = make_model(tmp_path) / "model.safetensors"
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError):
            check_folder(tmp_path)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_headers_never_crash(tmp_path: Path, seed: int) -> None:
    """Flipped, cut, repeated and inserted bytes: fine or InputError, and never another exception."""
    path = make_model(tmp_path) / "model.safetensors"
    whole, generator, refusals = path.read_bytes(), random.Random(seed), 0
    end = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(100):
        data = bytearray(whole)
        for _ in range(generator.randint(1, 3)):
            place = generator.randrange(end)
            kind = generator.randrange(4)
            if kind == 0:
                data[place] ^= 1 << generator.randrange(8)
            elif kind == 1:
                data[place : place + generator.randrange(8)] = b""
            elif kind == 2:
                data[place:place] = generator.choice([b"9", b"-", b'"', b"{", b"[", b"\0", b"\xff", b"1e9", b","])
            else:
                data[place] = generator.randrange(256)
        path.write_bytes(data)
        try:
            check_values(check_folder(tmp_path))
        except InputError:
            refusals += 1
    assert refusals > 50


# -- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [1, 7, 100_003])
def test_values_that_are_not_finite(tmp_path: Path, dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    for values in ([math.nan], [math.inf], [-math.inf], [math.nan, math.inf, -math.inf]):
        bad = torch.randn(size, generator=generator).to(dtype)
        places = torch.randperm(size, generator=generator)[: len(values)]
        bad[places] = torch.tensor(values[: len(places)]).to(dtype)
        save_file({"good": torch.ones(4), "layers.0.weight": bad}, make_model(tmp_path) / "model.safetensors")
        info = check_folder(tmp_path)
        what, where = (
            "tensor 'layers.0.weight' has values that are not finite",
            tmp_path / "model.safetensors",
        )
        nans, infs = int(bad.isnan().sum()), int(bad.isinf().sum())
        why = f"{nans} NaN and {infs} Inf of {size} values"
        remedy = "use another checkpoint: this one was saved from a diverged run, or is damaged"
        refused(lambda info=info: check_values(info), what, where, why, remedy)  # type: ignore[misc]


def test_a_bound_may_be_infinite(tmp_path: Path) -> None:
    """Gemma 4 keeps bounds of clamps, infinite where nothing is clamped, as tensors without axes."""
    save_file({"w": torch.ones(4), "input_max": torch.tensor(math.inf)}, make_model(tmp_path) / "model.safetensors")
    check_values(check_folder(tmp_path))
    save_file({"w": torch.ones(4), "input_max": torch.tensor(math.nan)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="tensor 'input_max' has values that are not finite"):
        check_values(check_folder(tmp_path))


def test_nan_in_float8(tmp_path: Path) -> None:
    bad = torch.tensor([1.0, math.nan]).to(torch.float8_e4m3fn)
    save_file({"w": bad}, make_model(tmp_path) / "model.safetensors")
    with pytest.raises(InputError, match="1 NaN and 0 Inf of 2 values"):
        check_values(check_folder(tmp_path))


def test_largest_finite_values_are_fine(tmp_path: Path) -> None:
    """A sum would overflow."""
    big = {
        str(dtype): torch.full((9,), torch.finfo(dtype).max, dtype=dtype) for dtype in (torch.float32, torch.float16)
    }
    save_file(big, make_model(tmp_path) / "model.safetensors")
    check_values(check_folder(tmp_path))


def test_weights_that_vanish_after_the_check(tmp_path: Path) -> None:
    info = check_folder(make_model(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    for call in (check_values, weights_digest):
        with pytest.raises(InputError, match="the model cannot be read") as caught:
            call(info)
        assert caught.value.remedy == "check its permissions and the disk"


def test_weights_that_change_after_the_check(tmp_path: Path) -> None:
    info = check_folder(make_model(tmp_path))
    path = raw_file(tmp_path / "model.safetensors", {"a": entry(0, 8)}, bytes(4))
    what, remedy = (
        "the weights became shorter while they were read",
        "leave the model alone while it is compiled",
    )
    refused(lambda: check_values(info), what, path, "the file ends before byte", remedy)


# -- names and shapes ----------------------------------------------------------------------------

BELONG = "check that config.json and the weights belong together"
SHAPES = {name: tuple(tensor.shape) for name, tensor in tensors().items()}


def test_shapes_that_belong(tmp_path: Path) -> None:
    info = check_folder(make_model(tmp_path))
    assert compare_shapes(info, SHAPES) == ()
    assert compare_shapes(info, {f"model.{name}": shape for name, shape in SHAPES.items()}) == ()
    without = {name: shape for name, shape in SHAPES.items() if name != "ids"}
    assert compare_shapes(info, without) == ("ids",)


def test_a_headless_model_from_a_checkpoint_with_head(tmp_path: Path) -> None:
    renamed = {f"model.{name}": tensor for name, tensor in tensors().items()}
    save_file(renamed, make_model(tmp_path) / "model.safetensors")
    assert compare_shapes(check_folder(tmp_path), SHAPES) == ()


def test_wrong_shape(tmp_path: Path) -> None:
    info = check_folder(make_model(tmp_path))
    what, where = "tensor 'embed.weight' has the wrong shape", tmp_path / "model.safetensors"
    why = "found [4, 3], expected [3, 4] from config.json"
    refused(lambda: compare_shapes(info, {**SHAPES, "embed.weight": (3, 4)}), what, where, why, BELONG)


def test_missing_tensor(tmp_path: Path) -> None:
    info = check_folder(make_model(tmp_path))
    expected = {**SHAPES, "layers.2.weight": (3, 3), "layers.3.weight": (3, 3)}
    what, why = "missing tensor 'layers.2.weight' and 1 more", "config.json asks for it with shape [3, 3]"
    refused(lambda: compare_shapes(info, expected), what, tmp_path, why, BELONG)


def test_tied_tensors_need_one_of_their_names(tmp_path: Path) -> None:
    info = check_folder(make_model(tmp_path))
    expected = {**SHAPES, "head.weight": (4, 3), "other.weight": (4, 3)}
    tied = {"head.weight": "embed.weight", "other.weight": "embed.weight"}
    assert compare_shapes(info, expected, tied=tied) == ()
    with pytest.raises(InputError, match=r"missing tensor 'head\.weight' and 1 more"):
        compare_shapes(info, expected)
    turned = {"embed.weight": "head.weight", "other.weight": "head.weight"}
    assert compare_shapes(info, expected, tied=turned) == ()


def test_tied_names_are_read_off_the_tensors() -> None:
    shared = torch.ones(2)
    state = {"a": shared, "b": torch.ones(2), "c": shared, "d": shared}
    assert tied_names(state) == {"c": "a", "d": "a"}


def test_more_layers_than_the_config_says(tmp_path: Path) -> None:
    info = check_folder(make_model(tmp_path))
    expected = {name: shape for name, shape in SHAPES.items() if name != "layers.1.weight"}
    what, where = "unexpected tensor 'layers.1.weight'", tmp_path / "model.safetensors"
    why = "config.json describes a model without it: fewer layers than the weights have"
    refused(lambda: compare_shapes(info, expected), what, where, why, BELONG)


def test_names_that_the_loader_converts(tmp_path: Path) -> None:
    """Experts are stored one by one and loaded as one tensor: 18 elements either way."""
    info = check_folder(make_model(tmp_path))
    expected = {"embed.weight": (4, 3), "ids": (5,), "experts.fused": (2, 3, 3)}
    assert compare_shapes(info, expected) == ("layers.0.weight", "layers.1.weight")
    with pytest.raises(InputError, match=r"missing tensor 'experts\.fused'"):
        compare_shapes(info, {**expected, "experts.fused": (2, 3, 4)})
