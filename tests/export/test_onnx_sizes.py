"""Sizes of onnx-cpu: what is predicted before any weight is read is what is written, by parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import ort_driver
import pytest
from chosen import chosen
from conftest import EXAMPLE
from families import make_model
from once import example_artifact
from stages import captured

from optc.compiler.analysis.weight_parts import weight_parts
from optc.compiler.artifact.folder import verify
from optc.compiler.artifact.sizes import Sizes
from optc.compiler.pipeline.written_sizes import written_sizes
from optc.planning import make_plan
from optc.predicted_sizes import predicted_sizes
from optc.request import from_python

WITHIN = 0.02


def close(predicted: Sizes, written: Sizes) -> None:
    """The sum within 2 %, and so each part of the sum."""
    assert written.total > 0
    assert abs(predicted.total / written.total - 1) <= WITHIN
    for (title, one), (_, other) in zip(predicted.parts(), written.parts(), strict=True):
        assert abs(one - other) <= WITHIN * written.total, title
    assert predicted.tied == written.tied


@pytest.mark.parametrize(
    ("quant", "head_bits"), [("rtn", 4), ("rtn", 8), ("rtn", 32), ("int8", 8), ("asymmetric", 4), ("asymmetric", 8)]
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_tiny_families(name: str, quant: str, head_bits: int, tmp_path: Path) -> None:
    """Untied and tied, biases and positions, weights that are stored the other way."""
    options: dict[str, Any] = {"quant": quant, "head_bits": head_bits}
    if quant != "int8":
        options |= {"quant": "rtn", "bits": 4, "group_size": 32, "symmetric": quant == "rtn"}
    program = captured(name, 1)
    exported, result = ort_driver.compiled(program, tmp_path, **options)
    written = written_sizes(
        weight_parts(program), exported.contract, result.tensor_bytes, result.weight_bytes, source=None
    )
    assert written.total == result.weight_bytes
    assert written.tied == (name == "gpt2")
    made = chosen("onnx-cpu", **options)
    steps = ort_driver.TARGET.recipe("decoder", made)
    close(predicted_sizes(make_model(name, layers=1), ort_driver.TARGET, made, steps, None), written)


@pytest.mark.parametrize("options", [{}, {"quant": "rtn"}])
def test_the_example(options: dict[str, Any]) -> None:
    """From the folder, and of the artifact's manifest."""
    manifest = verify(example_artifact("onnx-cpu", **options))
    assert manifest.sizes is not None
    assert manifest.sizes.total == manifest.weight_bytes
    source = (EXAMPLE / "model.safetensors").stat().st_size
    assert manifest.sizes.source == source
    assert sum(manifest.sizes.before.values()) == pytest.approx(source, rel=2e-3)  # the rest is the file's header
    assert manifest.sizes.before["embedding"] == 2 * 8192 * 192  # bf16, tied
    planned = Sizes.read(make_plan(EXAMPLE, from_python("onnx-cpu", **options))["sizes"])
    close(planned, manifest.sizes)
    table = 8192 * 192
    if options:
        assert manifest.sizes.embedding == table
        assert manifest.sizes.linears == 4 * (2 * 192 * 192 + 2 * 64 * 192 + 3 * 512 * 192) // 2
        assert manifest.sizes.scales == 2 * (table + 2 * manifest.sizes.linears) // 64
        assert str(manifest.sizes) == (
            "6.30 MB -> 2.46 MB (0.39 x): embedding and head 1.57 MB, linears 0.79 MB, scales 98.30 kB, rest 7.06 kB"
        )
    else:
        assert (manifest.sizes.scales, manifest.sizes.embedding) == (0, 4 * table)


def test_a_model_in_memory_has_no_source() -> None:
    sizes = Sizes(embedding=200_000, head=1_000, linears=50_000, rest=7)
    assert str(sizes) == "0.25 MB: embedding 0.20 MB, head 1.00 kB, linears 50.00 kB, rest 0.01 kB"
    assert sizes.to_dict()["ratio"] is None
    assert Sizes.read(msgspec.to_builtins(sizes)) == Sizes.read(sizes.to_dict()) == sizes
