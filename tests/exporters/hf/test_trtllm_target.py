"""The target trtllm: what it refuses before a weight is read, its passes, its serving options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from chosen import chosen
from hf_folders import config, source, tensors
from modelopt_folders import CONTEXT, write
from stages import captured

import optc
from optc.cli.main import main
from optc.compiler.diagnostics import TargetError, UsageError
from optc.targets import find_target

Capture = pytest.CaptureFixture[str]


def _plan(capsys: Capture, *flags: str, model: Path | None = None) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        main(["plan", str(model or source("llama")), "--target", "trtllm", *flags])
    out = capsys.readouterr()
    return int(caught.value.code or 0), " ".join((out.out + out.err).split())


@pytest.mark.parametrize(
    ("flags", "texts"),
    [
        (
            ["--quant", "smoothquant"],
            ["does not take quantization 'smoothquant'", "has no int8 activations", "nearest here: --quant fp8"],
        ),
        (
            ["--quant", "gptq", "--asymmetric"],
            ["asymmetric quantization", "have no zero points", "nearest here: --quant gptq --symmetric"],
        ),
        (
            ["--quant", "awq", "--group-size", "32"],
            ["group size 32", "take groups of 64 and 128", "nearest here: --quant awq --group-size 64"],
        ),
        (["--quant", "rtn", "--bits", "3"], ["3-bit weights", "W4A16_AWQ", "nearest here: --quant rtn"]),
        (["--quant", "nf4"], ["quantization 'nf4'", "no codebooks"]),
        (["--quant", "auto"], ["quantization 'auto'", "one algorithm for all linears"]),
        (["--dtype", "fp32"], ["dtype fp32", "computes in 16 bits", "bf16, fp16"]),
        (["--layout", "awq"], ["does not take --layout"]),
    ],
)
def test_refused_by_the_plan(capsys: Capture, flags: list[str], texts: list[str]) -> None:
    code, output = _plan(capsys, *(["--dtype", "bf16"] if "--dtype" not in flags else []), *flags)
    assert code == 4
    for text in texts:
        assert text in output


def test_a_group_that_fits_the_model_alone_is_refused_too(capsys: Capture, tmp_path: Path) -> None:
    """K of 96 takes groups of 32, and TensorRT-LLM's kernels do not."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 96,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 64,
        "num_key_value_heads": 2,
    }
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path)
    code, output = _plan(capsys, "--dtype", "bf16", "--quant", "awq", model=tmp_path)
    assert code == 4
    assert "does not take group size 32" in output


def test_the_plan_counts_the_caches_bytes(capsys: Capture) -> None:
    def plan(*flags: str) -> dict:
        code, output = _plan(capsys, "--dtype", "bf16", "--json", *flags)
        assert code == 0, output
        return dict(json.loads(output))

    whole, half = plan(), plan("--kv-cache-dtype", "fp8")
    assert whole["kv_cache_bytes_per_token"] == 2 * half["kv_cache_bytes_per_token"] == 2 * 2 * 2 * 16 * 2
    assert [row["name"] for row in half["passes"]] == ["quantize-kv-cache"]


def test_the_passes_of_each_method() -> None:
    target = find_target("tensorrt-llm")
    assert target.name == "trtllm"

    def recipe(**options: str) -> list[str]:
        made = chosen("trtllm", dtype="bf16", **options)
        return [step.rewrite.name for step in target.recipe("decoder", made)]

    assert recipe() == []
    assert recipe(quant="awq") == ["scale-awq", "quantize-clip"]
    assert recipe(quant="int8") == ["quantize-rtn"]
    assert recipe(quant="fp8", kv_cache_dtype="fp8") == [
        "quantize-fp8",
        "quantize-inputs",
        "quantize-kv-cache",
    ]
    assert recipe(quant="nvfp4") == ["quantize-nvfp4", "quantize-inputs"]
    with pytest.raises(UsageError, match="unknown kv-cache-dtype 'int4'"):
        recipe(kv_cache_dtype="int4")
    with pytest.raises(TargetError, match="does not take --max-batch"):
        chosen("vllm", max_batch=4)


def test_serving_options(tmp_path: Path) -> None:
    knobs = {
        "max_batch": 8,
        "max_num_tokens": 1024,
        "max_seq_len": 128,
        "speculative": "draft:/models/small",
        "draft_tokens": 3,
    }
    write(captured("llama"), source("llama"), tmp_path / "a", **knobs)
    assert yaml.safe_load((tmp_path / "a" / "serve.yaml").read_text()) == {
        "max_batch_size": 8,
        "max_num_tokens": 1024,
        "max_seq_len": 128,
        "kv_cache_config": {"dtype": "auto"},
        "speculative_config": {
            "decoding_type": "DraftTarget",
            "max_draft_len": 3,
            "speculative_model_dir": "/models/small",
        },
    }
    write(captured("llama"), source("llama"), tmp_path / "b", speculative="ngram")
    assert yaml.safe_load((tmp_path / "b" / "serve.yaml").read_text()) == {
        "max_seq_len": 256,
        "kv_cache_config": {"dtype": "auto"},
        "speculative_config": {"decoding_type": "NGram", "max_draft_len": 4, "max_matching_ngram_size": 4},
    }


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_batch": 0}, "'max-batch' cannot be 0"),
        ({"max_seq_len": 0}, "'max-seq-len' cannot be 0"),
        ({"max_batch": 16, "max_num_tokens": 8}, "--max-num-tokens 8 is less than --max-batch 16"),
        ({"draft_tokens": 4}, "--draft-tokens has no effect without --speculative"),
        ({"speculative": "medusa"}, "unknown speculative decoding 'medusa'"),
        ({"speculative": "draft:"}, "--speculative draft: names no model"),
    ],
)
def test_serving_options_that_contradict(options: dict, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        chosen("trtllm", **options)
    assert text in str(caught.value)
    assert caught.value.remedy


def test_a_longer_sequence_than_the_models_context_is_refused(capsys: Capture) -> None:
    code, output = _plan(capsys, "--dtype", "bf16", "--max-seq-len", "512")
    assert code == 4
    assert "--max-seq-len 512 is beyond the model's context of 256 tokens" in output


def test_compile_writes_a_folder_and_its_record(tmp_path: Path) -> None:
    assert CONTEXT.calibration is not None
    result = optc.compile(
        source("llama"),
        target="trtllm",
        quant="fp8",
        dtype="bf16",
        kv_cache_dtype="fp8",
        output=tmp_path / "out",
        calibration=CONTEXT.calibration.tokens,
    )
    manifest = result.manifest
    assert [(row.name, row.matched) for row in manifest.passes] == [
        ("quantize-fp8", 14),
        ("quantize-inputs", 14),
        ("quantize-kv-cache", 2),
    ]
    assert manifest.engine_info["serving_options"] == "serve.yaml"
    assert manifest.engine_info["kv_cache_scales"] == 4
    assert manifest.quantization["bits_per_parameter"] < 8.1
    stored = tensors(tmp_path / "out")
    assert config(tmp_path / "out")["dtype"] == "bfloat16"
    assert stored["model.norm.weight"].dtype.itemsize == 2
    assert stored["model.layers.0.self_attn.v_proj.v_scale"].dtype.itemsize == 4
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"hf_quant_config.json", "serve.yaml", "config.json", "manifest.json"} <= names
