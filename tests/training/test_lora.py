"""LoRA and QLoRA: what trains, what is held, what is written, against peft and the pass quantize-nf4."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_model
from hf_folders import logits, source, tensors
from stages import apply, captured
from torch import Tensor, nn
from torch.fx import Node
from training_runs import small_config

pytest.importorskip("peft", reason="needs peft (extra train)")

from optc.compiler.analysis.linears import linear_sites
from optc.compiler.capture import capture_pretrained
from optc.compiler.diagnostics import InputError, NoMatchError, UsageError
from optc.compiler.ir.program import Program
from optc.passes.quantization.nf4 import QuantizeNf4
from optc.training.export import SaveConfig, save_trained
from optc.training.lora import LoraConfig, adapted_linears, apply_lora, merged_state
from optc.training.nf4_linear import Nf4Linear
from optc.training.untrained import left_experts

IDS = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(0))


def trained(config: LoraConfig, steps: int = 3, family: str = "llama") -> Any:
    """A tiny model with adapters after some steps, in eval mode."""
    model = apply_lora(make_model(family, attention="sdpa").requires_grad_(True).train(), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    return model.eval()


def expected(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS, use_cache=False).logits
    return out


def nf4_weights(double_quant: bool, group_size: int) -> dict[str, Tensor]:
    """What the linears of the captured model multiply with after the pass, by weight name."""
    program = apply(QuantizeNf4(double_quant=double_quant, group_size=group_size), captured("llama")).program
    found = {}
    for site in linear_sites(program):
        if site.placeholder is None:
            name = program.contract.quantization[program.weight_of(site.weight.args[0]) or ""].source
            found[name] = value_from_weights(program, site.weight)
    return found


def value_from_weights(program: Program, node: Node) -> Tensor:
    """What a node computes of weights alone."""
    weight = program.weight_of(node)
    if weight is not None:
        return program.weight(weight)
    args = torch.fx.node.map_arg(node.args, lambda item: value_from_weights(program, item))
    value: Tensor = node.target(*args, **node.kwargs)  # type: ignore[operator]
    return value


@pytest.mark.parametrize(("double_quant", "group_size"), [(True, 64), (False, 32), (True, 0)])
def test_the_base_of_qlora_is_what_the_pass_makes(double_quant: bool, group_size: int) -> None:
    config = LoraConfig(enabled=True, base="nf4", double_quant=double_quant, group_size=group_size, rank=2)
    model = apply_lora(make_model("llama", attention="sdpa"), config)
    base = {
        f"{name.removesuffix('.base_layer')}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, Nf4Linear)
    }
    passed = nf4_weights(double_quant, group_size)
    assert base.keys() == passed.keys()
    assert len(base) == 14
    for name, weight in base.items():
        assert torch.equal(weight, passed[name]), name


def test_the_base_takes_four_bits_and_no_dense_copy() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(256, 512)
    linear = Nf4Linear(plain, "w", 64, double_quant=True)
    assert linear.packed.nbytes == 256 * 512 // 2
    assert 8 * linear.stored_bytes() / (256 * 512) < 4.14  # 4 + 8 / 64 bits, steps of 256 scales and a mean
    assert "weight" not in dict(linear.named_parameters())
    x = torch.randn(3, 256, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = linear(x)
    assert all(tensor.numel() < plain.weight.numel() for tensor in kept)
    dense = linear.weight
    assert torch.equal(out, nn.functional.linear(x, dense) + plain.bias)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.allclose(grad, dense.sum(0).expand(3, -1), atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = linear(x)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, nn.functional.linear(x.bfloat16(), linear.dense(torch.bfloat16)) + plain.bias.bfloat16())


def test_trainable_and_optimizer_bytes_fall_by_nine_tenths(example_model: Path) -> None:
    """Of the model that ships, counted after one step of AdamW: parameters that train, and its two moments."""
    from transformers import AutoModelForCausalLM

    def held(config: LoraConfig) -> int:
        model = AutoModelForCausalLM.from_pretrained(example_model, dtype=torch.float32)
        model = apply_lora(model, config)
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable)
        for parameter in trainable:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        moments = [item for state in optimizer.state.values() for item in state.values() if torch.is_tensor(item)]
        return sum(item.nbytes for item in [*trainable, *moments])

    full, qlora = held(LoraConfig()), held(LoraConfig(enabled=True, base="nf4"))
    assert full > 3 * 4 * 3_000_000
    assert qlora <= 0.1 * full


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_a_merged_folder_computes_what_was_trained(tmp_path: Path, base: Any) -> None:
    model = trained(LoraConfig(enabled=True, rank=4, base=base))
    save_trained(model, source("llama"), tmp_path / "out", SaveConfig())
    program, _ = capture_pretrained(tmp_path / "out")
    assert float((logits(program, IDS) - expected(model)).abs().max()) <= 1e-4
    names = set(tensors(source("llama")))
    assert set(tensors(tmp_path / "out")) == names
    assert not program.contract.quantization


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_an_adapter_folder_is_peft_s(tmp_path: Path, base: Any) -> None:
    """peft itself loads the folder onto the base; for QLoRA the base is what quantize-nf4 makes."""
    from peft import PeftModel

    model = trained(LoraConfig(enabled=True, rank=4, base=base, export="adapters", targets=("q_proj", "v_proj")))
    save_trained(model, source("llama"), tmp_path / "out", SaveConfig())
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    plain = make_model("llama", attention="sdpa")
    if base == "nf4":
        for name, weight in nf4_weights(double_quant=True, group_size=64).items():
            plain.get_parameter(name).copy_(weight)
    loaded = PeftModel.from_pretrained(plain, tmp_path / "out")
    assert torch.equal(expected(loaded), expected(model))


OPTIONS: dict[str, dict[str, Any]] = {
    "dora": {"dora": True},
    "dora on nf4": {"dora": True, "base": "nf4", "group_size": 32},
    "rslora": {"rslora": True},
    "patterns": {"rank_pattern": ("v_proj=2", "*.layers.0.mlp.*=6"), "alpha_pattern": ("v_proj=3.0",)},
    "a whole head": {"modules_to_save": ("lm_head", "layers.1.input_layernorm")},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "experts alone": {"targets": ("gate_up_proj", "down_proj")},
    "some of them, and linears": {"targets": ("down_proj", "q_proj"), "rslora": True},
}
CONV1D: dict[str, dict[str, Any]] = {"plain": {}, "dora": {"dora": True}, "nf4": {"base": "nf4", "group_size": 32}}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *(("llama", item) for item in OPTIONS.values()),
        *(("mixtral", item) for item in EXPERTS.values()),
        *(("gpt2", item) for item in CONV1D.values()),
    ],
    ids=[*OPTIONS, *EXPERTS, *(f"gpt2 {name}" for name in CONV1D)],
)
def test_options_of_peft(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    """transformers loads the merged folder, and peft the adapters, each with the logits that were trained."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = trained(LoraConfig(enabled=True, rank=4, **options), family=family)
    save_trained(model, source(family), tmp_path / "merged", SaveConfig())
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(expected(read), expected(model), rtol=0, atol=2e-5)
    model.optc_lora = LoraConfig(enabled=True, rank=4, export="adapters", **options)
    save_trained(model, source(family), tmp_path / "adapters", SaveConfig())
    base = make_model(family, attention="sdpa")
    if options.get("base") == "nf4":
        dense = apply_lora(make_model(family), LoraConfig(enabled=True, rank=1, base="nf4", group_size=32))
        base.load_state_dict(merged_state(dense))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapters")
    torch.testing.assert_close(expected(loaded), expected(model), rtol=0, atol=2e-6)


def test_experts_with_adapters_are_trained_each() -> None:
    """A pair of factors for each expert; those that no token reached keep theirs, and nothing else is trained."""
    model = trained(LoraConfig(enabled=True, rank=4, targets=("gate_up_proj", "down_proj")), family="mixtral")
    before, after = make_model("mixtral").state_dict(), merged_state(model)
    assert left_experts(model, small_config(Path(), Path(), Path(), lora={"enabled": True})) == ()
    on_nf4 = small_config(Path(), Path(), Path(), lora={"enabled": True, "base": "nf4"})
    assert left_experts(model, on_nf4) == (
        "experts have adapters on a base that is not in NF4: 196,608 weights in 4 tensors, "
        "model.layers.0.mlp.experts.gate_up_proj the first",
    )
    changed = {name for name, item in after.items() if not torch.equal(item, before[name])}
    assert changed == {name for name in before if name.endswith(("gate_up_proj", "down_proj"))}
    name = "model.layers.0.mlp.experts.down_proj"
    moved = (after[name] - before[name]).flatten(1).norm(dim=1)
    assert moved.shape[0] == model.config.num_local_experts
    assert int((moved > 0).sum()) >= 2
    factors = [torch.linalg.matrix_rank(expert - old) for expert, old in zip(after[name], before[name], strict=True)]
    assert max(map(int, factors)) <= 4


@pytest.mark.parametrize(("more", "key"), [({"dora": True}, "lora.dora"), ({"dropout": 0.1}, "lora.dropout")])
def test_what_stacked_experts_do_not_take(more: dict[str, Any], key: str) -> None:
    with pytest.raises(UsageError, match=rf"{key} does not go with adapters on stacked experts"):
        apply_lora(make_model("mixtral"), LoraConfig(enabled=True, targets=("down_proj",), **more))


def test_scales_and_ranks_are_peft_s_own() -> None:
    """What the options mean: shapes of factors, alpha / rank or alpha / sqrt(rank), and what is trained."""
    from peft import LoraConfig as Peft
    from peft import PeftModel, get_peft_model

    ours = apply_lora(
        make_model("llama"),
        LoraConfig(
            enabled=True,
            rank=4,
            rslora=True,
            dora=True,
            rank_pattern=("v_proj=2", "*.layers.0.mlp.*=6"),
            alpha_pattern=("q_proj=8",),
            modules_to_save=("lm_head", "embed_tokens"),
        ),
    )
    ranks = {"v_proj": 2, "layers.0.mlp.gate_proj": 6, "layers.0.mlp.up_proj": 6, "layers.0.mlp.down_proj": 6}
    settings = Peft(
        r=4,
        lora_alpha=32,
        use_rslora=True,
        use_dora=True,
        rank_pattern=ranks,
        alpha_pattern={"q_proj": 8},
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        modules_to_save=["lm_head", "embed_tokens"],
        task_type="CAUSAL_LM",
    )
    theirs: PeftModel = get_peft_model(make_model("llama"), settings)
    inner = theirs.base_model.model
    shapes = [
        {name: (tuple(item.shape), item.requires_grad) for name, item in model.named_parameters()}
        for model in (ours, inner)
    ]
    assert shapes[0] == shapes[1]
    scales = [{name: dict(layer.scaling) for name, layer in adapted_linears(model)} for model in (ours, inner)]
    assert scales[0] == scales[1]
    assert scales[0]["model.layers.0.mlp.up_proj"] == {"default": pytest.approx(32 / 6**0.5)}


def test_a_head_that_is_trained_alone_is_no_longer_tied(tmp_path: Path, example_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(example_model, dtype=torch.float32)
    assert model.config.tie_word_embeddings
    model = apply_lora(model, LoraConfig(enabled=True, rank=2, modules_to_save=("lm_head",)))
    model.lm_head.modules_to_save["default"].weight.data.mul_(2)
    save_trained(model, example_model, tmp_path / "out", SaveConfig())
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert not read.config.tie_word_embeddings
    assert torch.equal(read.lm_head.weight, 2 * read.model.embed_tokens.weight)
    torch.testing.assert_close(expected(read), expected(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "phi3", "gpt-neox"])
def test_any_decoder_gets_adapters(family: str) -> None:
    model = trained(LoraConfig(enabled=True, rank=2), 2, family)
    head = model.get_output_embeddings()
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    adapted = [name for name, _ in adapted_linears(model)]
    assert adapted
    assert all(
        any(name.startswith(f"{one}.") for one in adapted) or model.get_submodule(name) is head for name in linears
    )
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_what_cannot_be_adapted_is_refused() -> None:
    model = make_model("llama")
    with pytest.raises(UsageError, match=r"(?s)unknown target of lora.targets 'q_prj'.*q_proj"):
        apply_lora(model, LoraConfig(enabled=True, targets=("q_prj",)))
    with pytest.raises(InputError, match=r"(?s)group size 48 does not divide every weight.*q_proj.weight"):
        apply_lora(model, LoraConfig(enabled=True, base="nf4", group_size=48))
    with pytest.raises(InputError, match="the model has no linear to adapt"):
        apply_lora(nn.Module(), LoraConfig(enabled=True))
    with pytest.raises(NoMatchError, match=r"lora\.rank_pattern: 'q_prj' matches no weight"):
        apply_lora(model, LoraConfig(enabled=True, rank_pattern=("q_prj=2",)))
    with pytest.raises(UsageError, match=r"(?s)unknown module of lora.modules_to_save 'lm_haed'.*lm_head"):
        apply_lora(model, LoraConfig(enabled=True, modules_to_save=("lm_haed",)))
    with pytest.raises(UsageError, match=r"trains 'model\.layers\.0\.mlp\.gate_proj' whole, which has an adapter"):
        apply_lora(model, LoraConfig(enabled=True, modules_to_save=("mlp",)))
    for key, text in (("rank_pattern", "q_proj"), ("rank_pattern", "q_proj=1.5"), ("alpha_pattern", "q_proj=0")):
        with pytest.raises(UsageError, match=f"lora.{key} cannot be '{text}'"):
            LoraConfig(**{key: (text,)})
    with pytest.raises(UsageError, match=r"lora\.rank=0"):
        LoraConfig(rank=0)
    with pytest.raises(InputError, match=r"(?s)K = 3 is odd.*two codes in a byte"):
        Nf4Linear(nn.Linear(3, 4), "w", 0, double_quant=False)
    broken = nn.Linear(64, 4)
    broken.weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"(?s)the weight holds NaN or infinity.*w\.weight"):
        Nf4Linear(broken, "w.weight", 64, double_quant=False)
