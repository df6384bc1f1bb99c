"""FP8 in blocks of 128 x 128, in both layouts that hold it, by readers of others and by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chosen import chosen
from hf_folders import config, logits, tensors, write
from modelopt_folders import rewritten
from safetensors.torch import save_file
from torch import Tensor

from optc.compiler.capture import capture_pretrained
from optc.compiler.diagnostics import InputError, TargetError
from optc.compiler.ir.program import Program
from optc.passes.quantization.activations import QuantizeActivations
from optc.passes.quantization.fp8 import QuantizeFp8, quantize_float
from optc.passes.quantization.rtn import QuantizeRtn
from optc.targets import find_target

IDS = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(1))
LAYOUTS = ("compressed-tensors", "fp8")
MODULE = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose linears are whole blocks: [128 or 256, 128 or 256]."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=96,
    )
    folder = tmp_path_factory.mktemp("source")
    model = LlamaForCausalLM(sizes)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= torch.rand(weight.shape) * 4  # no two blocks alike
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(source: Path) -> Program:
    return capture_pretrained(source)[0]


@pytest.fixture(scope="module")
def program(plain: Program) -> Program:
    return rewritten(plain, (QuantizeFp8(granularity="block"), QuantizeActivations(format="fp8-128")))


@pytest.fixture(scope="module")
def folders(program: Program, source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for layout in LAYOUTS:
        found[layout] = tmp_path_factory.mktemp("folder") / layout
        write(program, source, found[layout], layout=layout)
    return found


def by_hand(codes: Tensor, scale: Tensor) -> Tensor:
    """The weight that codes and the scales of blocks stand for."""
    out = codes.double()
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            out[128 * row : 128 * row + 128, 128 * column : 128 * column + 128] *= float(scale[row, column])
    return out


def test_a_block_has_the_scale_of_its_largest_weight() -> None:
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(0))
    weight[130, 300] = 17.0
    weight[:128, :128] = 0
    codes, scale = quantize_float(weight, "block", "w")
    assert scale.shape == (256, 3)
    assert float(scale[128, 2]) == pytest.approx(17 / 448)
    assert float(codes[130, 300].float()) == 448
    assert (scale[:128, 0] == 1).all(), "a block of zeros"
    assert torch.equal(scale, scale[::128].repeat_interleave(128, 0))
    error = (by_hand(codes, scale[::128]) - weight.double()).abs()
    assert float((error / weight.abs().clamp(min=0.05)).max()) < 0.0626, "3 bits of mantissa"


def test_inputs_have_a_scale_for_each_128_neighbours() -> None:
    x = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(0))
    x[..., 128:] *= 1e5
    codes, scale = torch.ops.optc.quantize_dynamic(x, format="fp8-128")
    assert scale.shape == (2, 3, 2)
    assert float(scale[1, 2, 1]) == pytest.approx(float(x[1, 2, 128:].abs().max()) / 448)
    back = torch.ops.optc.dequantize_activation(codes, scale, dtype=torch.float32)
    assert float(((back - x).abs() / x.abs().clamp(min=1e-2)).max()) < 0.0626
    whole = torch.ops.optc.dequantize_activation(*torch.ops.optc.quantize_dynamic(x, format="fp8"), dtype=torch.float32)
    assert float((whole[..., :128] - x[..., :128]).norm()) > 3 * float((back[..., :128] - x[..., :128]).norm())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_second_capture_gives_the_programs_logits(
    program: Program, plain: Program, folders: dict[str, Path], layout: str
) -> None:
    again, _ = capture_pretrained(folders[layout])
    ours = logits(program, IDS)
    assert torch.equal(logits(again, IDS), ours)
    assert 1e-4 < float((ours - logits(plain, IDS)).norm() / ours.norm()) < 0.1


def test_the_tensors_of_both_layouts(source: Path, folders: dict[str, Path]) -> None:
    """As DeepSeek-V3's folders have them, and compressed-tensors': one scale of a block."""
    weight = tensors(source)[f"{MODULE}.weight"].double()
    for layout, last in zip(LAYOUTS, ("weight_scale", "weight_scale_inv"), strict=True):
        stored = tensors(folders[layout])
        scale = stored[f"{MODULE}.{last}"]
        assert scale.shape == (1, 2)
        dense = by_hand(stored[f"{MODULE}.weight"], scale)
        assert 1e-3 < float((dense - weight).norm() / weight.norm()) < 0.04
    found = config(folders["fp8"])["quantization_config"]
    assert found == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }


def test_the_library_reads_the_weights(program: Program, folders: dict[str, Path]) -> None:
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors (extra test-oracles)")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    settings = QuantizationConfig.model_validate(config(folders["compressed-tensors"])["quantization_config"])
    scheme: Any = settings.config_groups["group_0"]
    assert scheme.input_activations.group_size == 128
    stored = tensors(folders["compressed-tensors"])
    state = {name: stored[f"{MODULE}.{name}"] for name in ("weight", "weight_scale")}
    found = BaseCompressor.get_value_from_registry("float-quantized").decompress(state, scheme)["weight"]
    parts = [program.weight(f"{MODULE}.weight_{part}") for part in ("codes", "scale")]
    torch.testing.assert_close(found.float(), torch.ops.optc.dequantize_float(*parts, group_size=128))


def test_transformers_takes_the_folder_for_its_own(folders: dict[str, Path]) -> None:
    """Its products in FP8 need a GPU; without one it dequantizes."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    settings = FineGrainedFP8Config(dequantize=True, modules_to_not_convert=["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(
        folders["fp8"], dtype=torch.float32, quantization_config=settings
    ).eval()
    stored = tensors(folders["fp8"])
    found = model.get_submodule(MODULE).weight.detach()
    expected = by_hand(stored[f"{MODULE}.weight"], stored[f"{MODULE}.weight_scale_inv"]).float()
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)  # it may go by way of bfloat16


def test_a_last_block_of_fewer_rows_is_read(folders: dict[str, Path], tmp_path: Path) -> None:
    """As DeepSeek's low-rank projections have them: N is no multiple of 128."""
    from optc.compiler.formats.layouts.blocks import spread_rows

    scale = torch.tensor([[1.0], [2.0]])
    rows = spread_rows(None, "m", scale, 130)  # type: ignore[arg-type]  # the reader names what is wrong, nothing is
    assert rows.shape == (130, 1)
    assert rows[127] == 1
    assert rows[128] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda settings, _: settings.update(weight_block_size=[64, 64]), "'weight_block_size' is [64, 64]"),
        (lambda settings, _: settings.update(weight_block_size="128"), "not a list of whole numbers"),
        (lambda settings, _: settings.update(activation_scheme="static"), "'activation_scheme' is 'static'"),
        (lambda _, held: held.update({f"{MODULE}.weight_scale_inv": torch.ones(2, 2)}), "expected 1 for 128 rows"),
        (lambda _, held: held.update({f"{MODULE}.weight_scale_inv": torch.ones(1, 3)}), "scales have the wrong shape"),
    ],
)
def test_what_does_not_fit_is_refused(
    folders: dict[str, Path], tmp_path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None], message: str
) -> None:
    shutil.copytree(folders["fp8"], tmp_path / "out")
    settings, held = config(folders["fp8"]), tensors(folders["fp8"])
    change(settings["quantization_config"], held)
    (tmp_path / "out" / "config.json").write_text(json.dumps(settings))
    save_file(held, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError) as found:
        capture_pretrained(tmp_path / "out")
    assert message in str(found.value)


def test_the_layout_holds_nothing_else(plain: Program, source: Path, tmp_path: Path) -> None:
    recipe = find_target("vllm").recipe
    with pytest.raises(TargetError, match="holds weights of --quant fp8-block alone"):
        recipe("decoder", chosen("vllm", dtype="bf16", quant="fp8", layout="fp8"))
    with pytest.raises(TargetError, match="has no place for fp8-block weights"):
        recipe("decoder", chosen("vllm", dtype="bf16", quant="fp8-block", layout="gptq"))
    with pytest.raises(TargetError, match="cannot hold a weight") as caught:
        write(rewritten(plain, (QuantizeRtn(bits=8, group_size=0),)), source, tmp_path, layout="fp8")
    assert "fp8 weights only" in str(caught.value)


def test_rows_beside_the_blocks_are_refused(plain: Program) -> None:
    """The head of 96 tokens."""
    with pytest.raises(InputError, match="blocks of 128 rows do not divide") as caught:
        QuantizeFp8(granularity="block", head=True).run(plain, None)  # type: ignore[arg-type]
    assert caught.value.where == "lm_head.weight"
