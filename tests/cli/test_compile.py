"""compile, inspect, verify, diff, plan, passes, targets on a layer of the example model, through the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import optc, optc_json
from once import short_example

from optc.cli.inspect import reasons
from optc.cli.main import normalize

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model() -> Path:
    return short_example(layers=1)


@pytest.fixture(scope="module")
def artifact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    assert (
        optc(
            "compile",
            model,
            "--target",
            "onnx_cpu",
            "--quant",
            "rtn",
            "-o",
            folder / "out",
            "--dump-ir",
            folder / "ir",
        )
        == 0
    )
    return folder / "out"


def test_compile_json(model: Path, tmp_path: Path, capsys: Capture) -> None:
    found = optc_json(capsys, "compile", model, "--target", "onnx-cpu", "-o", tmp_path / "out")
    assert set(found) >= {"artifact", "target", "seconds", "passes"}
    assert found["target"] == "onnx-cpu"
    assert found["sizes"]["total"] == found["weight_bytes"]
    assert round(found["sizes"]["ratio"], 2) == 2.0  # float32, of bfloat16
    rows = {row["name"]: row for row in found["passes"]}
    assert (rows["fuse-rotary"]["matched"], rows["fuse-norm"]["matched"]) == (2, 3)
    assert rows["static-kv-cache"]["drift"]["max_abs_diff"] < 1e-4
    assert rows["static-kv-cache"]["since_capture"]["max_abs_diff"] < 1e-4
    assert "store-kv-codes" not in rows, "nothing rounds its keys and values"
    assert set(rows["fuse-norm"]) >= {"name", "matched", "seconds", "drift", "since_capture"}


def test_group_size_is_chosen_and_printed(artifact: Path, capsys: Capture) -> None:
    found = optc_json(capsys, "inspect", artifact)
    summary = found["quantization"]
    assert (summary["method"], summary["bits"], summary["group_size"]) == ("rtn", [4, 8], [64])
    assert (summary["symmetric"], summary["linears"]) == (True, 5)
    weights = 2 * 192 * 192 + 2 * 64 * 192 + 3 * 512 * 192
    head = 8192 * 192
    assert summary["parameters"] == weights + head
    scales = 2 * (weights + head) // 64
    assert summary["bytes"] == weights // 2 + head + scales, "4-bit codes, 8-bit ones of the head, and 16-bit scales"
    assert summary["ratio_to_ideal"] <= 1.02
    assert (summary["bits_per_parameter"], summary["ideal_bits"]) == (7.45, 7.45)
    (row,) = (row for row in found["passes"] if row["name"] == "quantize-rtn")
    assert (row["matched"], row["candidates"]) == (7, 8)
    assert len(row["linears"]) == 7
    assert all(0 < linear["weight_error"] < 0.05 for linear in row["linears"])
    assert optc("inspect", artifact) == 0
    assert "7.450 bits per parameter, 1.000 x ideal" in capsys.readouterr().out
    assert row["drift"]["kl"] > 0
    assert row["options"]["group_size"] == 64


def test_inspect_for_people(artifact: Path, capsys: Capture) -> None:
    assert optc("inspect", artifact) == 0
    out = capsys.readouterr().out
    for part in (
        "onnx-cpu artifact",
        "rtn, 4/8 bits, groups of 64",
        "fuse-rotary: matched 2 of 2",
        "model.onnx.data",
    ):
        assert part in out


def test_inspect_counts_reasons() -> None:
    misses = [*(f"node_{i}: a: b" for i in range(3)), *(f"node: {name}" for name in "cdefgh")]
    assert reasons(misses) == [
        "left alone, 3 x: a: b",
        *(f"left alone, 1 x: {name}" for name in "cdef"),
        "and 2 more reasons; --json lists all",
    ]
    assert reasons([]) == []


def test_inspect_ir_of_model_and_stage(model: Path, artifact: Path, capsys: Capture) -> None:
    assert optc("inspect", model, "--ir") == 0
    assert capsys.readouterr().out.count("optc.attention(") == 1
    assert optc("inspect", artifact, "--ir", "--stage", "legalize-ort") == 0
    text = capsys.readouterr().out
    assert text.count("optc.group_query_attention(") == 1
    assert text.count("optc.matmul_nbits(") == 5


def test_dump_ir_and_diff(artifact: Path, capsys: Capture) -> None:
    names = sorted(path.name for path in (artifact.parent / "ir").iterdir())
    assert names[:2] == ["00-capture.txt", "01-fuse-rotary.txt"]
    assert [path.name for path in sorted((artifact / "ir").iterdir())] == names
    for run in (artifact, artifact.parent / "ir"):
        assert optc("diff", run, "00", "01") == 0
        assert "optc.rotary" in capsys.readouterr().out
    assert optc("diff", artifact, "00", "99") == 3
    assert "00-capture" in capsys.readouterr().err


def test_verify_and_tampering(artifact: Path, capsys: Capture) -> None:
    assert optc_json(capsys, "verify", artifact)["ok"] is True
    path = artifact / "genai_config.json"
    before = path.read_bytes()
    path.write_bytes(before.replace(b"false", b"true ", 1))
    try:
        for command in (
            ("verify", artifact),
            ("inspect", artifact),
            ("run", artifact, "--prompt-tokens", "5"),
        ):
            assert optc(*command) == 7
            assert "genai_config.json" in capsys.readouterr().err
    finally:
        path.write_bytes(before)


def test_recipe_equals_flags(model: Path, artifact: Path, tmp_path: Path, capsys: Capture) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {model}\ntarget: onnx-cpu\nquant: rtn\noutput: {tmp_path / 'out'}\n")
    by_recipe = optc_json(capsys, "compile", "--recipe", recipe)
    by_flags = optc_json(capsys, "inspect", artifact)
    assert [row["matched"] for row in by_recipe["passes"]] == [row["matched"] for row in by_flags["passes"]]
    files = {entry["path"]: entry["sha256"] for entry in by_flags["files"]}
    again = {entry["path"]: entry["sha256"] for entry in optc_json(capsys, "inspect", tmp_path / "out")["files"]}
    engine = [name for name in files if name != "report.html"]
    assert {name: files[name] for name in engine} == {name: again[name] for name in engine}
    recipe.write_text("modell: x\n")
    assert optc("compile", "--recipe", recipe) == 2
    assert "did you mean 'model'" in capsys.readouterr().err


def test_plan_reads_no_weights(capsys: Capture, model: Path, artifact: Path) -> None:
    found = optc_json(capsys, "plan", model, "--target", "onnx-cpu", "--quant", "rtn")
    assert found["group_size"] == 64
    assert "store-kv-codes" not in [row["name"] for row in found["passes"]]
    assert found["linears"] == 7
    assert found["kv_cache_bytes_per_token"] == 2 * 2 * 32 * 4
    written = optc_json(capsys, "inspect", artifact)
    assert abs(found["weight_bytes"] / written["weight_bytes"] - 1) < 0.02
    assert found["sizes"]["source"] == written["sizes"]["source"]
    line = "3.93 MB -> 1.83 MB (0.47 x): embedding and head 1.57 MB"
    assert optc("plan", model, "--target", "onnx-cpu", "--quant", "rtn") == 0
    assert f"weights: {line}" in capsys.readouterr().out
    assert optc("inspect", artifact) == 0
    assert f"weights: {line}" in capsys.readouterr().out
    assert "0.47 x of 3.93 MB" in (artifact / "report.html").read_text()
    assert optc("plan", model, "--target", "onnx-cpu", "--quant", "rtn", "--kv-cache", "paged") == 4


def test_passes_and_targets(capsys: Capture) -> None:
    names = [row["name"] for row in optc_json(capsys, "passes")["passes"]]
    assert {"fuse-attention", "fuse-rotary", "static-kv-cache", "page-kv-cache", "quantize-rtn"} <= set(names)
    targets = {row["name"]: row for row in optc_json(capsys, "targets")["targets"]}
    assert targets["onnx-cpu"]["aliases"] == ["edge", "onnx"]
    assert targets["onnx-cpu"]["quant"]["rtn"]["bits"] == [2, 3, 4, 8]
    assert optc("targets") == 0
    rows = capsys.readouterr().out.splitlines()
    assert "    rtn: 2, 3, 4, 8 bits; groups of 16, 32, 64, 128, 256" in "\n".join(rows)
    assert "    nf4: 4 bits" in rows, "it has no groups to choose"


def test_help_of_every_command_has_an_example(capsys: Capture) -> None:
    from optc.cli.main import COMMANDS

    for name in COMMANDS:
        assert optc(name, "--help") == 0
        assert f"optc {name} " in capsys.readouterr().out.split("Options:")[0].replace("\n", " \n")


_HELP = """
import sys
from optc.cli.main import COMMANDS, cli
for name in ([], *([name] for name in COMMANDS)):
    cli.main(args=[*name, "--help"], prog_name="optc", standalone_mode=False)
    heavy = {"torch", "transformers", "onnx", "onnxruntime"} & set(sys.modules)
    assert not heavy, (name, heavy)
"""


def test_help_of_no_command_imports_torch() -> None:
    """Nor does completion in a shell, which reads the same options. In a process that did nothing before."""
    done = subprocess.run([sys.executable, "-c", _HELP], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--target TEXT" in done.stdout
    assert "--head-bits" in done.stdout


def test_an_output_that_exists_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers alone takes seconds to import."""
    imported: list[str] = []
    monkeypatch.setattr("optc.cli.compile.import_transformers", lambda: imported.append("transformers"))
    assert optc("compile", tmp_path, "--target", "onnx-cpu", "-o", tmp_path) == 3
    assert "the output exists" in capsys.readouterr().err
    assert not imported
    assert optc("compile", tmp_path, "--target", "onnx-cpu", "-o", tmp_path / "out") == 3
    assert imported == ["transformers"]


def test_unknown_command_and_underscores(capsys: Capture) -> None:
    assert optc("complie") == 2
    assert "compile" in capsys.readouterr().err
    assert normalize(["--group_size=64", "--max_new_tokens", "a_b", "--", "--x_y"]) == [
        "--group-size=64",
        "--max-new-tokens",
        "a_b",
        "--",
        "--x_y",
    ]
