"""Plans of plain decoders, made of config and headers alone, against those that the model of transformers gives."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import optc as call

from optc import planning
from optc.compiler.diagnostics import InputError
from optc.compiler.model_folder.checkpoint import CheckpointInfo, check_folder
from optc.compiler.model_folder.plain_decoder import plain_decoder
from optc.request import from_python

EXAMPLE = Path(__file__).parents[2] / "examples" / "fiction-3m"
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MORE: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Llama tied": {"tie_word_embeddings": True},
    "Llama biased": {"attention_bias": True, "mlp_bias": True, "head_dim": 8},
    "Mistral": {"sliding_window": None},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 32, "attention_bias": True},
}
REQUESTS: tuple[dict[str, Any], ...] = (
    {"target": "onnx-cpu"},
    {"target": "onnx-cpu", "quant": "rtn"},
    {
        "target": "onnx-cpu",
        "quant": "gptq",
        "bits": 8,
        "symmetric": False,
        "group_size": 32,
        "ignore": ("*.down_proj.*",),
    },
    {"target": "vllm", "quant": "awq"},
)


def saved(name: str, folder: Path) -> CheckpointInfo:
    """A tiny model as transformers writes it."""
    kind = name.partition(" ")[0]
    config = getattr(transformers, f"{kind}Config")(**SIZES, **MORE[name])
    getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.bfloat16).save_pretrained(folder)
    return check_folder(folder)


@pytest.mark.parametrize("name", MORE)
def test_the_plan_is_that_of_the_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = saved(name, tmp_path)
    skeleton = plain_decoder(info)
    assert skeleton is not None
    found = [planning.make_plan(tmp_path, from_python(**asked)) for asked in REQUESTS]
    monkeypatch.setattr(planning, "plain_decoder", lambda _: None)
    assert found == [planning.make_plan(tmp_path, from_python(**asked)) for asked in REQUESTS]


def test_what_is_not_plain_is_left_to_transformers(tmp_path: Path) -> None:
    info = saved("Llama", tmp_path)
    assert plain_decoder(info) is not None

    def changed(**keys: Any) -> CheckpointInfo:
        config = {key: value for key, value in {**info.config, **keys}.items() if value is not ...}
        return dataclasses.replace(info, config=config)

    for keys in (
        {"unknown_key": 1},
        {"model_type": "gemma"},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0}},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"intermediate_size": 96},
        {"num_hidden_layers": 1},
        {"num_key_value_heads": ...},
        {"mlp_bias": True},
        {"quantization_config": {"quant_method": "gptq"}},
        {"initializer_range": "small"},
    ):
        assert plain_decoder(changed(**keys)) is None, keys
    assert plain_decoder(dataclasses.replace(info, trusted=True)) is None
    with pytest.raises(InputError, match="num_hidden_layers"):
        plain_decoder(changed(num_hidden_layers=10**6))


_PLAN = """
import sys
from optc.cli.main import main

try:
    main(sys.argv[1:])
except SystemExit as end:
    print(end.code, sorted({"transformers", "sympy", "onnx", "onnx_ir", "torch._dynamo"} & sys.modules.keys()))
"""


def test_a_plan_imports_torch_and_little_else() -> None:
    """An answer within two seconds: torch alone takes more than one."""
    command = ["plan", str(EXAMPLE), "--target", "onnx-cpu", "--quant", "rtn", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", _PLAN, *command], capture_output=True, text=True, timeout=60, check=True
    )
    *lines, last = done.stdout.splitlines()
    assert json.loads("\n".join(lines))["linears"] == 28
    assert last == "0 []"


def test_a_plan_without_passes_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", str(EXAMPLE), "--target", "vllm") == 0
    assert "  passes: none\n" in capsys.readouterr().out
