"""Bad input through the command line: exit code, what the message names, and nothing left behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import optc
from once import short_example

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A private copy of the example model, of one layer."""
    return Path(shutil.copytree(short_example(layers=1), tmp_path / "model"))


def compile_to(model: Path, output: Path, *more: str) -> int:
    return optc("compile", model, "--target", "onnx-cpu", "-o", output, *more)


def edit_header(model: Path, edit: Callable[[dict[str, dict[str, object]]], None]) -> None:
    """Rewrite the safetensors header of the model."""
    path = model / "model.safetensors"
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def edit_config(model: Path, **changes: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _missing_folder(model: Path) -> None:
    shutil.rmtree(model)


def _no_config(model: Path) -> None:
    (model / "config.json").unlink()


def _remote_code(model: Path) -> None:
    (model / "evil.py").write_text("raise SystemExit('executed')")
    edit_config(
        model,
        model_type="evil",
        architectures=["EvilForCausalLM"],
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )


def _truncated(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _flipped_header(model: Path) -> None:
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[9] ^= 0x40
    path.write_bytes(bytes(data))


def _missing_shard(model: Path) -> None:
    os.rename(model / "model.safetensors", model / "model-00001-of-00002.safetensors")
    names = {
        "model.norm.weight": "model-00001-of-00002.safetensors",
        "lm_head.weight": "model-00002-of-00002.safetensors",
    }
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def _nan(model: Path) -> None:
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    (size,) = struct.unpack("<Q", data[:8])
    start = json.loads(data[8 : 8 + size])["model.norm.weight"]["data_offsets"][0]
    data[8 + size + start : 8 + size + start + 2] = b"\xc0\x7f"  # a bfloat16 NaN
    path.write_bytes(bytes(data))


def _wrong_shape(model: Path) -> None:
    def edit(header: dict[str, dict[str, object]]) -> None:
        header["model.norm.weight"]["shape"] = [96, 2]

    edit_header(model, edit)


def _unknown_activation(model: Path) -> None:
    edit_config(model, hidden_act="swigluu")


def _heads_that_do_not_divide(model: Path) -> None:
    edit_config(model, num_attention_heads=5, head_dim=None)


def _unknown_rotary_type(model: Path) -> None:
    edit_config(model, rope_parameters={"rope_type": "su", "rope_theta": 1e4, "factor": 2.0})


def _reads_pixels(model: Path) -> None:
    edit_config(model, model_type="blip", architectures=["BlipForConditionalGeneration"])  # and answers in text


def _link_out_of_the_folder(model: Path) -> None:
    os.rename(model / "tokenizer_config.json", model.parent / "elsewhere.json")
    (model / "tokenizer_config.json").symlink_to("../elsewhere.json")


def _link_to_nothing(model: Path) -> None:
    (model / "tokenizer_config.json").unlink()
    (model / "tokenizer_config.json").symlink_to("gone.json")


def _damaged_modules(model: Path) -> None:
    (model / "modules.json").write_text('[{"type": 1}]')


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_missing_folder, ["model"]),
        (_unknown_activation, ["config.json", "swigluu"]),
        (_heads_that_do_not_divide, ["config.json", "attention heads"]),
        (_unknown_rotary_type, ["config.json", "su"]),
        (_reads_pixels, ["pixel_values", "vision"]),
        (_link_out_of_the_folder, ["tokenizer_config.json", "elsewhere.json"]),
        (_link_to_nothing, ["tokenizer_config.json", "gone.json"]),
        (_damaged_modules, ["modules.json"]),
        (_no_config, ["config.json"]),
        (_remote_code, ["config.json", "--trust-remote-code"]),
        (_truncated, ["model.safetensors"]),
        (_flipped_header, ["model.safetensors"]),
        (_missing_shard, ["model-00002-of-00002.safetensors"]),
        (_nan, ["model.norm.weight", "model.safetensors"]),
        (_wrong_shape, ["model.norm.weight", "192"]),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_unusable_model(
    model: Path, tmp_path: Path, capsys: Capture, damage: Callable[[Path], None], named: list[str]
) -> None:
    damage(model)
    (tmp_path / "out").mkdir()
    assert compile_to(model, tmp_path / "out" / "artifact") == 3
    message = capsys.readouterr().err
    for word in [*named, "remedy"]:
        assert word in message
    assert list((tmp_path / "out").iterdir()) == []


def test_a_snapshot_of_the_hub_is_taken_whole(model: Path, tmp_path: Path) -> None:
    """Its files are links into the blobs of its repository."""
    repository = tmp_path / "hub" / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots" / "0123abc").mkdir(parents=True)
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.move(file, repository / "blobs" / f"{number:040x}")
        (repository / "snapshots" / "0123abc" / file.name).symlink_to(f"../../blobs/{number:040x}")
    assert compile_to(repository / "snapshots" / "0123abc", tmp_path / "out") == 0
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).is_file()
        assert not (tmp_path / "out" / name).is_symlink()


def test_what_sentence_transformers_would_add_is_said(model: Path, tmp_path: Path, capsys: Capture) -> None:
    modules = [{"type": f"sentence_transformers.models.{name}"} for name in ("Transformer", "Pooling", "Dense")]
    (model / "modules.json").write_text(json.dumps(modules))
    assert compile_to(model, tmp_path / "out", "--pooling", "none") == 0
    assert "modules.json has Pooling, Dense behind the model" in capsys.readouterr().err
    assert optc("inspect", tmp_path / "out") == 0
    assert "Pooling, Dense" in capsys.readouterr().out


def test_group_size_that_does_not_divide(model: Path, tmp_path: Path, capsys: Capture) -> None:
    assert compile_to(model, tmp_path / "out", "--quant", "rtn", "--group-size", "128") == 3
    message = capsys.readouterr().err
    assert "192" in message
    assert "64" in message
    assert not (tmp_path / "out").exists()


def test_existing_output(model: Path, tmp_path: Path, capsys: Capture) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("keep me")
    assert compile_to(model, output) == 3
    assert "--force" in capsys.readouterr().err
    assert compile_to(model, output, "--force") == 3  # a folder that is no artifact is never replaced
    assert (output / "mine.txt").read_text() == "keep me"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere; see test_output_below_a_file")
def test_unwritable_output(model: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    assert compile_to(model, folder / "out") == 3
    assert "locked" in capsys.readouterr().err


def test_output_below_a_file(model: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_text("")
    assert compile_to(model, tmp_path / "file" / "out") == 3
    assert "file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "code", "near"),
    [
        (["--target", "onnx-cpux"], 2, "onnx-cpu"),
        (["--target", "onnx-cpu", "--quant", "rtx"], 2, "rtn"),
        (["--target", "onnx-cpu", "--passes", "fuse-rotery"], 2, "fuse-rotary"),
        (["--target", "onnx-cpu", "--dtype", "fp31"], 2, "fp32"),
        (["--target", "onnx-cpu", "--quant", "rtn", "--group-size", "48"], 4, "64"),
        (["--target", "onnx-cpu", "--quant", "fp8"], 4, "int8"),
        (["--target", "onnx-cpu", "--kv-cache", "paged"], 4, "static"),
        (["--target", "onnx-cpu", "--passes", "fuse-attention"], 6, "--allow-noop"),
        (["--target", "onnx-cpu", "--pass-option", "quantize-rtn.bits=2"], 2, "static-kv-cache"),
    ],
)
def test_bad_request(model: Path, tmp_path: Path, capsys: Capture, args: list[str], code: int, near: str) -> None:
    assert optc("compile", model, "-o", tmp_path / "out", *args) == code
    assert near in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_errors_as_json(tmp_path: Path, capsys: Capture) -> None:
    assert optc("plan", tmp_path / "none", "--target", "onnx-cpu", "--json") == 3
    found = json.loads(capsys.readouterr().out)
    assert found["exit_code"] == 3
    assert found["error"] == "bad-input"
    assert str(tmp_path / "none") in found["where"]


@pytest.fixture
def small_files() -> Iterator[None]:
    """A limit of 1 MB on files stands in for a full disk, in this process."""
    before, action = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, action)


def test_full_disk(tmp_path: Path, capsys: Capture, request: pytest.FixtureRequest) -> None:
    """Writing the weights fails half-way."""
    model = short_example(layers=1)
    (tmp_path / "out").mkdir()
    request.getfixturevalue("small_files")
    assert compile_to(model, tmp_path / "out" / "artifact") == 8
    assert "disk" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_half_of_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    """JSON and YAML can spell it; whatever writes or converts such a string raises UnicodeEncodeError."""
    from optc.compiler.diagnostics import InputError, UsageError
    from optc.compiler.model_folder.config_file import read_json
    from optc.compiler.settings.fields import check_type
    from optc.recipes import make_pass

    path = tmp_path / "config.json"
    path.write_text('{"a": "\\ud83d\\ude00"}')
    assert read_json(path) == {"a": "\N{GRINNING FACE}"}
    path.write_text('{"a": ["\\uDFFF"]}')
    with pytest.raises(InputError, match="malformed JSON"):
        read_json(path)
    with pytest.raises(UsageError, match="invalid option of pass 'quantize-rtn'"):
        make_pass("quantize-rtn", {"bits": "\ud800"})
    with pytest.raises(UsageError, match="numbers cannot be"):
        check_type("numbers", {"a": "\ud800"}, dict[str, int], "numbers by name")
