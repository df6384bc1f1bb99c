"""Every decoder family, exported, in ONNX Runtime against transformers in eager mode."""

from __future__ import annotations

from pathlib import Path

import ort_driver
import pytest
import torch
from families import DECODERS, make_model
from stages import captured, sequences

LENGTHS = (21, 9, 14, 5)  # the ragged prompts are 4 shorter: one is of length 1


@pytest.mark.parametrize("name", DECODERS)
def test_onnx_runtime_agrees_with_transformers(name: str, tmp_path: Path) -> None:
    """Prefill, chunked prefill, single steps and a ragged right-padded batch of 4: 1e-4 of the logits."""
    program, _ = ort_driver.compiled(captured(name), tmp_path)
    session = ort_driver.open_session(tmp_path)
    rows = sequences(*LENGTHS)
    model = make_model(name)
    with torch.no_grad():
        expected = [model(torch.tensor([row])).logits[0] for row in rows]
    for way, logits in ort_driver.schedules(session, program.contract, rows).items():
        worst = max(float((got - want).abs().max()) for got, want in zip(logits, expected, strict=True))
        assert worst <= 1e-4, f"{way}: {worst:.2e}"
