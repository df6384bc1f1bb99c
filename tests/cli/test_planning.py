"""The linears that `optc plan` counts, against those that the quantization pass finds in the captured graph."""

from __future__ import annotations

import dataclasses
import platform
import re
from pathlib import Path

import msgspec
import pytest
import torch
from families import FAMILIES, make_model
from onnxruntime.capi import onnxruntime_pybind11_state
from stages import apply, captured, rewritten
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from optc.capturing import capture_for_compile, stored_dtype
from optc.compiler.diagnostics import TargetError
from optc.passes.quantization.rtn import QuantizeRtn
from optc.planning import make_plan
from optc.predicted_sizes import quantizable
from optc.request import from_python
from optc.resolving import resolve, settled, with_group_size
from optc.targets.onnx_cpu import TARGET


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "bert"])
def test_counts_what_the_pass_takes(name: str) -> None:
    result = rewritten(QuantizeRtn(bits=8), name)
    planned = quantizable(make_model(name))
    assert len(planned) == result.matched
    program = result.program
    shapes = sorted(tuple(program.weight(codes).shape) for codes in program.contract.quantization)
    assert sorted(planned.values()) == shapes


def test_ignored_weights_are_left_out() -> None:
    rewrite = QuantizeRtn(bits=8, ignore=("*.down_proj*",))
    for name in ("llama", "mixtral"):
        assert len(quantizable(make_model(name), rewrite.ignore)) == rewritten(rewrite, name).matched


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_the_group_size_is_settled_once(name: str) -> None:
    """From the graph for a compile, from the module tree for a plan: the same size, and nothing is open after it."""
    asked = resolve(from_python("onnx-cpu", quant="rtn"))
    assert asked.options.quantization is not None
    assert asked.options.quantization.group_size is None
    planned = quantizable(make_model(name))
    plan = with_group_size(asked, [columns for _, columns in planned.values()], list(planned))
    compiled = settled(asked, captured(name))
    assert compiled.options.quantization is not None
    assert compiled.options.quantization.group_size == 64
    assert plan == compiled
    assert settled(compiled, captured("llama")) is compiled
    for given in ({"quant": "rtn", "group_size": 32}, {"quant": "int8"}, {"quant": "nf4"}, {}):
        resolved = resolve(from_python("onnx-cpu", **given))
        assert settled(resolved, captured(name)) is resolved


@pytest.mark.parametrize(
    ("target", "asked", "stored", "chosen"),
    [
        ("vllm", None, "bf16", "bf16"),
        ("vllm", None, "fp32", "fp32"),
        ("vllm", None, None, "fp32"),
        ("vllm", "fp16", "bf16", "fp16"),
        ("trtllm", None, "fp16", "fp16"),
        ("trtllm", None, "fp32", "bf16"),
        ("onnx-cpu", None, "bf16", "fp32"),
        ("inductor-cpu", None, "bf16", "fp32"),
    ],
)
def test_model_folders_keep_the_type_of_their_source(
    target: str, asked: str | None, stored: str | None, chosen: str
) -> None:
    options = {} if asked is None else {"dtype": asked}
    assert resolve(from_python(target, **options), stored).options.dtype == chosen


def test_stored_type_is_that_of_most_elements() -> None:
    model = make_model("llama")
    assert stored_dtype(model, False) == "fp32"
    assert stored_dtype(model.to(torch.bfloat16), False) == "bf16"
    model.lm_head.double()
    assert stored_dtype(model, False) == "bf16"
    assert stored_dtype(torch.nn.Linear(2, 2, dtype=torch.double), False) is None
    assert stored_dtype(torch.nn.ReLU(), False) is None


def test_a_group_size_that_the_target_lacks_is_refused_before_any_pass() -> None:
    target = dataclasses.replace(
        TARGET, quant={"rtn": dataclasses.replace(TARGET.quant["rtn"], group_sizes=(16, 32, 128))}
    )
    asked = dataclasses.replace(resolve(from_python("onnx-cpu", quant="rtn")))
    asked = dataclasses.replace(asked, request=msgspec.structs.replace(asked.request, target=target))
    with pytest.raises(TargetError, match="group size 64"):
        settled(asked, captured("llama"))


class _Block(torch.nn.Module):
    """Experts in a list, as older models have them, with a router that is a plain linear."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(16, 4)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(4))
        self.out = torch.nn.Linear(16, 8)


def test_routers_are_told_by_their_experts() -> None:
    assert sorted(quantizable(_Block())) == [*(f"experts.{i}.weight" for i in range(4)), "out.weight"]
    sizes = {
        "num_hidden_layers": 1,
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "num_experts": 4,
        "num_attention_heads": 4,
        "vocab_size": 128,
        "num_key_value_heads": 2,
    }
    with torch.device("meta"):
        found = quantizable(Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes)))
    assert not [name for name in found if name.endswith("mlp.gate.weight")]
    assert sum(".experts." in name for name in found) == 8
    assert "model.layers.0.mlp.shared_expert.up_proj.weight" in found


def test_a_multimodal_model_is_planned_as_it_is_captured(tmp_path: Path) -> None:
    """Its language model alone; the vision tower's K of 40 takes no group size, and is not asked."""
    words = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=60,
        max_position_embeddings=48,
    )
    eyes = CLIPVisionConfig(
        hidden_size=8, intermediate_size=40, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=8
    )
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=words, vision_config=eyes, image_token_index=59))
    model.save_pretrained(tmp_path)
    found = capture_for_compile(
        tmp_path, None, dtype="fp32", trust_remote_code=False, text=None, work_folder=None, device=torch.device("cpu")
    )
    assert (
        found.proof.notes[-1]
        == "config.json has vision_config beside text_config: the language model alone is captured"
    )
    assert (found.program.contract.model.vocab_size, found.program.contract.model.context_length) == (60, 48)
    matched = apply(QuantizeRtn(bits=8), found.program).matched
    planned = make_plan(tmp_path, from_python("onnx-cpu", quant="rtn"))
    assert (planned["linears"], planned["group_size"]) == (matched, 64) == (14, 64)
    assert planned["kv_cache_bytes_per_token"] == 2 * 2 * 2 * 16 * 4


def test_why_onnx_cpu_computes_in_fp32() -> None:
    """The kernels that its refusal of fp16 names, as ONNX Runtime itself lists them."""
    with pytest.raises(TargetError) as caught:
        resolve(from_python("onnx-cpu", dtype="fp16"))
    assert caught.value.why is not None
    named = re.findall(r"[A-Z][A-Za-z]+", caught.value.why.partition("kernels for")[2].partition(" on ")[0])
    assert named == ["MatMul", "Gemm", "Conv", "Add", "Mul", "Softmax", "Sigmoid"]
    types: dict[str, set[str]] = {name: set() for name in named}
    for kernel in onnxruntime_pybind11_state.get_all_opkernel_def():
        if kernel.provider == "CPUExecutionProvider" and kernel.op_name in types:
            types[kernel.op_name] |= {item for items in kernel.type_constraints.values() for item in items}
    assert all("tensor(float)" in found for found in types.values())
    if platform.machine() == "x86_64":
        assert not [name for name, found in types.items() if "tensor(float16)" in found]
