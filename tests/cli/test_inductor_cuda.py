"""The target inductor-cuda from the command line, on a machine without a GPU; on one with, also run."""

from __future__ import annotations

import os
from pathlib import Path

import command_line
import pytest
import torch
from conftest import EXAMPLE
from once import example_artifact

import optc
from optc.compiler.artifact.folder import verify
from optc.compiler.diagnostics import TargetError
from optc.compiler.ir.program import Program

NEEDS_GPU = "an NVIDIA GPU is needed, and there is none here"


def artifact() -> Path:
    """The example in 4 bits, compiled on the CPU."""
    return example_artifact("inductor-cuda", quant="rtn", dtype="fp32")


def test_what_is_written() -> None:
    folder = artifact()
    manifest = verify(folder)
    assert (manifest.engine, manifest.device, manifest.target) == ("cuda", "cuda", "inductor-cuda")
    assert manifest.engine_info == {
        "graph": "graph.json",
        "weights": "weights.safetensors",
        "constants": "constants.safetensors",
    }
    assert manifest.needs["torch"] == ">=2.11"
    assert manifest.opened is not None
    assert manifest.opened.opened
    assert {row.name: row.matched for row in manifest.passes} == {
        "fuse-norm": 9,
        "fuse-rotary": 8,
        "quantize-rtn": 28,
        "quantize-head": 2,
        "page-kv-cache": 4,
        "merge-projections": 8,
        "fuse-decode": 21,
        "legalize-cuda": 18,
    }
    program = Program.load(folder)
    formats = [node.kwargs.get("format") for node in program.calls(torch.ops.optc.fused_linear.default)]
    assert sorted(map(str, formats)) == ["int4"] * 16 + ["int8"]
    (lookup,) = program.calls(torch.ops.optc.packed_embedding.default)
    (head,) = (node for node in program.calls(torch.ops.optc.fused_linear.default) if node.kwargs["format"] == "int8")
    assert lookup.args[:2] == head.args[1:3], "a tied table is stored once"
    assert (folder / "tokenizer.json").is_file()


def test_inspect_says_what_a_step_computes(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.optc("inspect", artifact()) == 0
    expected = "a decode step of one token computes 23 calls, 5 in a layer: 4 optc.fused_linear, 1 optc.rotary_paged_attention_"
    out = capsys.readouterr().out
    assert expected in out
    assert "written file: read back: the same calls and the same weights" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [("run", "--prompt", "a"), ("bench",)])
def test_without_a_gpu_it_exits_with_4(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.optc(command[0], artifact(), *command[1:]) == 4
    assert NEEDS_GPU in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_optimize_without_a_gpu() -> None:
    with pytest.raises(TargetError, match=NEEDS_GPU):
        optc.optimize(EXAMPLE)


def test_only_decoders(tmp_path: Path) -> None:
    inputs = [torch.zeros(2, 8)]
    with pytest.raises(TargetError, match="takes decoders, not a model of kind 'module'"):
        optc.compile(torch.nn.Linear(8, 8), target="inductor-cuda", output=tmp_path / "out", example_inputs=inputs)


@pytest.mark.skipif(
    "ATEN_CPU_CAPABILITY" in os.environ,
    reason="torch's attention in bf16 fails where ATEN_CPU_CAPABILITY hides AVX-512",
)
def test_a_program_without_a_paged_cache_is_not_written(tmp_path: Path) -> None:
    """No session would run it."""
    with pytest.raises(TargetError, match="runs decoders with a paged KV cache") as caught:
        optc.compile(EXAMPLE, target="inductor-cuda", passes="legalize-cuda", output=tmp_path / "out")
    assert caught.value.why == "after the passes the program is of kind 'decoder', its KV cache 'none'"
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_generates_on_the_gpu() -> None:
    """The same tokens alone and in a batch; a stream that stops and goes on."""
    model = optc.load(artifact())
    one = model.generate("Once upon a time", max_new_tokens=60)
    two = model.generate_batch(["The", "Once upon a time", "She said"], max_new_tokens=60)
    assert two[1].tokens == one.tokens
