"""Folders of the target vllm, loaded by transformers with compressed-tensors on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bounds
import pytest
import torch
from families import make_model
from hf_folders import logits, quantized, source, tensors, write
from once import short_example
from rewrites import stir

import optc
from optc.compiler.capture import capture_pretrained
from optc.compiler.capture.loading import load_model
from optc.compiler.diagnostics import TargetError
from optc.runtime.sessions.load import load


def _loaded(folder: Path, *, dequantize: bool = False) -> Any:
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors (extra test-oracles)")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    # transformers 5.23 with compressed-tensors 0.20 cannot place packed zero points in its compressed modules (they
    # are not packed on the meta device); its other way, dequantizing while it loads, reads them.
    more = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()


def _ids(vocab: int) -> torch.Tensor:
    return torch.randint(3, vocab, (3, 19), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("recipe", ["none", "int4", "int4-asym", "int8", "fp8-weights"])
def test_transformers_gives_the_programs_logits(tmp_path: Path, family: str, recipe: str) -> None:
    program = quantized(family, recipe)
    write(program, source(family), tmp_path)
    model = _loaded(tmp_path, dequantize=recipe == "int4-asym")
    for ids in (_ids(128), _ids(128)[:1, :1]):
        with torch.no_grad():
            theirs = model(ids).logits
        assert float((theirs - logits(program, ids)).abs().max()) < 1e-4


@pytest.mark.parametrize(("recipe", "kind", "linears"), [("w8a8", "int8", 14), ("fp8", "fp8", 14)])
def test_rounded_activations(tmp_path: Path, recipe: str, kind: str, linears: int) -> None:
    program = quantized("llama", recipe)
    write(program, source("llama"), tmp_path)
    ids = _ids(128)
    plain = logits(quantized("llama", "none"), ids)
    ours, rounding = bounds.of_codes(program, ids.tolist())
    with torch.no_grad():
        theirs = _loaded(tmp_path)(ids).logits
    # compressed-tensors scales int8 activations by absmax / 127.5, optc (and vLLM's kernels) by absmax / 127: it is
    # no further from the model than optc is, but not as near to optc as another order of sums.
    moved = bounds.gap(ours, list(plain))
    assert moved.rms > 0.01
    bounds.check(list(theirs), list(plain), moved)
    model, count = _loaded(tmp_path, dequantize=True), 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(lambda _, inputs: (_rounded(inputs[0], kind),))
            count += 1
    assert count == linears
    with torch.no_grad():
        bounds.check(list(model(ids).logits), ours, rounding)


def _rounded(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Activations rounded per token by the definition: largest magnitude / 127 (448) is the step."""
    step = x.abs().amax(-1, keepdim=True) / {"int8": 127, "fp8": 448}[kind]
    ratio = x / step
    return (ratio.round() if kind == "int8" else ratio.to(torch.float8_e4m3fn).float()) * step


@pytest.mark.parametrize(
    ("recipe", "layout"), [("int4", "gptq"), ("int4-asym", "gptq"), ("int8", "gptq"), ("int4-asym", "awq")]
)
def test_gptqmodel_reads_the_other_layouts(tmp_path: Path, recipe: str, layout: str) -> None:
    pytest.importorskip("gptqmodel", reason="GPTQModel is not installed: it pins another torch")
    from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

    program = quantized("llama", recipe, half=True)
    write(program, source("llama"), tmp_path, layout)
    config = AwqConfig(backend="torch_awq") if layout == "awq" else GPTQConfig(bits=4, backend="torch")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, device_map="cpu", quantization_config=config
    )
    dense, _ = load_model(tmp_path, dtype=torch.float32, attention="eager")
    with torch.no_grad():
        for name, module in dense.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight.copy_(module.weight.half().float())  # its kernels make float16 weights
        theirs, ours = model(_ids(128)).logits, dense(_ids(128)).logits
        if layout == "awq":  # its kernel rounds activations to float16 as well
            bounds.check([theirs], [ours], bounds.gap([dense.half()(_ids(128)).logits], [ours]))
        else:
            assert float((theirs - ours).abs().max()) < 1e-4


def test_scales_folded_into_other_weights_are_in_the_folder(tmp_path: Path) -> None:
    model = stir(make_model("phi"))
    model.save_pretrained(tmp_path / "source")
    tokens = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(1))
    result = optc.compile(
        tmp_path / "source",
        target="vllm",
        quant="awq",
        group_size=32,
        calibration=tokens,
        output=tmp_path / "out",
    )
    assert next(record.matched for record in result.manifest.passes if record.name == "scale-awq") > 0
    program, _ = capture_pretrained(tmp_path / "out")
    before, after = tensors(tmp_path / "source"), tensors(tmp_path / "out")
    changed = [name for name in before if name in after and not torch.equal(before[name], after[name])]
    assert "model.layers.0.input_layernorm.weight" in changed
    with torch.no_grad():
        theirs = _loaded(tmp_path / "out")(_ids(128)).logits
    assert float((theirs - logits(program, _ids(128))).abs().max()) < 1e-4


@pytest.mark.parametrize("layout", ["compressed-tensors", "awq", "gptq"])
def test_the_example_model_by_the_public_api(tmp_path: Path, layout: str) -> None:
    out = tmp_path / "out"
    result = optc.compile(short_example(layers=1), target="vllm", quant="rtn", layout=layout, output=out)
    assert result.manifest.engine == "huggingface"
    summary = result.manifest.quantization
    assert summary["bits"] == [4]
    assert {"tokenizer.json", "config.json", "model.safetensors", "manifest.json"} <= {p.name for p in out.iterdir()}
    program, _ = capture_pretrained(out)
    ids = _ids(1000)
    if layout == "compressed-tensors":
        with torch.no_grad():
            theirs = _loaded(out)(ids).logits
        assert float((theirs - logits(program, ids)).abs().max()) < 1e-4
    with pytest.raises(TargetError, match="it is a model folder") as caught:
        load(out)
    assert caught.value.exit_code == 4
