"""A trained model with 4-bit weights: ONNX Runtime on the written graph against the quantized program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trt_driver

from optc.compiler.capture import capture_pretrained
from optc.runtime.generation.tokenizer import load_tokenizer

TEXT = "The old man looked at the sea, and said nothing for a long while. Then he turned to the boy and smiled. "


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_fiction_26m(shared_model: Callable[[str], Path], dtype: str, tmp_path: Path) -> None:
    folder = shared_model("fiction-26m")
    chosen = trt_driver.options(dtype=dtype, quant="rtn", max_seq_len=64)
    before, last = trt_driver.stages(capture_pretrained(folder, dtype=dtype)[0], chosen)
    trt_driver.export(last, tmp_path, chosen)
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    tokens = tokenizer.encode(TEXT * 3)
    rows = [tokens[:29], tokens[5:16], tokens[9:29]]
    trt_driver.check(before, tmp_path, rows)
