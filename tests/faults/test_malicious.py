"""Malicious and unlucky files, one line each: every one is refused with a typed error that names it, or read harmlessly."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from artifacts import make_artifact, make_manifest
from fuzz.readers import build_safetensors, sealed

from optc.cli.main import cli
from optc.compiler.artifact.engine_facts import ExecutorchFacts, Needs, OnnxFacts, PackageFacts, read_facts
from optc.compiler.artifact.folder import verify
from optc.compiler.artifact.genai_config import check_genai_config
from optc.compiler.artifact.manifest import decode
from optc.compiler.calibration.documents import read_documents
from optc.compiler.diagnostics import ArtifactError, InputError, OptcError, UsageError
from optc.compiler.files import read_plain
from optc.compiler.formats.safetensors_header import TensorInfo, read_header
from optc.compiler.model_folder.checkpoint import check_folder
from optc.compiler.model_folder.config_bounds import check_sizes
from optc.compiler.model_folder.config_file import read_config
from optc.compiler.settings.yaml_mapping import parse_mapping, parse_setting
from optc.runtime.generation.tokenizer import eos_token_ids, load_tokenizer
from optc.training.recipe import load_config

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
DEEP = b"[" * 100_000


def header(**entry: Any) -> bytes:
    return build_safetensors({"a": {**ENTRY, **entry}}, bytes(24))


# -- safetensors -----------------------------------------------------------------------------------

HEADERS: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"1234567",
    "a length of 2^64 - 1": struct.pack("<Q", 2**64 - 1) + b"{}",
    "a length of 2^63": struct.pack("<Q", 2**63) + b"{}",
    "a length beyond the format's limit": struct.pack("<Q", 100_000_001) + b"{}",
    "a length beyond the file": struct.pack("<Q", 1000) + b"{}",
    "no object": struct.pack("<Q", 2) + b"[]",
    "no JSON": struct.pack("<Q", 4) + b"{{{{",
    "nested without end": struct.pack("<Q", 100_001) + b"{" + DEEP,
    "bad UTF-8": struct.pack("<Q", 8) + b'{"\xff": 1}'[:8],
    "a key twice": build_safetensors(b'{"a":%s,"a":%s}' % ((json.dumps(ENTRY).encode(),) * 2), bytes(24)),
    "a field twice": build_safetensors(
        b'{"a":{"dtype":"F32","dtype":"F16","shape":[2,3],"data_offsets":[0,24]}}', bytes(24)
    ),
    "a million tensors": struct.pack("<Q", 14 * 250_000 + 2) + b"{" + b'"data_offsets"' * 250_000 + b"}",
    "a negative size": header(shape=[-2, 3]),
    "a size of 2^63": header(shape=[2**63, 3]),
    "sizes whose product overflows": header(shape=[2**40, 2**40]),
    "a size that is text": header(shape=["2", 3]),
    "a size that is a fraction": header(shape=[2.5, 3]),
    "a hundred axes": header(shape=[1] * 99 + [6]),
    "an unknown type": header(dtype="F4"),
    "a type with control characters": header(dtype="\x1b[2J"),
    "offsets the wrong way round": header(data_offsets=[24, 0]),
    "offsets beyond the file": header(data_offsets=[0, 2**50]),
    "a hole": header(data_offsets=[4, 28]),
    "a field more": header(x=1),
    "no shape": build_safetensors({"a": {"dtype": "F32", "data_offsets": [0, 24]}}, bytes(24)),
    "metadata that is no text": build_safetensors({"__metadata__": {"a": 1}, "a": ENTRY}, bytes(24)),
    "data behind the last tensor": build_safetensors({"a": ENTRY}, bytes(25)),
    "too little data": build_safetensors({"a": ENTRY}, bytes(23)),
    "two tensors in one place": build_safetensors({"a": ENTRY, "b": ENTRY}, bytes(24)),
}


@pytest.mark.parametrize("name", HEADERS)
def test_safetensors(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(HEADERS[name])
    with pytest.raises(InputError) as caught:
        read_header(tmp_path / "model.safetensors")
    assert "model.safetensors" in str(caught.value)
    assert "\x1b" not in str(caught.value)


# -- configs ---------------------------------------------------------------------------------------

TENSORS = {"a": TensorInfo("f", "F32", (64, 32), 0), "b": TensorInfo("f", "F32", (8, 4, 4), 0)}
SIZES: dict[str, dict[str, Any]] = {
    "layers": {"num_hidden_layers": 10**9},
    "layers of GPT-2": {"n_layer": 10**9},
    "layers of an inner config": {"text_config": {"num_hidden_layers": 10**9}},
    "layers as a float": {"num_hidden_layers": 1e30},
    "experts": {"num_local_experts": 10**9},
    "routed experts": {"n_routed_experts": 10**6},
    "labels": {"num_labels": 10**9},
    "width": {"hidden_size": 2**60},
    "width of GPT-2": {"n_embd": 2**60},
    "head": {"head_dim": 10**12},
    "heads": {"num_attention_heads": 10**12},
    "vocabulary": {"vocab_size": 10**400},
    "inner width": {"intermediate_size": 2**63},
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("drawn", [False, True], ids=["of weights", "drawn"])
def test_sizes_of_configs(name: str, drawn: bool) -> None:
    huge = {"num_labels": 2**50, "hidden_size": 2**60, "n_routed_experts": 10**6}
    config = {key: huge.get(key, value) if drawn else value for key, value in SIZES[name].items()}
    with pytest.raises(InputError, match="the config's") as caught:
        check_sizes(config, {} if drawn else TENSORS, Path("config.json"))
    assert caught.value.where == "config.json"


@pytest.mark.parametrize(
    "more",
    [
        {"id2label": {str(i): "x" for i in range(1 << 17)}},
        {"a": [{"b": [0.5] * (1 << 16)}] * 2},
        {"a": [[]] * (1 << 17)},
    ],
    ids=["labels", "inside", "lists"],
)
def test_configs_of_too_many_values(more: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"the config holds \d+ values"):
        check_sizes({"hidden_size": 32, **more}, TENSORS, Path("config.json"))


def test_sizes_that_fit() -> None:
    config = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "vocab_size": 64,
        "max_position_embeddings": 10**7,
        "rope_theta": 1e7,
    }
    labels = {str(i): f"label {i}" for i in range(21841)}
    check_sizes({**config, "id2label": labels, "label2id": labels}, TENSORS, Path("c"))
    check_sizes({**config, "eos_token_id": 2**31, "text_config": {"num_local_experts": 8}}, TENSORS, Path("c"))


CONFIGS: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "null": b"null",
    "nested without end": DEEP,
    "a number of 5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "UTF-16": '{"a": 1}'.encode("utf-16-le"),
    "bad UTF-8": b'{"model_type": "\xff"}',
    "a byte order mark": b"\xef\xbb\xbf[]",
    "no model_type": b'{"architectures": ["A"]}',
    "model_type a number": b'{"model_type": 1, "architectures": ["A"]}',
    "no architectures": b'{"model_type": "llama", "architectures": []}',
    "another file of weights": b'{"model_type": "llama", "architectures": ["A"], "transformers_weights": "../x"}',
    "code of its own": b'{"model_type": "evil", "architectures": ["E"], "auto_map": {"AutoModel": "evil.E"}}',
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_files(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(CONFIGS[name])
    with pytest.raises(InputError) as caught:
        read_config(tmp_path, trust_remote_code=None)
    assert "config.json" in str(caught.value)


TOKENIZERS: dict[str, bytes] = {
    "empty": b"",
    "noise": bytes(range(256)),
    "nested without end": DEEP,
    "no object": b"[]",
    "an unknown model": b'{"model": {"type": "Evil"}}',
    "ids of text": b'{"model": {"type": "WordLevel", "vocab": {"a": "0"}, "unk_token": "a"}}',
    "an id of 2^70": b'{"model": {"type": "WordLevel", "vocab": {"a": 1180591620717411303424}, "unk_token": "a"}}',
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers(name: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(TOKENIZERS[name])
    with pytest.raises(InputError, match="the tokenizer cannot be read"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_fails_later(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    with pytest.raises(InputError, match="cannot encode"):
        tokenizer.encode("zzz")
    with pytest.raises(InputError, match="cannot encode"):
        tokenizer.encode("a\ud800")
    with pytest.raises(InputError, match="cannot decode"):
        tokenizer.decode([-1])


@pytest.mark.parametrize(
    "text", ['{"eos_token_id": "2"}', '{"eos_token_id": [true]}', '{"eos_token_id": 2.0}', "[]", "{", "[" * 9999]
)
def test_ends_of_texts(text: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(InputError, match=r"generation_config\.json"):
        eos_token_ids(tmp_path)


# -- manifests -------------------------------------------------------------------------------------


def with_field(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tree: tree.update(changes)


def with_model(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tree: tree["programs"]["model"].update(changes)


MANIFESTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "another version": with_field(format_version=99),
    "a version that is text": with_field(format_version="3"),
    "an engine of nobody": with_field(engine="evil"),
    "an engine with control characters": with_field(engine="\x1b]0;x\x07"),
    "a device of nobody": with_field(device="tpu"),
    "no programs": with_field(programs={}),
    "a role of nobody": with_field(programs={"evil": {}}),
    "a field more": with_field(evil=1),
    "needs with objects": with_field(needs={"torch": {"a": 1}}),
    "needs as a list": with_field(needs=[1]),
    "a quantization of half": with_field(quantization={"bits": [4]}),
    "a quantization of text": with_field(quantization={"method": 1, "bits": "4", "group_size": [], "symmetric": 0}),
    "parameters beyond 2^62": lambda tree: tree["source"].update(parameters=2**63),
    "fewer than no bytes": with_field(weight_bytes=-1),
    "a path that leads out": with_field(files=[{"path": "../x", "size": 0, "sha256": "a" * 64}]),
    "an absolute path": with_field(files=[{"path": "/etc/passwd", "size": 0, "sha256": "a" * 64}]),
    "a path of Windows": with_field(files=[{"path": "a\\b", "size": 0, "sha256": "a" * 64}]),
    "a path with control characters": with_field(files=[{"path": "a\x1b", "size": 0, "sha256": "a" * 64}]),
    "itself": with_field(files=[{"path": "manifest.json", "size": 0, "sha256": "a" * 64}]),
    "a file twice": with_field(files=[{"path": "a", "size": 0, "sha256": "a" * 64}] * 2),
    "a hash that is none": with_field(files=[{"path": "a", "size": 0, "sha256": "A" * 64}]),
    "a contract of text": with_model(contract="x"),
    "a contract of another kind": lambda tree: tree["programs"]["model"]["contract"].update(kind="evil"),
    "an input of a type of nobody": lambda tree: tree["programs"]["model"]["contract"]["inputs"][0].update(dtype="nn"),
    "an input of types in a row": lambda tree: tree["programs"]["model"]["contract"]["inputs"][0].update(dtype="f4,f4"),
    "facts of text": with_model(engine_info="x"),
    "native code of numbers": with_field(native_code=[1]),
    "seconds of text": with_field(seconds={"total": "1"}),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests(name: str) -> None:
    tree = msgspec.to_builtins(make_manifest())
    MANIFESTS[name](tree)
    with pytest.raises(ArtifactError) as caught:
        decode(sealed(json.dumps(tree).encode()), "manifest.json")
    assert str(caught.value).isprintable() or "\x1b" not in str(caught.value)


PACKAGE: dict[str, Any] = {"model": "m", "weights": "w", "inputs": [], "constants": {}}
FACTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "no model": (OnnxFacts, {}),
    "a model of numbers": (OnnxFacts, {"model": 1}),
    "an endless name": (OnnxFacts, {"model": "x" * 300}),
    "genai of text": (OnnxFacts, {"model": "m", "genai": "yes"}),
    "inputs of text": (PackageFacts, {**PACKAGE, "inputs": "x"}),
    "an input without a type": (PackageFacts, {**PACKAGE, "inputs": [{"name": "x", "role": "y", "dims": []}]}),
    "a negative axis": (PackageFacts, {**PACKAGE, "inputs": [{"name": "x", "role": "y", "dtype": "z", "dims": [-1]}]}),
    "a constant of 2^60": (PackageFacts, {**PACKAGE, "constants": {"a": {"dtype": "float32", "shape": [2**60]}}}),
    "a cache of nobody": (PackageFacts, {**PACKAGE, "kv_cache": "evil"}),
    "a block of text": (PackageFacts, {**PACKAGE, "block_size": "16"}),
    "a chunk of nothing": (ExecutorchFacts, {"model": "m", "context_length": 1, "chunk": 0, "vocab_size": 1}),
    "a vocabulary of 2^60": (ExecutorchFacts, {"model": "m", "context_length": 1, "chunk": 1, "vocab_size": 2**60}),
    "flags of text": (Needs, {"cpu_flags": "avx2"}),
    "a machine of numbers": (Needs, {"machine": 1}),
}


@pytest.mark.parametrize("name", FACTS)
def test_facts_of_engines(name: str) -> None:
    kind, info = FACTS[name]
    with pytest.raises(ArtifactError, match="what optc does not write"):
        read_facts(kind, info, "manifest.json")


# -- recipes and settings --------------------------------------------------------------------------

BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 10)}]\n" for i in range(8)
)
RECIPES: dict[str, str] = {
    "a call": "seed: !!python/object/apply:os.system ['exit 1']",
    "a name of Python": "seed: !!python/name:os.system",
    "an object of Python": "seed: !!python/object:os.Popen {}",
    "nested without end": "a: " + "[" * 5000,
    "a billion laughs": BOMB,
    "a list that holds itself": "a: &a [*a]",
    "no mapping": "- 1",
    "keys of numbers": "1: 2",
    "a key that is a list": "? [1]\n: 2",
    "a control character": "a: \x07",
    "a time that is none": "a: 2001-99-99",
    "a key merged with a number": "<<: 3\na: 1",
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str) -> None:
    with pytest.raises(InputError, match="recipe"):
        parse_mapping(RECIPES[name], "recipe.yaml")


SETTINGS = ["=1", "a", "seed=!!python/name:os.system", "seed=" + "[" * 5000, "seed=&a [*a]", "seed=2001-99-99"]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda text: text[:20])
def test_settings(setting: str) -> None:
    with pytest.raises(UsageError):
        parse_setting("--set", setting, "KEY=VALUE")


TRAINING = {
    "a key of nobody": {"evil": 1},
    "an endless key": {"x" * 100_000: 1},
    "a group of text": {"optimizer": "adamw"},
    "text for a number": {"max_steps": "many"},
    "a number of 400 digits": {"seed": 10**400},
    "less than nothing": {"batch_size": -1},
    "no number": {"clip_norm": float("nan")},
    "NUL in a path": {"model": "a\0b"},
}


@pytest.mark.parametrize("name", TRAINING)
def test_recipes_of_training(name: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"recipe": "finetune", **TRAINING[name]}))
    with pytest.raises(OptcError) as caught:
        load_config(str(path))
    assert caught.value.exit_code in (2, 3)
    assert len(str(caught.value)) < 2000


# -- texts -----------------------------------------------------------------------------------------

TEXTS: dict[str, tuple[str, bytes]] = {
    "bad UTF-8": ("a.txt", b"\xff\xfe\xfd"),
    "lines that are no JSON": ("a.jsonl", b'{"text": "a"}\n{'),
    "a number of 5000 digits": ("a.jsonl", b'{"tokens": [' + b"9" * 5000 + b"]}"),
    "nested without end": ("a.jsonl", DEEP),
    "tokens of text": ("a.jsonl", b'{"tokens": ["1"]}'),
    "tokens that are true": ("a.jsonl", b'{"tokens": [true]}'),
    "no rows": ("a.json", b'{"a": 1}'),
    "a mask that is another": ("a.jsonl", b'{"tokens": [1, 2], "attention_mask": [1, 0]}'),
    "a table of noise": ("a.parquet", b"PAR1" + bytes(100) + b"PAR1"),
}


class Letters:
    def encode(self, text: str) -> list[int]:
        return list(text.encode())


@pytest.mark.parametrize("name", TEXTS)
def test_texts(name: str, tmp_path: Path) -> None:
    file, data = TEXTS[name]
    (tmp_path / file).write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_documents(tmp_path / file, Letters())
    assert file in str(caught.value)


# -- places ----------------------------------------------------------------------------------------


def places(tmp_path: Path) -> dict[str, Path]:
    """Paths that are no plain files."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "to-pipe").symlink_to("pipe")
    (tmp_path / "nowhere").symlink_to("gone")
    names = ("pipe", "loop", "to-pipe", "nowhere", "loop/below")
    return {
        **{name: tmp_path / name for name in names},
        "folder": tmp_path,
        "device": Path("/dev/zero"),
        "terminal": Path("/dev/tty"),
        "NUL": Path("a\0b"),
        "lone surrogate": tmp_path / "\ud800",
        "endless name": tmp_path / ("x" * 5000),
    }


NAMES = [
    "pipe",
    "loop",
    "to-pipe",
    "nowhere",
    "loop/below",
    "folder",
    "device",
    "NUL",
    "lone surrogate",
    "endless name",
]


@pytest.mark.parametrize("name", NAMES)
def test_paths_of_files(name: str, tmp_path: Path) -> None:
    path = places(tmp_path)[name]
    with pytest.raises(InputError):
        read_plain(path, "reading a file")
    for flag in ("--text", "--calibration", "--recipe"):
        command = ["plan" if flag == "--recipe" else "compile", "model", "--target", "onnx-cpu", flag, str(path)]
        if name not in ("NUL", "lone surrogate", "folder") or flag != "--recipe":
            with pytest.raises((OptcError, OSError)):
                cli.main(
                    args=[*command, "-o", str(tmp_path / "out")] if flag != "--recipe" else command,
                    standalone_mode=False,
                )


@pytest.mark.parametrize("name", ["pipe", "loop", "to-pipe", "device", "loop/below"])
def test_paths_of_folders(name: str, tmp_path: Path) -> None:
    path = places(tmp_path)[name]
    for read in (check_folder, verify):
        with pytest.raises(OptcError):
            read(path)


def test_links_and_pipes_in_artifacts(tmp_path: Path) -> None:
    make_artifact(tmp_path / "a")
    (tmp_path / "a" / "ir" / "01-x.txt").symlink_to("/etc/passwd")
    with pytest.raises(ArtifactError, match="symbolic link"):
        cli.main(args=["diff", str(tmp_path / "a"), "00", "01"], standalone_mode=False)
    (tmp_path / "a" / "ir" / "01-x.txt").unlink()
    os.mkfifo(tmp_path / "a" / "ir" / "01-x.txt")
    with pytest.raises(ArtifactError, match="a pipe, socket or device"):
        cli.main(args=["diff", str(tmp_path / "a"), "00", "01"], standalone_mode=False)


def test_diff_follows_no_links_in_a_dump(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "00-capture.txt").write_text("one\n\x1b[2J")
    (tmp_path / "01-pass.txt").write_text("two\n")
    cli.main(args=["diff", str(tmp_path), "00", "01"], standalone_mode=False)
    out = capsys.readouterr().out
    assert "\\x1b[2J" in out
    assert "\x1b[2J" not in out
    (tmp_path / "01-pass.txt").unlink()
    (tmp_path / "01-pass.txt").symlink_to("/etc/hostname")
    with pytest.raises(InputError):
        cli.main(args=["diff", str(tmp_path), "00", "01"], standalone_mode=False)


# -- what onnxruntime-genai would follow -----------------------------------------------------------


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b"\xff", DEEP[: 1 << 15], b'{"model": ' + b"9" * 5000 + b"}", b" " * (2 << 20)]
)
def test_configs_of_genai(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "genai_config.json").write_bytes(data)
    with pytest.raises(ArtifactError, match="is not one that optc writes"):
        check_genai_config(tmp_path, "model.onnx")
