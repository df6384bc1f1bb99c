"""The code of docs/cuda.md on a GPU."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from conftest import EXAMPLE, ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_code_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    """As it stands, but for the model, and groups that divide its columns."""
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "cuda.md").read_text(), re.MULTILINE | re.DOTALL)
    scope: dict[str, Any] = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]])}
    exec(code.replace("path/to/model", str(EXAMPLE)).replace("group_size=128", "group_size=64"), scope)
    assert capsys.readouterr().out.strip()
    assert scope["logits"].shape == (2, 3, 8192)
    assert scope["logits"].dtype == torch.float32
