"""Rotations that fold into weights: the residual stream's, and those of heads between values and outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import make_model
from hf_folders import config, logits, tensors, write
from rewrites import stir, stirred
from stages import apply, captured

from optc.compiler.capture import capture_pretrained
from optc.compiler.diagnostics import NoMatchError
from optc.compiler.ir.program import Program
from optc.compiler.pipeline.pipeline import Pipeline
from optc.passes.fusion.norm import FuseNorm
from optc.passes.quantization.arithmetic.orthogonal import random_rotation, turned
from optc.passes.quantization.rotate_residual import RotateResidual
from optc.passes.quantization.rotate_values import RotateValues

IDS = torch.randint(3, 128, (2, 19), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("size", [64, 96, 7])
def test_a_rotation_is_orthogonal_and_spreads(size: int) -> None:
    matrix = random_rotation(size, 0)
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(size, dtype=torch.float64), atol=1e-12, rtol=0)
    assert not torch.equal(matrix, random_rotation(size, 1))
    if size == 64:
        torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, 1 / 8), atol=1e-12, rtol=0)


def test_channels_are_scaled_first_and_turned_along_their_axis() -> None:
    matrix, scale = torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double(), torch.tensor([2.0, 3.0])
    weight = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    assert turned(weight, -1, matrix, scale).tolist() == [[-30, 2], [-3000, 200]]
    assert turned(weight, -2, matrix).tolist() == [[-100, -1000], [1, 10]]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma", "phi3", "granite", "mixtral"])
def test_outputs_are_those_of_the_model_and_weights_are_others(family: str) -> None:
    program = stirred(family)
    plain = logits(program, IDS)
    stream = apply(RotateResidual(), program)
    assert stream.matched > 0, stream.misses
    assert stream.misses == ()
    heads = apply(RotateValues(), stream.program)
    assert (heads.matched, heads.candidates) == (2, 2), heads.misses
    for after in (stream.program, heads.program):
        assert float((logits(after, IDS) - plain).abs().max()) < 2e-5 * max(1.0, float(plain.abs().max()))
    moved = _moved(program, stream.program)
    assert sum("norm" in name for name in moved) == 5  # two of each layer, and the last; those of heads stay
    assert sum("o_proj" in name for name in _moved(stream.program, heads.program)) == 2


def test_fused_norms_turn_alike() -> None:
    """The same weights, whether norms are spelled out or fused."""
    program = stirred("llama")
    one = apply(RotateResidual(), program).program
    other = apply(RotateResidual(), apply(FuseNorm(), program).program).program
    assert _moved(one, other) == set()
    assert any(name.endswith("o_proj.weight") for name in _moved(program, other))


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt2", "LayerNorm subtracts the mean of the channels"),
        ("opt", "LayerNorm subtracts the mean of the channels"),
        ("gemma2", "acts on what is added to the residual stream"),
        ("olmo2", "acts on what is added to the residual stream"),
    ],
)
def test_models_that_cannot_be_turned_are_refused_with_the_reason(family: str, reason: str) -> None:
    with pytest.raises(NoMatchError, match="rotate-residual") as found:
        Pipeline([RotateResidual()]).run(captured(family))
    assert reason in str(found.value)


def test_a_tied_head_gets_values_of_its_own_in_the_folder(tmp_path: Path) -> None:
    """transformers computes the same logits from the turned folder."""
    from transformers import AutoModelForCausalLM

    model = stir(make_model("llama"))
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "source")
    program, _ = capture_pretrained(tmp_path / "source")
    program = apply(RotateValues(), apply(RotateResidual(), program).program).program
    write(program, tmp_path / "source", tmp_path / "out")
    assert config(tmp_path / "source")["tie_word_embeddings"] is True
    assert config(tmp_path / "out")["tie_word_embeddings"] is False
    written = tensors(tmp_path / "out")
    assert not torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        theirs, plain = again(IDS).logits, model(IDS).logits
    assert float((theirs - plain).abs().max()) < 2e-5 * max(1.0, float(plain.abs().max()))


def _moved(before: Program, after: Program) -> set[str]:
    """Weights that a pass changed, of those that both read."""
    old = dict(before.weights())
    return {name for name, tensor in after.weights() if name in old and not torch.equal(tensor, old[name])}
