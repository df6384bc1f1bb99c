"""Artifacts that take tensors: `optc.load(folder)(x)`, `optc run|eval|bench`, against the module and transformers."""

from __future__ import annotations

from pathlib import Path

import hf_folders
import numpy as np
import pytest
import torch
from command_line import optc, optc_json
from torch import Tensor, nn

import optc as package
from optc.compiler.diagnostics import InputError, UsageError


class _Classifier(nn.Module):
    """Two inputs, classes out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 6)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)) + shift[:, None])


MODULE = _Classifier().requires_grad_(False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The module in float32, and with weights of 4 bits."""
    root = tmp_path_factory.mktemp("tensors")
    program = package.capture(
        MODULE,
        (torch.randn(3, 32), torch.randn(3)),
        input_names=["x", "shift"],
        dynamic={"x": {0: "rows"}, "shift": {0: "rows"}},
    )
    for name, quant in (("plain", None), ("rtn", "rtn")):
        package.compile(program, target="onnx-cpu", output=root / name, quant=quant)
    return root / "plain", root / "rtn"


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    x, shift = torch.randn(40, 32, generator=generator), torch.randn(40, generator=generator)
    labels = MODULE(x, shift).argmax(-1)
    labels[:10] = (labels[:10] + 1) % 6
    np.savez(tmp_path / "inputs.npz", x=x.numpy(), shift=shift.numpy(), labels=labels.numpy())
    return tmp_path / "inputs.npz"


def _loaded(path: Path) -> tuple[Tensor, Tensor]:
    with np.load(path) as file:
        return torch.from_numpy(file["x"]), torch.from_numpy(file["shift"])


def test_load_and_call(folders: tuple[Path, Path], inputs: Path) -> None:
    model, (x, shift) = package.load(folders[0]), _loaded(inputs)
    found = model(x, shift=shift)
    torch.testing.assert_close(found, MODULE(x, shift), rtol=0, atol=1e-5)
    array = model(x.numpy(), shift.tolist())
    assert isinstance(array, np.ndarray)
    assert np.array_equal(array, found.numpy())
    assert repr(model) == "TensorModel(onnx-cpu: x float32['rows', 32], shift float32['rows'] -> output)"
    with pytest.raises(InputError, match=r"the input 'shift' is float32 \[2\]\n.*with {'rows': 40}"):
        model(x, shift[:2])
    with pytest.raises(InputError, match=r"the input 'x' is int64 \[40, 32\]"):
        model(x.long(), shift)
    with pytest.raises(InputError, match="the input 'shift' is missing"):
        model(x)
    with pytest.raises(InputError, match="the model takes no text"):
        model("a text")


def test_run(folders: tuple[Path, Path], inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.npz"
    (row,) = optc_json(capsys, "run", folders[0], "--inputs", inputs, "--save-outputs", out)["outputs"]
    expected = MODULE(*_loaded(inputs))
    assert (row["name"], row["dtype"], row["shape"]) == ("output", "float32", [40, 6])
    torch.testing.assert_close(torch.tensor(row["values"]), expected, rtol=0, atol=1e-5)
    with np.load(out) as file:
        torch.testing.assert_close(torch.from_numpy(file["output"]), expected, rtol=0, atol=1e-5)
    assert optc("run", folders[0], "--inputs", inputs) == 0
    assert capsys.readouterr().out.startswith("inputs.npz: output float32[40, 6]: ")
    assert optc("run", folders[0], "--inputs", inputs, "--max-new-tokens", 5) == 2
    assert "--max-new-tokens has no effect on a model that does not generate text" in capsys.readouterr().err
    assert optc("run", folders[0], "--inputs", tmp_path / "none.npz") == 3
    np.savez(tmp_path / "odd.npz", x=np.zeros((1, 32), np.float32))
    assert optc("run", folders[0], "--inputs", tmp_path / "odd.npz") == 3
    assert "the file has no 'shift'" in capsys.readouterr().err


def test_outputs_of_files_that_differ_in_their_endings_are_kept_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = nn.Linear(4, 2).requires_grad_(False)
    program = package.capture(net, (torch.randn(3, 4),), input_names=["x"], dynamic={"x": {0: "rows"}})
    package.compile(program, target="onnx-cpu", output=tmp_path / "net")
    rows = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(2))
    (tmp_path / "inputs").mkdir()
    np.save(tmp_path / "inputs" / "a.npy", rows[0])
    np.save(tmp_path / "inputs" / "b.npy", rows[1])

    def saved() -> dict[str, np.ndarray]:
        run = ("run", tmp_path / "net", "--inputs", tmp_path / "inputs", "--save-outputs", tmp_path / "out.npz")
        optc_json(capsys, *run)
        with np.load(tmp_path / "out.npz") as file:
            return dict(file)

    assert set(saved()) == {"a/output", "b/output"}
    np.savez(tmp_path / "inputs" / "a.npz", x=rows[2])
    found = saved()
    assert set(found) == {"a.npy/output", "a.npz/output", "b.npy/output"}
    for name, row in (("a.npy", 0), ("b.npy", 1), ("a.npz", 2)):
        np.testing.assert_allclose(found[f"{name}/output"], net(rows[row]), atol=1e-5)


def test_eval(folders: tuple[Path, Path], inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, shift = _loaded(inputs)
    plain, rounded = optc_json(capsys, "eval", "--compare", *folders, "--inputs", inputs)["results"]
    assert (plain["relative_error"], plain["top1"], plain["accuracy"]) == (0.0, 1.0, 0.75)
    assert plain["rows"] == 40
    assert rounded["beside"] == str(folders[0])
    expected, found = MODULE(x, shift), package.load(folders[1])(x, shift)
    relative = float((found - expected).norm() / expected.norm())
    assert 0.01 < relative < 0.5
    assert rounded["relative_error"] == pytest.approx(relative, rel=1e-3)
    assert rounded["top1"] == int((found.argmax(-1) == expected.argmax(-1)).sum()) / 40
    divergence = nn.functional.kl_div(
        found.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert rounded["kl"] == pytest.approx(float(divergence), rel=1e-3)
    alone = optc_json(capsys, "eval", folders[0], "--inputs", inputs)
    assert alone["accuracy"] == 0.75
    assert "kl" not in alone
    np.savez(inputs, x=x.numpy(), shift=shift.numpy())
    assert optc("eval", folders[0], "--inputs", inputs) == 2
    assert "there is nothing to compare with" in capsys.readouterr().err
    (inputs.parent / "texts.txt").write_text("a text\n")
    assert optc("eval", str(folders[0]), "--inputs", str(inputs), "--text", str(inputs.parent / "texts.txt")) == 2
    assert "give either inputs or texts, not both" in capsys.readouterr().err


def test_bench(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = optc_json(capsys, "bench", folders[0], "--batch", 4, "--samples", 3)
    assert found["inputs"] == {"x": ["float32", 4, 32], "shift": ["float32", 4]}
    assert found["batch"] == 4
    low, high = found["latency_ms"]["ci95"]
    assert 0 < low <= found["latency_ms"]["median"] <= high
    assert optc("bench", folders[0], "--new-tokens", 5) == 2


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("encoder") / "bert"
    package.compile(hf_folders.source("bert", 1), target="onnx-cpu", output=out)
    return out


def test_an_encoder_beside_its_source(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = np.random.default_rng(0).integers(0, 100, (3, 7))
    mask = (np.arange(7) < np.array([[7], [3], [5]])).astype(np.int64)
    np.savez(tmp_path / "ids.npz", input_ids=ids, attention_mask=mask, token_type_ids=np.zeros_like(ids))
    found = optc_json(capsys, "eval", encoder, "--inputs", tmp_path / "ids.npz")
    assert found["relative_error"] < 1e-5
    assert found["top1"] == 1.0
    assert found["beside"] == str(hf_folders.source("bert", 1).resolve())
    assert optc("run", encoder, "--prompt", "a text") == 3
    assert "the model has no tokenizer" in capsys.readouterr().err
    assert optc("run", encoder, "--embed", "--prompt", "a text") == 3
    assert "compile it with --pooling mean, cls or lasttoken" in capsys.readouterr().err
    speed = optc_json(capsys, "bench", encoder, "--samples", 2, "--prompt-length", 5)
    assert speed["inputs"]["input_ids"] == ["int64", 1, 5]


def _error(folder: Path, x: Tensor, shift: Tensor) -> float:
    found, expected = package.load(folder)(x, shift), MODULE(x, shift)
    return float((found - expected).norm() / expected.norm())


def test_calibrated_methods_take_examples(tmp_path: Path) -> None:
    """Inputs that lie in a plane: GPTQ rounds for them, where rounding to nearest does not know of it."""
    generator = torch.Generator().manual_seed(2)
    plane, shift = torch.randn(6, 32, generator=generator), torch.zeros(96)
    x = torch.randn(96, 6, generator=generator) @ plane
    program = package.capture(
        MODULE, (x[:2], shift[:2]), input_names=["x", "shift"], dynamic={n: {0: "rows"} for n in ("x", "shift")}
    )
    np.savez(tmp_path / "examples.npz", x=x.numpy(), shift=shift.numpy())
    options = {"target": "onnx-cpu", "bits": 4, "max_relative_error": 1.0}
    package.compile(program, output=tmp_path / "rtn", quant="rtn", **options)
    one = package.compile(
        program, output=tmp_path / "one", quant="gptq", calibration=tmp_path / "examples.npz", **options
    )
    again = package.compile(
        program,
        output=tmp_path / "again",
        quant="gptq",
        calibration=zip(x.split(32), shift.split(32), strict=True),
        **options,
    )
    notes = [
        [note for row in result.manifest.passes for note in row.notes if "calibrated on" in note]
        for result in (one, again)
    ]
    assert "96 rows of" in notes[0][0]
    assert notes[0][0].rpartition(", ")[2] == notes[1][0].rpartition(", ")[2]  # the same rows
    assert (
        _error(tmp_path / "one", x, shift)
        == _error(tmp_path / "again", x, shift)
        < 0.7 * _error(tmp_path / "rtn", x, shift)
    )
    with pytest.raises(UsageError, match="a plain module is calibrated by examples"):
        package.compile(program, output=tmp_path / "none", quant="gptq", **options)
    with pytest.raises(InputError, match="an example has 1 inputs, the module takes 2"):
        package.compile(program, output=tmp_path / "none", quant="awq", calibration=[x], **options)
    with pytest.raises(UsageError, match="pass 'quantize-auto' needs a model that takes tokens"):
        package.compile(program, output=tmp_path / "none", quant="auto", calibration=[(x, shift)], target="onnx-cpu")
