"""What was trained is what is compiled: folders written by `save_trained`, captured, compiled and run again."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import bounds
import pytest
import torch
from chosen import chosen
from families import make_model
from hf_folders import codes_of, config, logits, source, tensors
from safetensors.torch import save_file
from stages import sequences
from torch import Tensor

import optc
from optc.compiler.capture import capture_pretrained
from optc.compiler.diagnostics import InputError
from optc.compiler.execution.stage_driver import run_stage
from optc.compiler.formats.layouts.words import pack_words
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import PassContext
from optc.compiler.target.target import ExportRequest, check_legal, obstacle
from optc.exporters.hf import FolderOptions, export_hf
from optc.targets.inductor_cpu import TARGET
from optc.training.config import TrainConfig
from optc.training.export import SaveConfig, save_trained
from optc.training.kv_rounding import kv_roundings
from optc.training.models import load_frozen, load_trainable
from optc.training.qat import QatConfig, apply_qat, quantized_linears

IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
FORMATS: dict[str, dict[str, Any]] = {
    "w4-g32": {},
    "w4-g64-asym": {"group_size": 64, "symmetric": False},
    "w3-g32": {"bits": 3},
    "w2-g32-asym": {"bits": 2, "symmetric": False},
    "w8-channel": {"bits": 8, "group_size": 0},
    "w4-minmax": {"scales": "minmax"},
    "w4-head": {"head": True},
    "w8a8": {"bits": 8, "group_size": 0, "activations": "int8"},
    "w4-kv-head": {"kv_cache": "int8"},
    "w4-kv-layer": {"kv_cache": "int8", "kv_granularity": "layer"},
}
ROUNDED = ("w8a8", "w4-kv-head", "w4-kv-layer")


def trained(options: dict[str, Any], family: str = "llama", tied: bool = False) -> Any:
    """A tiny model after two steps of QAT, in eval mode."""
    model = make_model(family, attention="sdpa").requires_grad_(True).train()
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    apply_qat(model, QatConfig(enabled=True, **options))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)


def saved(model: Any, folder: Path) -> Program:
    """The captured folder of a trained model."""
    save_trained(model, source("llama"), folder, SaveConfig())
    return capture_pretrained(folder)[0]


def expected(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=ids, use_cache=False).logits
    return out


@pytest.mark.parametrize("name", FORMATS)
def test_a_captured_folder_computes_what_was_trained(tmp_path: Path, name: str) -> None:
    model = trained(FORMATS[name], tied=name == "w4-head")
    program = saved(model, tmp_path / "out")
    codes = codes_of(program)
    for module, linear in quantized_linears(model):
        kept = linear.quantized()
        assert torch.equal(codes[f"{module}.weight_codes"], kept.codes), module
        assert torch.equal(codes[f"{module}.weight_scale"], kept.scale), module
        entry = program.contract.quantization[f"{module}.weight_codes"]
        assert entry.activations == kept.scheme.activations
    for number, (_, rounding) in enumerate(kv_roundings(model)):
        for part, scale in zip(("key", "value"), rounding.scales(), strict=True):
            assert torch.equal(program.weight(f"kv_cache.{number}.{part}_scale"), scale)
    if name in ROUNDED:
        bounds.check(list(expected(model)), *bounds.of_codes(program, IDS.tolist()))
        assert bool(list(kv_roundings(model))) == ("kv_cache" in FORMATS[name])
    else:
        assert float((logits(program, IDS) - expected(model)).abs().max()) <= 1e-4


@pytest.mark.parametrize("family", ["mixtral", "gpt-neox"])
def test_names_are_those_of_the_source(tmp_path: Path, family: str) -> None:
    """transformers merges Mixtral's experts while loading, and renames the head of GPT-NeoX."""
    before = tensors(source(family))
    save_trained(load_frozen(source(family)), source(family), tmp_path / "out", SaveConfig())
    after = tensors(tmp_path / "out")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_experts_that_qat_leaves_are_ignored_by_the_names_of_the_folder(tmp_path: Path) -> None:
    model = apply_qat(load_frozen(source("mixtral")), QatConfig(enabled=True))
    save_trained(model, source("mixtral"), tmp_path / "out", SaveConfig())
    ignored = config(tmp_path / "out")["quantization_config"]["ignore"]
    experts = {
        f"model.layers.{layer}.block_sparse_moe.experts.{e}.w{w}"
        for layer in (0, 1)
        for e in range(4)
        for w in (1, 2, 3)
    }
    assert sorted(ignored) == sorted({"lm_head", *experts})
    assert {f"{name}.weight" for name in experts} < tensors(tmp_path / "out").keys()
    assert len(capture_pretrained(tmp_path / "out")[0].contract.quantization) == 8


def test_a_switch_of_training_is_not_kept(tmp_path: Path) -> None:
    model = load_trainable(TrainConfig(model=str(source("llama")), seq_len=8))
    assert model.config.use_cache is False
    save_trained(model, source("llama"), tmp_path / "out", SaveConfig())
    assert config(source("llama"))["use_cache"] is True
    assert config(tmp_path / "out")["use_cache"] is True


def _in_16_bits(family: str, folder: Path, dtype: torch.dtype, kept: str) -> Path:
    """The source of a family with weights in `dtype`, but one in float32."""
    shutil.copytree(source(family), folder)
    found = {name: tensor if name == kept else tensor.to(dtype) for name, tensor in tensors(folder).items()}
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_each_weight_keeps_the_type_that_its_source_has(tmp_path: Path, family: str) -> None:
    folder = _in_16_bits(family, tmp_path / "source", torch.bfloat16, "model.norm.weight")
    before = tensors(folder)
    model = load_frozen(folder)
    assert model.lm_head.weight.dtype == torch.float32  # as it is trained
    save_trained(model, folder, tmp_path / "out", SaveConfig())
    after = tensors(tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: item.dtype for name, item in before.items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert config(tmp_path / "out")["dtype"] == "bfloat16"
    save_trained(model, folder, tmp_path / "wide", SaveConfig(dtype="fp32"))
    assert {tensor.dtype for tensor in tensors(tmp_path / "wide").values()} == {torch.float32}


def test_scales_of_qat_are_in_the_type_of_the_source(tmp_path: Path) -> None:
    folder = _in_16_bits("llama", tmp_path / "source", torch.bfloat16, "")
    model = trained({})
    save_trained(model, folder, tmp_path / "out", SaveConfig())
    written = tensors(tmp_path / "out")
    linears = dict(quantized_linears(model))
    assert len(linears) == 14
    for name, linear in linears.items():
        made = linear.quantized()
        assert torch.equal(pack_words(made.codes, 4), written[f"{name}.weight_packed"])
        assert torch.equal(made.scale.bfloat16(), written[f"{name}.weight_scale"])


def test_a_weight_that_overflows_in_the_type_of_the_source(tmp_path: Path) -> None:
    folder = _in_16_bits("llama", tmp_path / "source", torch.float16, "")
    model = load_frozen(folder)
    model.lm_head.weight.data[0, 0] = 1e5
    with pytest.raises(InputError, match=r"does not fit float16[\s\S]*lm_head\.weight[\s\S]*saving\.dtype"):
        save_trained(model, folder, tmp_path / "out", SaveConfig())
    assert not (tmp_path / "out").exists()


def test_a_tied_head_gets_codes_and_the_embedding_stays(tmp_path: Path) -> None:
    model = trained(FORMATS["w4-head"], tied=True)
    saved(model, tmp_path / "out")
    written = tensors(tmp_path / "out")
    assert torch.equal(written["model.embed_tokens.weight"], model.model.embed_tokens.weight)
    assert "lm_head.weight_packed" in written
    assert config(tmp_path / "out")["tie_word_embeddings"] is False
    plain = trained(FORMATS["w4-g32"], tied=True)
    saved(plain, tmp_path / "tied")
    assert not any(name.startswith("lm_head") for name in tensors(tmp_path / "tied"))
    assert config(tmp_path / "tied")["tie_word_embeddings"] is True


@pytest.mark.parametrize("family", ["qwen3", "phi3", "mixtral"])
def test_other_families(tmp_path: Path, family: str) -> None:
    model = trained({}, family)
    assert float((logits(saved(model, tmp_path / "out"), IDS) - expected(model)).abs().max()) <= 1e-4


def test_the_folder_says_what_compressed_tensors_says(tmp_path: Path) -> None:
    """The library that defines the layout reads the scheme, the packed words and the scales of keys and values."""
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors (extra test-oracles)")
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.quantization import QuantizationConfig

    model = trained({"bits": 3, "kv_cache": "int8"})
    save_trained(model, source("llama"), tmp_path / "out", SaveConfig())
    known = QuantizationConfig.model_validate(config(tmp_path / "out")["quantization_config"])
    weights = known.config_groups["group_0"].weights
    assert (weights.num_bits, weights.group_size, weights.symmetric) == (3, 32, True)
    assert (known.kv_cache_scheme.num_bits, known.kv_cache_scheme.strategy) == (8, "attn_head")
    assert known.ignore == ["lm_head"]
    written = tensors(tmp_path / "out")
    for name, linear in quantized_linears(model):
        words = written[f"{name}.weight_packed"]
        codes = unpack_from_int32(words, 3, torch.Size(linear.weight.shape))
        assert torch.equal(codes.int() + 4, linear.quantized().codes.int()), name
    assert written["model.layers.0.self_attn.k_scale"].shape == (2, 1, 1)


@pytest.mark.parametrize("layout", [None, "gptq"])
def test_a_trained_folder_goes_on_to_vllm(tmp_path: Path, layout: str | None) -> None:
    """Through the exporter of the target vllm: the codes, and the scales of keys and values, stay the same."""
    options = FORMATS["w4-g32" if layout else "w4-kv-head"]
    program = saved(trained(options), tmp_path / "out")
    again = tmp_path / "again"
    again.mkdir()
    request = ExportRequest(directory=again, options=FolderOptions(layout=layout), source=tmp_path / "out")
    export_hf(program, request)
    second, _ = capture_pretrained(again)
    assert torch.equal(logits(program, IDS), logits(second, IDS))
    if layout is None:
        assert config(again)["quantization_config"] == config(tmp_path / "out")["quantization_config"]


@pytest.mark.parametrize(
    ("target", "options"),
    [
        pytest.param("onnx-cpu", {"bits": 3, "symmetric": False}, id="onnx"),
        pytest.param("onnx-cpu", FORMATS["w4-kv-head"], id="onnx-kv"),
    ],
)
def test_an_artifact_gives_the_fake_quantized_logits(tmp_path: Path, target: str, options: dict[str, Any]) -> None:
    """Export parity, activations unrounded: the engine against the model in training's own arithmetic."""
    model = trained(options)
    save_trained(model, source("llama"), tmp_path / "out", SaveConfig())
    optc.compile(tmp_path / "out", target=target, output=tmp_path / "built", accuracy_level=0)
    artifact = optc.load(tmp_path / "built")
    rows = sequences(21, 14, 9, 5)
    found = torch.from_numpy(artifact.session.prefill(rows))
    last = torch.stack([expected(model, torch.tensor([row]))[0, -1] for row in rows])
    if "kv_cache" in options:
        _, rounding = bounds.of_codes(capture_pretrained(tmp_path / "out")[0], rows)
        bounds.check([found], [last], rounding)
    else:
        assert float((found - last).abs().max()) <= 1e-4
    assert artifact.manifest.quantization["method"] == "compressed-tensors"
    assert artifact.manifest.quantization["bits"] == [options.get("bits", 4)]


def test_packed_products_give_the_fake_quantized_logits(tmp_path: Path) -> None:
    """What inductor-cpu compiles of a trained folder; that packages compute it: tests/export/test_inductor_decoders.py."""
    model = trained({})
    program, made = saved(model, tmp_path / "out"), chosen("inductor-cpu", accuracy_level=0)
    for step in TARGET.recipe(program.contract.kind, made):
        if step.applies(program):
            program = step.rewrite.run(program, PassContext(obstacle=partial(obstacle, TARGET.legal))).program
    check_legal(program, TARGET)
    assert len(program.calls(torch.ops.optc.linear_nbits.default)) >= 8  # two layers, with projections merged
    rows = sequences(21, 14)
    found = run_stage(program, rows).logits
    wanted = [expected(model, torch.tensor([row]))[0] for row in rows]
    assert max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True)) <= 1e-4


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained({})
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="the output exists"):
        save_trained(model, source("llama"), tmp_path / "out", SaveConfig())
    save_trained(model, source("llama"), tmp_path / "out", SaveConfig(force=True))  # an empty folder
    with pytest.raises(InputError, match="a folder that optc did not write"):
        save_trained(model, source("llama"), tmp_path / "out", SaveConfig(force=True))

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("optc.exporters.hf.export.write_shards", fail)
    with pytest.raises(KeyboardInterrupt):
        save_trained(model, source("llama"), tmp_path / "other", SaveConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_weight_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    model = trained({})
    model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(InputError, match=r"(?s)NaN or infinity.*model.layers.1.mlp.up_proj.weight"):
        save_trained(model, source("llama"), tmp_path / "out", SaveConfig())
    assert not list(tmp_path.iterdir())
