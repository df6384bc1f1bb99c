"""An encoder, exported, in ONNX Runtime against transformers: ragged batches under a padding mask."""

from __future__ import annotations

from pathlib import Path

import ort_driver
import torch
from families import make_model
from stages import captured, sequences


def test_bert_agrees_with_transformers(tmp_path: Path) -> None:
    """Four rows of unequal length: each row's own tokens within 1e-4, alone and padded."""
    program, result = ort_driver.compiled(captured("bert"), tmp_path)
    assert not (tmp_path / "genai_config.json").exists()
    assert "past_key_values.0.key" not in result.info["inputs"]
    session = ort_driver.open_session(tmp_path)
    rows = sequences(17, 5, 11, 1)
    model = make_model("bert")
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = (torch.arange(width) < torch.tensor([[len(row)] for row in rows])).long()
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    inputs = [given[spec.role] for spec in program.contract.inputs]
    logits = ort_driver.run(session, *inputs)[0]
    for index, row in enumerate(rows):
        with torch.no_grad():
            alone = model(torch.tensor([row])).logits[0]
        assert float((logits[index, : len(row)] - alone).abs().max()) <= 1e-4
        single = ort_driver.run(session, *(item[index : index + 1, : len(row)] for item in inputs))[0][0]
        assert float((single - alone).abs().max()) <= 1e-4
