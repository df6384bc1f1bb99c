"""Scripts beside a TensorRT graph: which files, and what build.sh asks of trtexec."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from trt_graphs import CAPACITY, HEADS, WIDTH, description

from optc.exporters.trt.companions import build_script, write_companions
from optc.runtime.carried import check_device, run_trt

CACHE = ["batch", HEADS, CAPACITY, WIDTH]


def engine(**changes: Any) -> dict[str, Any]:
    """Facts of the tiny graph with one cache named."""
    inputs = {"input_ids": ["batch", "tokens"], "positions": ["batch"], "past_key_values.0.key": CACHE}
    table = {name: {"dtype": "int32", "dims": dims} for name, dims in inputs.items()}
    return description(inputs=table, network={"dequantize": {}}, **changes)


def fake_trtexec(folder: Path, help_text: str) -> dict[str, str]:
    """A trtexec that prints its arguments; the environment that finds it."""
    program = folder / "trtexec"
    program.write_text(f'#!/bin/sh\nif [ "$1" = --help ]; then echo "{help_text}"; else printf "%s\\n" "$@"; fi\n')
    program.chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin"}


def run(folder: Path, environment: dict[str, str]) -> list[str]:
    done = subprocess.run(
        ["sh", folder / "build.sh", "--verbose"], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_the_scripts_are_those_of_the_runtime(tmp_path: Path) -> None:
    assert write_companions(tmp_path, engine()) == ["run_trt.py", "check.py", "build.sh"]
    assert (tmp_path / "run_trt.py").read_bytes() == Path(run_trt.__file__).read_bytes()
    assert (tmp_path / "check.py").read_bytes() == Path(check_device.__file__).read_bytes()
    assert (tmp_path / "build.sh").stat().st_mode & 0o111


def test_an_old_trtexec_gets_the_widest_profile_and_the_types_of_the_graph(tmp_path: Path) -> None:
    facts = engine(dtype="fp16") | {"network": {"dequantize": {"INT8": 2}}}
    write_companions(tmp_path, facts)
    assert run(tmp_path, fake_trtexec(tmp_path, "--fp16 --int8")) == [
        "--onnx=model.onnx",
        "--saveEngine=model.plan",
        "--skipInference",
        "--fp16",
        "--int8",
        "--minShapes=input_ids:1x2,positions:1,past_key_values.0.key:1x2x16x4",
        "--optShapes=input_ids:1x4,positions:1,past_key_values.0.key:1x2x16x4",
        "--maxShapes=input_ids:3x6,positions:3,past_key_values.0.key:3x2x16x4",
        "--verbose",
    ]


def test_a_new_trtexec_keeps_types_and_takes_every_profile(tmp_path: Path) -> None:
    write_companions(tmp_path, engine(dtype="fp16"))
    given = run(tmp_path, fake_trtexec(tmp_path, "--stronglyTyped --useProfile"))
    assert given[3] == "--stronglyTyped"
    assert [item for item in given if item.startswith("--profile=")] == ["--profile=0", "--profile=1"]
    assert given[5] == "--minShapes=input_ids:1x1,positions:1,past_key_values.0.key:1x2x16x4"
    assert "--fp16" not in given


@pytest.mark.parametrize(("dtype", "flags"), [("fp32", ""), ("fp16", "--fp16"), ("bf16", "--bf16")])
def test_types_before_tensorrt_10(dtype: str, flags: str) -> None:
    assert f"types='{flags}'\n" in build_script(engine(dtype=dtype))


def test_without_trtexec_that_is_said(tmp_path: Path) -> None:
    write_companions(tmp_path, engine())
    done = subprocess.run(
        ["sh", tmp_path / "build.sh"],
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 4
    assert "trtexec is neither on the PATH nor in /usr/src/tensorrt/bin" in done.stderr
