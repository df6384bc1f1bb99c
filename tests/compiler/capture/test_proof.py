"""A capture is held to the model's own forward: right ones pass, wrong ones stop with the module named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from families import FAMILIES, make_model
from torch import Tensor, nn

from optc.compiler.capture import attention, capture_model, capture_module, pretrained, shells
from optc.compiler.capture.positions import position_offset
from optc.compiler.capture.proof import widened
from optc.compiler.capture.proof.models import Proof
from optc.compiler.capture.proof.reference import own_implementations
from optc.compiler.diagnostics import CaptureError, GateError
from optc.compiler.execution.stage_driver import run_stage

_SIZE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


def _large(model: Any) -> Any:
    """Weights so large that errors show."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(3.0)
    return model.eval().requires_grad_(False)


def _roberta(config: Any = hf.RobertaConfig, cls: Any = hf.RobertaForCausalLM, **more: Any) -> Any:
    torch.manual_seed(0)
    return _large(cls(config(**{**_SIZE, **more}, is_decoder=True)))


# -- right captures -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_proved(name: str) -> None:
    """In bfloat16: the program, widened, is what the model, widened, computes; and both round alike."""
    proof = capture_model(make_model(name, attention="sdpa" if name != "gemma2" else "eager").bfloat16()).proof
    assert proof is not None
    assert proof.proved
    assert proof.inputs == (
        "ragged random tokens, right padded",
        "ragged random tokens, left padded",
        "random tokens, batch 1",
        "one token",
    )
    wide, narrow = proof.figures
    assert (wide.dtype, narrow.dtype) == ("float32", "bfloat16")
    assert wide.max_abs_diff <= 3e-6 * wide.scale
    assert wide.kl is not None
    assert wide.kl < 1e-12
    assert narrow.relative < 5e-2
    assert proof.notes == ()


def test_the_reference_caps_its_scores_too() -> None:
    """transformers 5.17 takes sdpa for Gemma 2, which computes without the cap."""
    model = make_model("gemma2", attention="eager")
    model.config._attn_implementation = "sdpa"
    with own_implementations(model) as chosen:
        assert chosen == model.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "sdpa"


def test_text_is_read_where_there_is_some() -> None:
    proof = capture_model(make_model("llama"), tokens=[5, 7, 0, 9] * 60).proof
    assert proof is not None
    assert proof.inputs[0] == "ragged text, right padded"
    assert proof.reference == "LlamaForCausalLM (eager)"


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (hf.RobertaForCausalLM, hf.RobertaConfig),
        (hf.CamembertForCausalLM, hf.CamembertConfig),
        (hf.XLMRobertaForCausalLM, hf.XLMRobertaConfig),
        (hf.XLMRobertaXLForCausalLM, hf.XLMRobertaXLConfig),
        (hf.RobertaPreLayerNormForCausalLM, hf.RobertaPreLayerNormConfig),
        (hf.Data2VecTextForCausalLM, hf.Data2VecTextConfig),
    ],
)
def test_positions_that_begin_after_the_padding_token(cls: Any, config: Any) -> None:
    """Captured from 0 once, off by 1.2 on logits of 1.6, without a word."""
    model = _roberta(config, cls)
    program = capture_model(model)
    assert program.contract.model.context_length == 62
    ids = torch.randint(3, 128, (1, 12))
    difference = program(ids, torch.arange(12)[None]) - model(input_ids=ids).logits
    assert float(difference.abs().max()) < 5e-6


@pytest.mark.parametrize(("pad", "offset"), [(0, 1), (1, 2), (5, 6)])
def test_where_positions_begin(pad: int, offset: int) -> None:
    model = hf.RobertaForCausalLM(hf.RobertaConfig(**{**_SIZE, "pad_token_id": pad}, is_decoder=True)).eval()
    assert position_offset(model) == offset


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_positions_of_others_begin_at_zero(name: str) -> None:
    assert position_offset(make_model(name)) == 0


def test_padding_on_the_left_of_an_encoder() -> None:
    model = _large(hf.XLMRobertaModel(hf.XLMRobertaConfig(**_SIZE)))
    proof = capture_model(model).proof
    assert proof is not None
    assert "ragged random tokens, left padded" in proof.inputs
    assert proof.figures[0].kl is None


# -- wrong captures, each of which once went through ----------------------------------------------


@pytest.mark.parametrize("value", [torch.zeros(4), True, 3])
def test_unknown_arguments_of_attention_are_refused(value: object) -> None:
    query = torch.zeros(1, 1, 2, 4)
    with pytest.raises(CaptureError, match="does not know: sinks"):
        attention.attend(nn.Module(), query, query, query, None, sinks=value)


@pytest.mark.parametrize("value", [None, False])
def test_unknown_arguments_that_say_nothing_are_taken(value: object) -> None:
    query = torch.zeros(1, 1, 2, 4)
    assert attention.attend(nn.Module().eval(), query, query, query, None, sinks=value)[0].shape == (
        1,
        2,
        1,
        4,
    )


def test_unknown_arguments_of_masks_are_refused() -> None:
    from transformers.masking_utils import causal_mask_function

    with pytest.raises(CaptureError, match="mask maker an argument that optc does not know: chunk_size"):
        attention.make_mask(mask_function=causal_mask_function, batch_size=1, chunk_size=4)


def test_an_answer_that_is_read_at_a_padded_place_is_not_held_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """ModernBERT's classes come from the first place. Padded on the left that one sees no token in its window."""
    config = hf.ModernBertConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64, local_attention=4,
        global_attn_every_n_layers=3, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
        max_position_embeddings=64, classifier_pooling="cls",
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.ModernBertForSequenceClassification(config).eval().requires_grad_(False)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5.0) if weight.dim() > 1 else weight.add_(0.05)
    proof = capture_model(model).proof
    assert proof is not None
    assert "where padding on the left stands" in "; ".join(proof.notes)
    assert len(proof.figures) == 1
    monkeypatch.setattr(Proof, "_reads_padding", lambda *_: False)
    with pytest.raises(GateError, match="left padded"):
        capture_model(model)


def test_heads_with_several_answers_keep_them_all() -> None:
    """Scores of the first and last token of an answer; words and whether a sentence follows."""
    ids, mask = torch.tensor([[5, 6, 7, 8, 9], [4, 3, 2, 0, 0]]), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    heads = {
        hf.BertForQuestionAnswering: {"start_logits": "output", "end_logits": "output"},
        hf.BertForPreTraining: {"prediction_logits": "output", "seq_relationship_logits": "classes"},
    }
    for head, outputs in heads.items():
        model = _large(head(hf.BertConfig(**_SIZE)))
        program = capture_model(model)
        sizes = program.user_inputs()[0].meta["val"].shape
        assert not any(
            size.node.expr.is_number for size in sizes
        )  # it was 11, as the number of an answer's columns was asked for
        assert {spec.name: spec.role for spec in program.contract.outputs} == outputs
        wanted = model(input_ids=ids, attention_mask=mask)
        found = program.exported.module()(ids, mask, torch.zeros_like(ids))
        for (name, role), output in zip(outputs.items(), found, strict=True):
            real = mask.bool() if role == "output" else ...
            torch.testing.assert_close(
                output[real], wanted[name][real], rtol=0, atol=2e-4 * float(wanted[name].abs().max())
            )
        assert program.proof is not None
        assert program.proof.proved
        run = run_stage(program, [[5, 6, 7, 8, 9], [4, 3, 2]])  # what passes are held to
        assert run.role == "output"
        assert [len(rows) for rows in run.logits[:4]] == [
            5,
            3,
            *((5, 3) if outputs.popitem()[1] == "output" else (1, 1)),
        ]


def test_one_of_several_answers_that_differs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second output, whose numbers are small beside the first one's."""
    answers = shells.answers

    def damaged(out: Any) -> dict[str, torch.Tensor]:
        found = answers(out)
        return {name: value * (1.001 if name == "end_logits" else 1.0) for name, value in found.items()}

    model = _large(hf.BertForQuestionAnswering(hf.BertConfig(**_SIZE)))
    with torch.no_grad():
        model.qa_outputs.weight[1] *= 1e-2
        model.qa_outputs.bias[1] *= 1e-2
    capture_model(model)
    monkeypatch.setattr(shells, "answers", damaged)
    with pytest.raises(GateError, match="the program is not what BertForQuestionAnswering computes"):
        capture_model(model)


# -- damaged captures -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_scale_is_noticed(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Two percent, which bfloat16's own rounding would hide."""
    attend = attention.attend

    def damaged(module: Any, *args: Any, scaling: float, **more: Any) -> Any:
        return attend(module, *args, scaling=scaling * (1.02 if module.layer_idx == 1 else 1.0), **more)

    monkeypatch.setattr(attention, "attend", damaged)
    with pytest.raises(GateError, match="the capture failed the numerics gate") as caught:
        capture_model(make_model("llama").to(dtype))
    assert caught.value.exit_code == 5
    assert "model.layers.1.self_attn.o_proj (Linear), relative difference" in str(caught.value.where)
    assert "(float32)" in str(caught.value.why)


def test_a_lost_padding_mask_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    make_mask = attention.make_mask

    def damaged(**arguments: Any) -> attention.Mask:
        return make_mask(**{**arguments, "attention_mask": None})

    monkeypatch.setattr(attention, "make_mask", damaged)
    with pytest.raises(GateError) as caught:
        capture_model(make_model("bert"))
    assert "bert.encoder.layer.0.attention" in str(caught.value.where)
    assert str(caught.value.why).endswith("ragged random tokens, right padded; ragged random tokens, left padded")


def test_a_window_off_by_one_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    atoms = attention._atoms
    monkeypatch.setattr(attention, "_atoms", lambda mask: [(k, n - 1 if k == "window" else n) for k, n in atoms(mask)])
    with pytest.raises(GateError, match=r"model\.layers\.0\.self_attn\.o_proj"):
        capture_model(make_model("mistral"))


def test_a_window_that_is_longer_than_the_text_is_said() -> None:
    config = hf.MistralConfig(**{**_SIZE, "num_key_value_heads": 2}, sliding_window=4096)
    proof = capture_model(_large(hf.MistralForCausalLM(config))).proof
    assert proof is not None
    assert proof.notes == ("windows or chunks of 4096 tokens are longer than the 48 tokens compared",)


def test_positions_that_are_not_shifted_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "position_offset", lambda model: 0)
    with pytest.raises(GateError, match=r"roberta\.embeddings\.position_embeddings \(Embedding\)"):
        capture_model(_roberta(max_position_embeddings=90))
    with pytest.raises(GateError, match="index 40 is out of bounds"):  # 40 tokens are promised, 38 fit
        capture_model(_roberta(max_position_embeddings=40))


def test_overflow_in_float16_is_named() -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e5)
        model.model.layers[1].mlp.up_proj.weight.mul_(10)
    model.model.layers[1].mlp.down_proj.weight.clamp_(-6e4, 6e4)
    assert capture_model(model).proof is not None
    with pytest.raises(GateError, match="LlamaForCausalLM is not finite in float16") as caught:
        capture_model(model.half())
    assert "model.layers.1.mlp.down_proj (Linear)" in str(caught.value.where)
    assert caught.value.remedy == "choose --dtype bf16 or fp32"


def test_weights_that_overflow_in_float16_are_named() -> None:
    model = make_model("llama")
    model.model.layers[0].mlp.up_proj.weight[0, 0] = 7e4
    with pytest.raises(GateError, match=r"weight model\.layers\.0\.mlp\.up_proj\.weight"):
        capture_model(model.half())


def test_proof_can_be_left_out() -> None:
    assert capture_model(make_model("llama"), prove=False).proof is None


def test_a_forward_that_fails_stops_the_capture() -> None:
    model = make_model("llama")
    program = capture_model(model, prove=False)
    model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no forward today")))
    with pytest.raises(GateError, match="the model's own forward fails") as caught:
        pretrained.prove_model(program, model)
    assert caught.value.why == ("on ragged random tokens, right padded in float32: RuntimeError: no forward today")


def test_types_that_cannot_be_widened_are_noted() -> None:
    model = make_model("llama").bfloat16()
    program = capture_model(model, prove=False)
    model.model.norm.register_forward_hook(lambda module, args, output: output.bfloat16())
    proof = pretrained.prove_model(program, model)
    assert [row.dtype for row in proof.figures] == ["bfloat16"]
    assert proof.notes[0].startswith("not compared in float32: on ragged random tokens, right padded in float32: ")


def test_widening_puts_everything_back() -> None:
    model = make_model("gpt2").bfloat16()
    before = {name: (value, value.data_ptr()) for name, value in model.state_dict(keep_vars=True).items()}
    with widened.widened(model), torch.no_grad():
        assert model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.dtype == torch.float32
        assert model.transformer.h[0].mlp.c_fc.weight.dtype == torch.bfloat16  # a block is wide while it runs
    after = {name: (value, value.data_ptr()) for name, value in model.state_dict(keep_vars=True).items()}
    assert {name: value[1] for name, value in before.items()} == {n: v[1] for n, v in after.items()}
    assert {value.dtype for value, _ in after.values()} == {torch.bfloat16}


# -- modules ----------------------------------------------------------------------------------------


class _Branch(nn.Module):
    """Another function at a batch of one, which an example of two does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * (2 if x.shape[0] == 1 else 1)


class _Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class _Erratic(nn.Module):
    """A host's state in the numbers, which a seed does not reach."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.calls


class _Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 + self.count.add_(1)


def test_modules_are_proved_at_other_sizes() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    proof = capture_module(net, (torch.randn(2, 3, 4),), dynamic={"input_0": {0: "batch", 1: "seq"}}).proof
    assert proof is not None
    assert proof.inputs == ("the example inputs", "batch = 1", "seq = 1", "batch = 3, seq = 4")
    assert proof.figures[0].max_abs_diff < 1e-6


def test_a_batch_of_one_that_is_another_function() -> None:
    with pytest.raises(GateError, match="with batch = 1"):
        capture_module(_Branch(), (torch.randn(2, 4),), dynamic={"input_0": {0: "batch"}})


def test_sizes_that_a_module_does_not_take_are_noted() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, -1)

    proof = capture_module(Odd(), (torch.randn(4, 3),)).proof
    assert proof is not None
    assert proof.inputs == ("the example inputs",)


def test_random_modules_draw_the_same_numbers() -> None:
    proof = capture_module(_Random(), (torch.randn(2, 4),)).proof
    assert proof is not None
    assert proof.figures[0].max_abs_diff == 0.0


def test_modules_with_other_numbers_each_time_are_named() -> None:
    with pytest.raises(GateError, match="_Erratic gives different numbers each time"):
        capture_module(_Erratic(), (torch.randn(2, 4),))


def test_buffers_that_a_forward_writes_are_put_back() -> None:
    module = _Counter()
    proof = capture_module(module, (torch.randn(2, 4),)).proof
    assert proof is not None
    assert proof.figures[0].max_abs_diff == 0.0
    assert float(module.count) == 0.0


def test_shared_infinities_are_no_difference() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x > 0, x, -torch.inf)

    proof = capture_module(Masked(), (torch.randn(3, 4),)).proof
    assert proof is not None
    assert proof.figures[0].max_abs_diff == 0.0
