"""vLLM's rules of names, on configs as they are written and on ones that contradict the tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hf_folders import config, source, write
from stages import apply, captured

from optc.compiler.diagnostics import TargetError
from optc.exporters.hf.loader_rules import check_loader_rules
from optc.passes.quantization.round_scales import RoundScales
from optc.passes.quantization.rtn import QuantizeRtn

Q, K, V, OUT, GATE, UP = (f"layers.1.{name}_proj" for name in ("q", "k", "v", "o", "gate", "up"))
LINEARS = (Q, K, V, OUT, GATE, UP)
GROUPS = {"group_0": {"targets": ["Linear"]}}


@pytest.mark.parametrize("layout", ["compressed-tensors", "awq", "gptq"])
def test_what_is_written_is_taken(layout: str, tmp_path: Path) -> None:
    """With all parts of a joined linear left as they are, and a linear of its own."""
    rewrite = QuantizeRtn(group_size=32, ignore=("q_proj", "k_proj", "v_proj", "down_proj"))
    program = apply(RoundScales(), apply(rewrite, captured("llama")).program).program
    write(program, source("llama"), tmp_path, layout)
    settings = config(tmp_path)["quantization_config"]
    if layout == "gptq":  # vLLM asks for a joined linear by one name
        assert {rf"-:^model\.layers\.{layer}\.self_attn\.qkv_proj$" for layer in (0, 1)} < settings["dynamic"].keys()
        assert not any("gate_up_proj" in rule for rule in settings["dynamic"])


WRONG: dict[str, tuple[dict[str, Any], set[str], str]] = {
    "codes that are ignored": (
        {"quant_method": "compressed-tensors", "ignore": [OUT], "config_groups": GROUPS}, set(LINEARS), OUT,
    ),
    "codes that a pattern ignores": (
        {"quant_method": "compressed-tensors", "ignore": ["re:.*o_proj"], "config_groups": GROUPS}, set(LINEARS), OUT,
    ),
    "no codes, and not ignored": (
        {"quant_method": "compressed-tensors", "ignore": [], "config_groups": GROUPS}, set(LINEARS) - {OUT}, OUT,
    ),
    "no group for codes": (
        {"quant_method": "compressed-tensors", "ignore": [], "config_groups": {"group_0": {"targets": [Q, K, V]}}},
        set(LINEARS), OUT,
    ),
    "a part of a name": ({"quant_method": "awq", "modules_to_not_convert": ["layers.1.o"]}, set(LINEARS), OUT),
    "a name of a joined linear that is left out": (
        {"quant_method": "gptq", "dynamic": {f"-:^{name}$": {} for name in (Q, K, V)}}, {OUT, GATE, UP}, "layers.1.qkv_proj",
    ),
    "blocks of fp8": ({"quant_method": "fp8", "modules_to_not_convert": []}, set(LINEARS) - {OUT}, OUT),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_contradicts_the_tensors_is_refused(case: str) -> None:
    settings, quantized, name = WRONG[case]
    with pytest.raises(TargetError, match="vLLM would not load") as found:
        check_loader_rules(settings, quantized, LINEARS)
    assert found.value.where == name


def test_parts_that_differ() -> None:
    with pytest.raises(TargetError, match="qkv_proj"):
        check_loader_rules({"quant_method": "awq", "modules_to_not_convert": [Q]}, set(LINEARS) - {Q}, LINEARS)
    for settings in ({"quant_method": "modelopt"}, {"quant_method": "fp8", "modules_to_not_convert": None}):
        check_loader_rules(settings, set(LINEARS), LINEARS)
