"""Models whose class is code of their own folder: never run unless that is asked for; then captured and written back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import make_model
from hf_folders import logits

from optc.compiler.capture.pretrained import capture_pretrained
from optc.compiler.diagnostics import CaptureError, InputError
from optc.compiler.target.target import ExportRequest
from optc.exporters.hf import FolderOptions, export_hf

_CONFIG = """
from transformers import LlamaConfig

class MyConfig(LlamaConfig):
    model_type = "my_llama"
"""
_MODEL = """
from transformers import LlamaForCausalLM

from .configuration_my import MyConfig

class MyForCausalLM(LlamaForCausalLM):
    config_class = MyConfig

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **more):
        out = super().forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **more)
        out.logits = out.logits * 3
        return out
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    make_model("llama").save_pretrained(folder)
    _edit(folder, model_type="my_llama", architectures=["MyForCausalLM"], auto_map=_map("modeling_my.MyForCausalLM"))
    (folder / "configuration_my.py").write_text(_CONFIG)
    (folder / "modeling_my.py").write_text(_MODEL)
    return folder


def _map(model: str) -> dict[str, str]:
    return {"AutoConfig": "configuration_my.MyConfig", "AutoModelForCausalLM": model}


def _edit(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_it_is_captured_and_written_back_where_it_is_trusted(own: Path, tmp_path: Path) -> None:
    program, _ = capture_pretrained(own, trust_remote_code=True)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(logits(program, ids), make_model("llama")(ids).logits * 3, rtol=1e-4, atol=1e-4)
    out = tmp_path / "out"
    out.mkdir()
    request = ExportRequest(directory=out, options=FolderOptions(), source=own, trust_remote_code=True)
    result = export_hf(program, request)
    assert result.opened is not None
    assert result.opened.why == "the model's class is code of the folder's own"
    assert {"modeling_my.py", "configuration_my.py"} < set(result.info["companions"])
    again, _ = capture_pretrained(out, trust_remote_code=True)
    assert torch.equal(logits(again, ids), logits(program, ids))


@pytest.mark.parametrize(
    ("trust", "remedy"),
    [
        (False, "read the code, then allow it with --trust-remote-code, or use a model of transformers"),
        (None, "use a model whose class is part of transformers"),
    ],
)
def test_a_remedy_names_what_the_user_can_say(own: Path, trust: bool | None, remedy: str) -> None:
    (own / "modeling_my.py").write_text("raise SystemExit('executed')")
    with pytest.raises(InputError, match="'MyForCausalLM' needs code from the model folder") as caught:
        capture_pretrained(own, trust_remote_code=trust)
    assert caught.value.remedy == remedy


def test_code_that_cannot_be_used_is_refused(own: Path) -> None:
    _edit(own, auto_map=_map("other/repository--modeling_my.MyForCausalLM"))
    with pytest.raises(CaptureError, match="the code of MyForCausalLM is in another repository"):
        capture_pretrained(own, trust_remote_code=True)
    _edit(own, auto_map=_map("modeling_my.Other"))
    with pytest.raises(CaptureError, match="unknown architecture MyForCausalLM") as caught:
        capture_pretrained(own, trust_remote_code=True)
    assert caught.value.why == "transformers has no such class, and auto_map does not name one"
    _edit(own, auto_map=_map("gone.MyForCausalLM"))
    with pytest.raises(CaptureError, match="the code of MyForCausalLM cannot be loaded"):
        capture_pretrained(own, trust_remote_code=True)
