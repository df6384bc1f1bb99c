from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chosen import chosen
from families import make_model
from hf_folders import codes_of, config, quantized, source, tensors, write
from stages import apply, captured

from optc.compiler.capture import capture_module, capture_pretrained
from optc.compiler.diagnostics import ArtifactError, InputError, TargetError
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import set_weight
from optc.exporters.hf import export as module
from optc.exporters.hf.shards import INDEX, write_shards
from optc.passes.fusion.projections import MergeProjections
from optc.passes.quantization.nf4 import QuantizeNf4
from optc.passes.quantization.round_scales import RoundScales
from optc.passes.quantization.rtn import QuantizeRtn
from optc.targets import find_target


def test_an_unquantized_folder_is_the_source_again(tmp_path: Path) -> None:
    result = write(captured("llama"), source("llama"), tmp_path)
    before, after = tensors(source("llama")), tensors(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "quantization_config" not in config(tmp_path)
    assert result.engine.name == "huggingface"
    assert result.info["layout"] == "none"
    assert sum(result.tensor_bytes.values()) == sum(tensor.nbytes for tensor in before.values())
    assert result.weight_bytes == (tmp_path / "model.safetensors").stat().st_size


def test_every_tensor_comes_from_the_program(tmp_path: Path) -> None:
    program = quantized("llama", "int4").clone()
    name = "model.layers.1.input_layernorm.weight"
    set_weight(program, name, program.weight(name) * 3)
    write(program, source("llama"), tmp_path)
    assert torch.equal(tensors(tmp_path)[name], tensors(source("llama"))[name] * 3)


def test_quantized_tensors_replace_the_weight_and_are_counted(tmp_path: Path) -> None:
    program = quantized("qwen2", "int4-asym")
    result = write(program, source("qwen2"), tmp_path)
    stem = "model.layers.0.self_attn.k_proj"
    found = {name: tensor for name, tensor in tensors(tmp_path).items() if name.startswith(stem)}
    shapes = {name.removeprefix(f"{stem}."): list(tensor.shape) for name, tensor in found.items()}
    assert shapes == {
        "bias": [32],
        "weight_packed": [32, 8],
        "weight_scale": [32, 2],
        "weight_shape": [2],
        "weight_zero_point": [4, 2],
    }
    assert result.tensor_bytes[f"{stem}.weight_codes"] == 32 * 8 * 4 + 2 * 8
    assert result.tensor_bytes[f"{stem}.weight_scale"] == 32 * 2 * 4
    assert result.tensor_bytes[f"{stem}.weight_zero"] == 4 * 2 * 4
    assert config(tmp_path)["quantization_config"]["ignore"] == ["lm_head"]
    assert result.info["quantized_linears"] == 14


def test_half_precision_folders_say_so(tmp_path: Path) -> None:
    program, _ = capture_pretrained(source("llama"), dtype="bf16")
    program = apply(QuantizeRtn(group_size=64), program).program
    write(program, source("llama"), tmp_path)
    assert config(tmp_path)["dtype"] == "bfloat16"
    stored = tensors(tmp_path)
    assert stored["model.norm.weight"].dtype == torch.bfloat16
    assert stored["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.bfloat16


def test_names_that_transformers_changes_on_loading_stay_as_they_were(tmp_path: Path) -> None:
    assert "embed_out.weight" in tensors(source("gpt-neox"))  # lm_head in the model
    write(quantized("gpt-neox", "int4"), source("gpt-neox"), tmp_path)
    stored = tensors(tmp_path)
    assert torch.equal(stored["embed_out.weight"], tensors(source("gpt-neox"))["embed_out.weight"])
    assert "lm_head.weight" not in stored
    assert config(tmp_path)["quantization_config"]["ignore"] == ["lm_head", "embed_out"]
    again, _ = capture_pretrained(tmp_path)
    ours = codes_of(quantized("gpt-neox", "int4"))
    assert len(ours) == 16
    assert all(torch.equal(again.weight(name), tensor) for name, tensor in ours.items())


def test_a_quantized_linear_is_not_ignored_under_its_older_name(tmp_path: Path) -> None:
    program = apply(QuantizeRtn(group_size=32, head=True), captured("gpt-neox")).program
    write(program, source("gpt-neox"), tmp_path)
    assert "lm_head.weight_packed" in tensors(tmp_path)
    assert config(tmp_path)["quantization_config"]["ignore"] == []


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_a_quantized_head_is_told(tmp_path: Path, layout: str) -> None:
    """vLLM reads quantization_config.lm_head in both layouts, and takes it to be false."""
    for head in (True, False):
        program = apply(QuantizeRtn(group_size=32, head=head), captured("llama")).program
        write(apply(RoundScales(), program).program, source("llama"), tmp_path / str(head), layout)
        assert ("lm_head.qweight" in tensors(tmp_path / str(head))) is head
        assert config(tmp_path / str(head))["quantization_config"]["lm_head"] is head


def _tied(tmp_path: Path) -> Path:
    model = make_model("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    folder = _tied(tmp_path)
    program, _ = capture_pretrained(folder)
    write(apply(QuantizeRtn(group_size=32), program).program, folder, tmp_path / "out")
    assert config(tmp_path / "out")["tie_word_embeddings"] is True
    names = [name for name in tensors(tmp_path / "out") if "embed" in name or "head" in name]
    assert names == ["model.embed_tokens.weight"]


def test_a_quantized_head_is_untied(tmp_path: Path) -> None:
    folder = _tied(tmp_path)
    program, _ = capture_pretrained(folder)
    edited = apply(QuantizeRtn(group_size=32, head=True), program).program
    write(edited, folder, tmp_path / "out")
    assert config(tmp_path / "out")["tie_word_embeddings"] is False
    stored = tensors(tmp_path / "out")
    assert {"model.embed_tokens.weight", "lm_head.weight_packed"} <= stored.keys()
    assert config(tmp_path / "out")["quantization_config"]["ignore"] == []
    again, _ = capture_pretrained(tmp_path / "out")
    ids = torch.arange(3, 20)[None]
    positions = torch.arange(17)[None]
    assert torch.equal(again(ids, positions), edited(ids, positions))


def test_tensors_that_the_graph_does_not_read_are_copied(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "more"
    make_model("llama").save_pretrained(folder)
    extra = torch.arange(6).reshape(2, 3)
    save_file({**tensors(folder), "vision.table": extra}, folder / "model.safetensors", metadata={"format": "pt"})
    result = write(quantized("llama", "int4"), folder, tmp_path / "out")
    assert result.info["copied"] == ["vision.table"]
    assert torch.equal(tensors(tmp_path / "out")["vision.table"], extra)


def test_shards_have_an_index_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "write_shards", lambda folder, items: write_shards(folder, items, limit=40_000))
    result = write(quantized("llama", "int4"), source("llama"), tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files == result.info["files"]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(tmp_path).values())
    assert max((tmp_path / name).stat().st_size for name in files) < 40_000 + 4096
    again, _ = capture_pretrained(tmp_path)
    ours = codes_of(quantized("llama", "int4"))
    assert all(torch.equal(again.weight(name), tensor) for name, tensor in ours.items())


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "model.layers.0.mlp.up_proj.weight_packed",
        "model.layers.0.mlp.up_proj.weight_scale",
    ],
)
def test_a_changed_byte_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def spoiled(folder, items):
        def change():
            for key, tensor in items:
                if key == name:
                    tensor = tensor.clone()
                    tensor.view(-1)[1] += 1
                yield key, tensor

        return write_shards(folder, change())

    monkeypatch.setattr(module, "write_shards", spoiled)
    with pytest.raises(ArtifactError, match="a written weight differs from the one in memory") as caught:
        write(quantized("llama", "int4"), source("llama"), tmp_path)
    assert name.rpartition(".weight")[0] in caught.value.where


def test_a_lost_tensor_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.layers.0.mlp.up_proj.weight_packed"
    monkeypatch.setattr(
        module,
        "write_shards",
        lambda folder, items: write_shards(folder, (item for item in items if item[0] != name)),
    )
    with pytest.raises(ArtifactError, match="up_proj"):
        write(quantized("llama", "int4"), source("llama"), tmp_path)


def _wide_scales(**options: Any) -> Program:
    """A tiny Llama with scales that float16 does not hold: those of searched ranges are such as it does."""
    return apply(QuantizeRtn(group_size=32, ranges="full", **options), captured("llama")).program


def test_refusals_name_the_weight(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="no model folder to write back"):
        write(captured("llama"), None, tmp_path)
    merged = apply(MergeProjections(), quantized("llama", "int4")).program
    with pytest.raises(TargetError) as caught:
        write(merged, source("llama"), tmp_path)
    assert "cannot be written back" in str(caught.value)
    assert "model.layers.0" in caught.value.where
    with pytest.raises(TargetError, match="c_attn") as caught:
        write(quantized("gpt2", "int4"), source("gpt2"), tmp_path)
    assert "belongs to a Conv1D" in caught.value.why
    with pytest.raises(TargetError, match="no layout holds weights of the format nf4"):
        write(apply(QuantizeNf4(), captured("llama")).program, source("llama"), tmp_path)
    with pytest.raises(TargetError, match="run the pass round-scales after") as caught:
        write(_wide_scales(), source("llama"), tmp_path, "gptq")
    assert caught.value.where == "model.layers.0.self_attn.q_proj"


def test_a_module_in_memory_is_refused(tmp_path: Path) -> None:
    program = capture_module(torch.nn.Linear(32, 8), (torch.zeros(2, 32),))
    with pytest.raises(TargetError, match="cannot be written back"):
        write(program, source("llama"), tmp_path)


def test_round_scales_makes_float16_numbers_and_nothing_else() -> None:
    program = _wide_scales(symmetric=False)
    result = apply(RoundScales(), program)
    assert (result.matched, result.candidates) == (14, 14)
    before, after = codes_of(program), codes_of(result.program)
    for name, tensor in before.items():
        expected = tensor.half().float() if name.endswith("_scale") else tensor
        assert torch.equal(after[name], expected)
    assert apply(RoundScales(), result.program).matched == 0


def test_round_scales_refuses_what_float16_cannot_hold() -> None:
    program = quantized("llama", "int4").clone()
    name = "model.layers.0.mlp.up_proj.weight_scale"
    set_weight(program, name, program.weight(name) * 1e9)
    with pytest.raises(InputError, match="does not fit float16") as caught:
        apply(RoundScales(), program)
    assert caught.value.where == name


def test_the_target_says_what_it_does_not_take() -> None:
    target = find_target("sglang")
    assert target.name == "vllm"

    def recipe(**options):
        return [step.rewrite.name for step in target.recipe("decoder", chosen("sglang", **options))]

    assert recipe() == []
    assert recipe(layout="gptq") == ["round-scales"]  # of a folder that is already quantized
    assert recipe(quant="rtn") == ["quantize-rtn"]
    assert recipe(quant="rtn", layout="awq") == ["quantize-rtn", "round-scales"]
    assert recipe(quant="rtn", layout="gptq", bits=3) == ["quantize-rtn", "round-scales"]
    for options, text in (
        ({"quant": "rtn", "layout": "ggml"}, "unknown layout 'ggml'"),
        ({"quant": "rtn", "layout": "awq", "bits": 8}, "--layout compressed-tensors or gptq takes 8"),
        ({"quant": "rtn", "bits": 3}, "--layout gptq takes 3"),
        ({"quant": "nf4"}, "does not take quantization 'nf4'"),
        ({"kv_cache": "static"}, "does not take a static KV cache"),
    ):
        with pytest.raises(Exception, match=text):
            recipe(**options)
    with pytest.raises(TargetError, match="does not take --layout"):
        chosen("onnx-cpu", layout="awq")


def test_a_layout_without_quantization_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"(?s)--layout says how.*nothing is quantized"):
        write(quantized("llama", "none"), source("llama"), tmp_path, "awq")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("passes", "where", "why"),
    [
        ((QuantizeRtn(group_size=32, ignore=("k_proj",)),), "q_proj", "k_proj is not quantized"),
        (
            (QuantizeRtn(group_size=32, ignore=("*.1.mlp.gate_proj",)),),
            "layers.1.mlp.up_proj",
            "gate_proj is not quantized",
        ),
        (
            (QuantizeRtn(group_size=32, ignore=("v_proj",)), QuantizeRtn(bits=8, group_size=32)),
            "q_proj",
            "v_proj is quantized differently",
        ),
    ],
)
def test_linears_that_vllm_joins_are_quantized_alike(
    passes: tuple[QuantizeRtn, ...], where: str, why: str, tmp_path: Path
) -> None:
    """Its loader refuses such a folder: a joined linear has one scheme."""
    program = captured("llama")
    for rewrite in passes:
        program = apply(rewrite, program).program
    with pytest.raises(TargetError, match="as one linear") as caught:
        write(program, source("llama"), tmp_path)
    assert where in str(caught.value.where)
    assert why in str(caught.value.why)
    assert list(tmp_path.iterdir()) == []


def test_linears_that_vllm_does_not_join_may_differ(tmp_path: Path) -> None:
    rewrite = QuantizeRtn(group_size=32, ignore=("q_proj", "k_proj", "v_proj", "*.0.mlp.down_proj", "o_proj"))
    result = write(apply(rewrite, captured("llama")).program, source("llama"), tmp_path)
    assert result.info["quantized_linears"] == 5
