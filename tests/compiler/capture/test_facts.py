"""Facts that runtimes ask for, and which class a config may name."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import make_model
from transformers import CLIPVisionConfig, Gemma2Config, LlamaConfig, LlamaForCausalLM, LlavaConfig

from optc.compiler.capture import capture_model
from optc.compiler.capture.attention import caps_scores
from optc.compiler.capture.facts import generates_from_an_encoder, model_facts, rotary_limit, stated_context
from optc.compiler.capture.loading import meta_model
from optc.compiler.capture.pretrained import capture_pretrained
from optc.compiler.diagnostics import CaptureError
from optc.compiler.model_folder.checkpoint import check_folder
from optc.compiler.rewriting.passes import PassContext
from optc.exporters.onnx.genai import genai_config
from optc.passes.kv_cache.static import StaticKVCache
from optc.runtime.generation.tokenizer import eos_token_ids


def _folder(path: Path, eos: object, generation: object) -> Path:
    model = make_model("llama")
    model.config.eos_token_id = eos
    model.generation_config.eos_token_id = eos
    model.save_pretrained(path)
    file = path / "generation_config.json"
    file.unlink(missing_ok=True)
    if generation is not None:
        file.write_text(json.dumps({"eos_token_id": generation, "transformers_version": "5.0.0"}))
    return path


@pytest.mark.parametrize(
    ("eos", "generation", "expected"),
    [
        (2, [2, 7], (2, 7)),
        (2, 9, (9,)),
        (2, None, (2,)),
        ([3, 4], None, (3, 4)),
        (None, 5, (5,)),
        (None, None, ()),
    ],
)
def test_end_of_text_ids_agree(tmp_path: Path, eos: object, generation: object, expected: tuple[int, ...]) -> None:
    """The program, genai_config.json and `optc run` (which reads the copied files) stop at the same tokens."""
    folder = _folder(tmp_path / "model", eos, generation)
    program = capture_pretrained(folder)[0]
    assert program.contract.model.eos_token_ids == expected
    assert eos_token_ids(folder, program.contract.model.eos_token_ids) == expected
    if expected:
        cached = StaticKVCache().run(program, PassContext()).program
        written = genai_config(cached.contract, "model.onnx").model.eos_token_id
        assert written == (list(expected) if len(expected) > 1 else expected[0])


def test_a_model_in_memory_has_its_own_generation_config() -> None:
    model = make_model("qwen2")
    model.config.eos_token_id, model.generation_config.eos_token_id = 2, [2, 11]
    assert capture_model(model).contract.model.eos_token_ids == (2, 11)


def test_facts_of_a_multimodal_model_are_its_language_models() -> None:
    words = Gemma2Config(vocab_size=77, max_position_embeddings=33, hidden_size=24, eos_token_id=5, bos_token_id=4)
    config = LlavaConfig(text_config=words, vision_config=CLIPVisionConfig())
    facts = model_facts(config)
    assert (facts.vocab_size, facts.context_length, facts.hidden_size) == (77, 33, 24)
    assert (facts.bos_token_id, facts.eos_token_ids, facts.model_type) == (4, (5,), "llava")
    assert caps_scores(config)  # Gemma 2 caps them; transformers' sdpa would leave that out
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    words = LlamaConfig(rope_parameters=rope, max_position_embeddings=33)
    assert rotary_limit(LlavaConfig(text_config=words, vision_config=CLIPVisionConfig())) == 33
    with pytest.raises(CaptureError, match="rotary embedding of type 'dynamic' without the length"):
        rotary_limit(SimpleNamespace(rope_parameters=rope))


@pytest.mark.parametrize("name", ["LlamaConfig", "pipeline", "PreTrainedTokenizerFast", "logging", "NoSuchModel"])
def test_only_model_classes_are_called(tmp_path: Path, name: str) -> None:
    folder = _folder(tmp_path / "model", 2, None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
    info = check_folder(folder, trust_remote_code=True)
    with pytest.raises(CaptureError, match=f"unknown architecture {name}"):
        meta_model(info)


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, 32),
        ({"rope_type": "longrope", "short_factor": [1.0, 2.0, 3.0, 4.0], "long_factor": [9.0] * 4}, 16),
    ],
)
def test_rotary_frequencies_that_depend_on_the_length_are_captured_up_to_where_they_change(
    rope: dict[str, Any], limit: int
) -> None:
    """Even where the model has just seen a longer sequence, and holds its frequencies."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        rope_parameters={"rope_theta": 1e4, "original_max_position_embeddings": 16, **rope},
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    long, short = torch.arange(60)[None] % 64, torch.arange(13)[None]
    with torch.no_grad():
        expected = model(short).logits
        model(long)
        program = capture_model(model)
    assert program.contract.model.context_length == limit
    assert program.proof is not None
    note = "up to 16 tokens, of 32: rotary frequencies are those of short sequences, and change beyond"
    assert (note in program.proof.notes) == (limit < 32)
    torch.testing.assert_close(program.module()(short, short), expected)


def test_a_decoder_that_may_read_an_encoder_is_one_program() -> None:
    """Whisper's decoder alone takes the outputs of an encoder, and none of its own ids beside input_ids."""
    import transformers as hf

    assert generates_from_an_encoder(hf.WhisperForConditionalGeneration)
    assert not generates_from_an_encoder(hf.WhisperForCausalLM)
    assert stated_context(hf.WhisperConfig(max_target_positions=96)) == 96
