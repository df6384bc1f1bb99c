"""Benchmarks are not run by the tests; what they import of optc is there, and what they read in others' output."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest
from conftest import ROOT


def imported(file: Path) -> set[tuple[str, str]]:
    """(module, name) of each import from optc, inside functions too."""
    nodes = ast.walk(ast.parse(file.read_text()))
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("optc")]
    return {(str(node.module), alias.name) for node in froms for alias in node.names}


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda file: file.stem)
def test_imports_resolve(file: Path) -> None:
    for module, name in sorted(imported(file)):
        found = importlib.import_module(module)
        if not hasattr(found, name):
            importlib.import_module(f"{module}.{name}")


@pytest.mark.parametrize(
    ("printed", "code", "clean", "findings"),
    [
        ("3 passed in 9s\n========= ERROR SUMMARY: 0 errors\n", 0, True, 0),
        ("3 passed, 1 skipped in 9s\n========= RACECHECK SUMMARY: 0 hazards displayed\n", 0, True, 0),
        (
            "========= Invalid __global__ write of size 4 bytes\n3 passed in 9s\n========= ERROR SUMMARY: 2 errors\n",
            0,
            False,
            2,
        ),
        ("3 passed in 9.10s\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0, True, 0),
        ("1 failed, 3 passed in 9s\n========= ERROR SUMMARY: 0 errors\n", 1, False, 0),
        ("3 skipped in 9s\n========= ERROR SUMMARY: 0 errors\n", 0, False, 0),
        ("3 passed in 9s\n", 0, False, None),
        ("========= Error: Device not supported\n3 passed in 9s\n========= ERROR SUMMARY: 0 errors\n", 255, False, 0),
        ("", None, False, None),
    ],
)
def test_a_sanitizers_row_is_clean_only_where_tests_ran_to_their_end(
    printed: str, code: int | None, clean: bool, findings: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    found = importlib.import_module("gpu_sanitizer").outcome(printed, code)
    assert (found["clean"], found["findings"]) == (clean, findings)
    assert ("Invalid" in printed) == any("Invalid __global__" in line for line in found["first"])


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("lm_head.weight", "output.weight"),
        ("model.layers.11.self_attn.k_proj.weight", "blk.11.attn_k.weight"),
        ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
        ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
    ],
)
def test_weights_have_the_names_of_gguf(name: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    assert importlib.import_module("llama_cpp_peer")._place(name) == place


def test_a_library_that_is_killed_gives_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was built for its own machine may use instructions that another does not let run."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    peer = importlib.import_module("llama_cpp_peer")
    script = tmp_path / "peer.py"
    monkeypatch.setattr(peer, "__file__", str(script))
    for text, expected in (
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "llama.cpp was killed by SIGILL"),
        ("raise SystemExit('llama.cpp cannot decode')", "llama.cpp cannot decode"),
        ("", None),
    ):
        script.write_text(text)
        assert peer.runs(Path("model.gguf")) == expected
