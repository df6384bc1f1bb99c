"""Encoder-decoder models: two programs, held to transformers' own forward and `generate`."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
import transformers as hf
from command_line import optc as call
from conftest import ROOT
from tokenizers import Regex, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Core

import optc
import optc.capturing
from optc.compiler.artifact.engines import AOTINDUCTOR
from optc.compiler.artifact.manifest import decode, encode
from optc.compiler.capture import capture_encoder_decoder, capture_model
from optc.compiler.capture.encoder_decoder import EncoderDecoder
from optc.compiler.capture.proof.encoder_decoder import prove_encoder_decoder
from optc.compiler.diagnostics import ArtifactError, CaptureError, GateError, InputError, TargetError, UsageError
from optc.compiler.execution.cross_rows import calls_of
from optc.compiler.execution.probe import random_probe
from optc.compiler.ir.surgery import set_weight
from optc.compiler.pipeline.gate import UNLIMITED, Limits
from optc.compiler.pipeline.pipeline import Pipeline, PipelineOptions
from optc.encoder_decoder import answer_probe
from optc.passes.quantization.rtn import QuantizeRtn
from optc.runtime.generation.beams import BeamSettings, beam_search
from optc.runtime.sessions.package_encoder_decoder import PackageEncoderDecoderSession

Capture = pytest.CaptureFixture[str]
LETTERS = "abcdefghijklmnopqrstuvwxyz .,"
TEXTS = ["a b", "hello, my world. you"]


def _varied(model: Any) -> Any:
    """Weights of which greedy answers differ from token to token and from source to source."""
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data = torch.randn(weight.shape, generator=generator) * 1.5 * weight.shape[-1] ** -0.5
    return model.eval().requires_grad_(False)


def make_t5() -> Any:
    config = hf.T5Config(
        d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=64,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return _varied(hf.T5ForConditionalGeneration(config))


def make_whisper() -> Any:
    config = hf.WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=64, max_source_positions=10, max_target_positions=24,
        num_mel_bins=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        begin_suppress_tokens=None,
    )  # fmt: skip
    return _varied(hf.WhisperForConditionalGeneration(config))


def _save_tokenizer(folder: Path) -> None:
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{letter: 3 + i for i, letter in enumerate(LETTERS)}}
    core = Core(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    core.save(str(folder / "tokenizer.json"))


@dataclass(frozen=True)
class Compiled:
    model: Any
    source: Path
    pair: EncoderDecoder
    artifact: Path


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """T5, compiled once for onnx-cpu; and the programs that this compile captured."""
    place, model, kept = tmp_path_factory.mktemp("t5"), make_t5(), []
    model.save_pretrained(place / "source")
    _save_tokenizer(place / "source")
    capture = optc.capturing.capture_pretrained_pair

    def keeping(*args: Any, **options: Any) -> Any:
        kept.append(capture(*args, **options))
        return kept[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optc.capturing, "capture_pretrained_pair", keeping)
        optc.compile(place / "source", target="onnx-cpu", output=place / "out")
    return Compiled(model, place / "source", kept[0][0], place / "out")


def _padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def _until_end(row: list[int], stop: int) -> list[int]:
    return row[: row.index(stop) + 1] if stop in row else row


def test_greedy_answers_are_those_of_generate(t5: Compiled) -> None:
    model = optc.load(t5.artifact)
    for texts in ([TEXTS[1]], TEXTS, ["x", "zz top", "q."]):
        inputs = _padded([model.encode(text) for text in texts])
        expected = t5.model.generate(**inputs, do_sample=False, max_new_tokens=20)[:, 1:].tolist()
        found = [row.tokens for row in model.generate_batch(texts, max_new_tokens=20)]
        assert found == [_until_end(row, 1) for row in expected]
    assert len({tuple(row) for row in found}) == 3  # not one answer to everything
    beginning = torch.tensor([[0, 9, 4]])
    with model.answers_from((0, 9, 4)):
        (answer,) = model.generate_batch([TEXTS[0]], max_new_tokens=6)
    inputs = _padded([model.encode(TEXTS[0])])
    expected = t5.model.generate(**inputs, decoder_input_ids=beginning, do_sample=False, max_new_tokens=6)
    assert answer.tokens == _until_end(expected[0, 3:].tolist(), 1)
    assert model.generate(TEXTS[0], max_new_tokens=6).tokens != answer.tokens
    states = model.encoder(TEXTS)
    wanted = t5.model.get_encoder()(**_padded([model.encode(text) for text in TEXTS]))[0]
    for row, text in enumerate(TEXTS):
        count = len(model.encode(text))
        np.testing.assert_allclose(states[row, :count], wanted[row, :count], atol=1e-4)
    model.close()


PYTHON = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "docs" / "encoder-decoder.md").read_text(), re.MULTILINE | re.DOTALL
)


def test_the_code_of_the_page(t5: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """As it stands, but for the token of a language, which this vocabulary has not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "t5").symlink_to(t5.artifact)
    ours, _optimum = PYTHON
    scope: dict[str, Any] = {}
    exec(ours.replace("250004", "9"), scope)
    assert np.shape(scope["states"]) == (2, max(len(scope["model"].encode(text)) for text in ("a text", "another")), 32)
    assert len(capsys.readouterr().out.splitlines()) >= 2
    scope["model"].close()


def test_the_code_of_the_page_for_optimum(t5: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optimum.onnxruntime", reason="optimum-onnx is not installed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "t5").symlink_to(t5.artifact)
    _ours, optimum = PYTHON
    exec(optimum, {})


def _beams_of(model: Any, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
    """Answers of transformers' beam search, without the start token."""
    found = model.generate(**_padded(prompts), do_sample=False, max_new_tokens=10, **settings)
    return [_until_end(row, 1) for row in found[:, 1:].tolist()]


@pytest.mark.parametrize(
    ("beams", "penalty", "early"), [(2, 1.0, False), (5, 2.0, False), (3, -1.0, True), (4, 0.0, True), (1, 1.0, False)]
)
def test_beams_are_those_of_generate(t5: Compiled, beams: int, penalty: float, early: bool) -> None:
    model, texts = optc.load(t5.artifact), ["x", "zz top", "q.", "hello, my"]
    prompts = [model.encode(text) for text in texts]
    settings = {"num_beams": beams, "length_penalty": penalty, "early_stopping": early}
    expected = _beams_of(t5.model, prompts, **(settings if beams > 1 else {}))
    found = model.search(texts, beams=beams, length_penalty=penalty, early_stopping=early, max_new_tokens=10)
    assert [row.tokens for row in found] == expected
    assert [row.stop for row in found] == ["stop-token" if row[-1] == 1 else "length" for row in expected]
    model.close()


def make_bart() -> Any:
    config = hf.BartConfig(
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=64, max_position_embeddings=32, pad_token_id=0,
        bos_token_id=2, eos_token_id=1, decoder_start_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    model = _varied(hf.BartForConditionalGeneration(config))
    model.final_logits_bias[0, 1] = 2.5  # some answers end
    return model


@pytest.mark.parametrize(("beams", "penalty", "early"), [(4, 2.0, True), (3, 1.0, False), (2, -1.0, False)])
def test_beams_of_bart_are_those_of_generate(bart: tuple[Any, Any], beams: int, penalty: float, early: bool) -> None:
    """BART counts positions from 2, and begins its answers with the token that ends them."""
    model, session = bart
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in (4, 9, 2, 12, 6, 1)]
    settings = {"num_beams": beams, "length_penalty": penalty, "early_stopping": early}
    expected = _beams_of(model, prompts, **settings)
    found = beam_search(session, prompts, BeamSettings(beams, penalty, early), max_new_tokens=10, stop_ids=(1,))
    assert found.tokens == expected
    assert len({len(row) for row in expected}) > 1  # some end, some do not


@pytest.fixture(scope="module")
def bart(t5: Compiled) -> tuple[Any, PackageEncoderDecoderSession]:
    """A BART, and the session of AOTInductor's packages over the programs that these are compiled of."""
    model = make_bart()
    pair = capture_encoder_decoder(model)
    return model, _package_session(t5, pair)


def _package_session(t5: Compiled, pair: EncoderDecoder) -> PackageEncoderDecoderSession:
    """A session over programs, with the other entries of T5's manifest."""
    manifest = optc.load(t5.artifact).manifest.with_program("encoder", contract=pair.encoder.contract)
    manifest = manifest.with_program("model", contract=pair.decoder.contract)
    return PackageEncoderDecoderSession(manifest, pair.encoder, pair.decoder, pair.decoder.contract)


def test_beams_end_begin_and_branch_as_they_do_there(t5: Compiled) -> None:
    """A likely end token, tokens that are ruled out, a first token that is forced; over packages too."""
    model = copy.deepcopy(t5.model)
    model.lm_head.weight[1] *= 2.5
    ruled = {"forced_bos_token_id": 7, "suppress_tokens": [5, 40], "begin_suppress_tokens": [9]}
    model.generation_config.update(**ruled)
    pair = capture_encoder_decoder(model)
    session = _package_session(t5, pair)
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in (4, 2, 5, 9, 3, 7, 6, 1)]
    lengths = set()
    for settings in (
        BeamSettings(3), BeamSettings(4, length_penalty=1.5), BeamSettings(2, early_stopping=True),
        BeamSettings(4, length_penalty=0.3, early_stopping=True), BeamSettings(3, length_penalty=3.0, early_stopping=True),
    ):  # fmt: skip
        expected = _beams_of(
            model, prompts, num_beams=settings.beams, length_penalty=settings.length_penalty,
            early_stopping=settings.early_stopping,
        )  # fmt: skip
        found = beam_search(session, prompts, settings, max_new_tokens=10, stop_ids=(1,))
        assert found.tokens == expected
        assert {row[0] for row in found.tokens} == {7}
        lengths |= {len(row) for row in found.tokens}
    assert len(lengths) > 2  # answers of several lengths were compared
    with pytest.raises(UsageError, match="beams"):
        BeamSettings(0)


def test_graphs_are_as_optimum_reads_them(t5: Compiled) -> None:
    """optimum-onnx 0.1 takes keys and values layer by layer: own key and value, then those of the encoder."""

    def ends(name: str) -> tuple[list[str], list[str]]:
        graph = onnx.load(t5.artifact / name, load_external_data=False).graph
        return [item.name for item in graph.input], [item.name for item in graph.output]

    layers = [
        f"{layer}.{side}.{part}" for layer in (0, 1) for side in ("decoder", "encoder") for part in ("key", "value")
    ]
    own = [name for name in layers if "decoder" in name]
    assert ends("encoder_model.onnx") == (["input_ids", "attention_mask"], ["last_hidden_state"])
    inputs, outputs = ends("decoder_model.onnx")
    assert inputs == ["input_ids", "encoder_attention_mask", "encoder_hidden_states"]
    assert sorted(outputs) == sorted(["logits", *(f"present.{name}" for name in layers)])
    inputs, outputs = ends("decoder_with_past_model.onnx")
    assert inputs == ["input_ids", "encoder_attention_mask", *(f"past_key_values.{name}" for name in layers)]
    assert outputs == ["logits", *(f"present.{name}" for name in own)]
    # The two graphs of the decoder share one file of weights: the second adds none.
    sizes = {path.name: path.stat().st_size for path in t5.artifact.glob("*.data")}
    weights = sum(weight.numel() * 4 for name, weight in t5.model.named_parameters() if not name.startswith("encoder."))
    assert set(sizes) == {"encoder_model.onnx.data", "decoder_model.onnx.data"}
    assert sizes["decoder_model.onnx.data"] <= weights * 1.01


def test_manifest_holds_both_programs(t5: Compiled, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("inspect", str(t5.artifact), "--json") == 0
    manifest = json.loads(capsys.readouterr().out)
    assert set(manifest["programs"]) == {"model", "encoder"}
    proof, opened = manifest["capture"], manifest["opened"]
    assert proof["proved"]
    assert len(proof["inputs"]) == 4
    assert proof["figures"][0]["max_abs_diff"] <= 3e-5 * proof["figures"][0]["scale"]
    assert opened["opened"]
    assert opened["relative"] < 1e-5
    assert {row["program"] for row in manifest["passes"]} == {"model", "encoder"}
    assert manifest["programs"]["model"]["contract"]["cross"]["start_token_id"] == 0
    assert call("inspect", str(t5.artifact)) == 0
    assert "inputs of the encoder, encoder_model.onnx:" in capsys.readouterr().out


def test_commands(t5: Compiled, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = str(t5.artifact)
    prompt = ("--prompt", TEXTS[0], "--max-new-tokens", "5", "--json")
    assert call("run", folder, *prompt) == 0
    found = json.loads(capsys.readouterr().out)["tokens"]
    inputs = _padded([optc.load(folder).encode(TEXTS[0])])
    assert found == t5.model.generate(**inputs, do_sample=False, max_new_tokens=5)[0, 1:].tolist()
    assert call("run", folder, *prompt, "--decoder-input-ids", "0,64") == 3
    capsys.readouterr()
    flags = ("--beams", "3", "--length-penalty", "2", "--early-stopping")
    assert call("run", folder, *prompt, *flags) == 0
    searched = json.loads(capsys.readouterr().out)["tokens"]
    settings = {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True}
    expected = t5.model.generate(**inputs, do_sample=False, max_new_tokens=5, **settings)
    assert searched == _until_end(expected[0, 1:].tolist(), 1)
    for given, text in (
        (("--length-penalty", "2"), "have no effect without --beams"),
        (("--early-stopping",), "have no effect without --beams"),
        (("--beams", "3", "--temperature", "0.5"), "--temperature has no effect with --beams"),
        (("--beams", "0"), "beams"),
    ):
        assert call("run", folder, *prompt, *given) == 2, given
        assert text in capsys.readouterr().err
    assert call("bench", folder, "--prompt-length", "4", "--new-tokens", "2", "--samples", "1", "--json") == 0
    capsys.readouterr()
    refused = {
        ("eval", folder, "--text", str(t5.source / "config.json")): "does not measure encoder-decoder models",
        ("run", folder, "--chat"): "does not chat",
        ("bundle", folder, "-o", str(tmp_path / "bundle")): "it has two programs",
        ("compile", str(t5.source), "--target", "onnx-cpu", "--kv-cache", "static", "-o", str(tmp_path / "a")): "leave",
        ("plan", str(t5.source), "--target", "onnx-cpu", "--quant", "gptq"): "quantize-gptq is calibrated",
        ("plan", str(t5.source), "--target", "vllm"): "choose --target inductor-cpu, onnx-cpu",
    }
    for command, text in refused.items():
        assert call(*command) == 4, command
        assert text in capsys.readouterr().err


def test_proof_sees_another_program(t5: Compiled) -> None:
    encoder, decoder = t5.pair.encoder, t5.pair.decoder
    assert prove_encoder_decoder(encoder, decoder, t5.model).proved
    for program, name in (
        (encoder, "decoder.block.1.layer.1.EncDecAttention.v.weight"),
        (decoder, "decoder.final_layer_norm.weight"),
    ):
        changed = program.clone()
        set_weight(changed, name, changed.weight(name) * 1.01)
        pair = (changed, decoder) if program is encoder else (encoder, changed)
        with pytest.raises(GateError, match="encoder's states are the model's"):
            prove_encoder_decoder(*pair, t5.model)


def test_each_program_is_quantized_and_gated(t5: Compiled) -> None:
    encoder, decoder = t5.pair.encoder, t5.pair.decoder
    given = random_probe(64, longest=12)
    probes = (given, answer_probe(encoder, decoder, given))
    assert {len(row) for row in probes[1].sequences} == {16}
    for program, probe in zip((encoder, decoder), probes, strict=True):
        step = QuantizeRtn(group_size=16)
        result = Pipeline([step]).run(program, PipelineOptions(probe=probe, limits=UNLIMITED))
        assert len(result.program.contract.quantization) == result.records[0].matched > 5
        assert result.records[0].drift is not None
        assert result.records[0].drift.max_abs_diff > 1e-3
        if program is encoder:  # what only the decoder reads is held to its budget too
            assert any("EncDecAttention" in name for name in result.program.contract.quantization)
        else:
            with pytest.raises(GateError, match="quantize-rtn"):
                Pipeline([step]).run(program, PipelineOptions(probe=probe, limits=Limits(kl=0.0)))


def test_session_over_packages(t5: Compiled) -> None:
    """The session of AOTInductor's packages, over the programs that these are compiled of."""
    manifest = optc.load(t5.artifact).manifest
    encoder, decoder = t5.pair.encoder, t5.pair.decoder
    manifest = manifest.with_program("encoder", contract=encoder.contract)
    session = PackageEncoderDecoderSession(manifest, encoder, decoder, decoder.contract)
    prompts = [[5, 6, 7, 1], [9, 1]]
    expected = t5.model.generate(**_padded(prompts), do_sample=False, max_new_tokens=6, min_new_tokens=6)[:, 1:]
    tokens = session.prefill(prompts).argmax(1)
    found = [tokens]
    session_logits = None
    for _ in range(4):
        session_logits = session.decode(tokens.tolist())
        session_logits[:, 1] = -np.inf  # min_new_tokens
        tokens = session_logits.argmax(1)
        found.append(tokens)
    assert np.stack(found, 1).tolist() == expected[:, :5].tolist()
    session.rewind([3, 3])
    again = session.decode(found[2].tolist())
    assert again[:, 2:].argmax(1).tolist() == (np.where(np.arange(64) < 2, -np.inf, again).argmax(1) - 2).tolist()
    np.testing.assert_allclose(session.decode(found[3].tolist())[:, 0], session_logits[:, 0], atol=1e-5)
    with pytest.raises(TargetError, match="does not score a text by itself"):
        next(session.score([1, 2]))
    with pytest.raises(UsageError, match="as many tokens each"):
        session.extend([[1], [2, 3]])
    with pytest.raises(InputError, match="prompt 1 is empty"):
        session.prefill([[1], []])


def test_contracts_of_no_pair_are_refused(t5: Compiled) -> None:
    manifest = optc.load(t5.artifact).manifest
    encoder, decoder = t5.pair.encoder, t5.pair.decoder
    contract = decoder.contract
    with pytest.raises(
        ArtifactError, match="does not read what the encoder gives"
    ):  # the ONNX encoder gives states alone
        PackageEncoderDecoderSession(manifest, encoder, decoder, contract)
    for changes, text in (
        ({"inputs": contract.inputs[1:]}, "one input of token ids"),
        ({"outputs": contract.outputs[:-1]}, "as many caches in as out"),
        ({"inputs": (contract.inputs[0], *contract.inputs[2:])}, "an encoder of texts with their mask"),
    ):
        other = msgspec.structs.replace(contract, **changes)
        with pytest.raises(ArtifactError, match=text):
            PackageEncoderDecoderSession(manifest, encoder, decoder, other)
    alone = encode(manifest.alone("model"))
    with pytest.raises(ArtifactError, match="come together"):
        decode(alone, "manifest.json")
    assert AOTINDUCTOR.native_code_of([{"model": "model.pt2", "library": None}, {"model": "encoder.pt2"}]) == (
        "model.pt2",
        "encoder.pt2",
    )


def test_whisper_answers_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, folder = make_whisper(), tmp_path / "out"
    features = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(3))

    def answers() -> list[list[int]]:
        generate = hf.GenerationMixin.generate  # Whisper's own adds what its processor knows
        found: list[list[int]] = generate(model, input_features=features, do_sample=False, max_new_tokens=8).tolist()
        return [row[1:] for row in found]

    free = answers()
    model.generation_config.suppress_tokens = [free[1][-1]]
    model.generation_config.begin_suppress_tokens = [free[0][0]]
    expected = answers()
    assert all(row != other for row, other in zip(free, expected, strict=True))  # the model would choose both
    optc.compile(model, target="onnx-cpu", output=folder)
    opened = optc.load(folder)
    found = [row.tokens for row in opened.generate_batch(list(features.numpy()), max_new_tokens=8)]
    assert found == [_until_end(row, 2) for row in expected]
    assert found[0] != found[1]
    with pytest.raises(InputError, match="reads sounds, not text"):
        opened.generate("hello")
    with pytest.raises(InputError, match="input_features"):
        opened.generate(np.zeros((8, 19), np.float32))
    np.savez(tmp_path / "features.npz", input_features=features.numpy())
    run = ("run", str(folder), "--max-new-tokens", "8", "--json", "--inputs")
    assert call(*run, str(tmp_path / "features.npz")) == 0
    assert [row["tokens"] for row in json.loads(capsys.readouterr().out)["results"]] == found
    assert call(*run, str(tmp_path / "sound.wav")) == 3
    assert "optc does not read audio" in capsys.readouterr().err
    assert call("run", str(folder), "--prompt", "hello") == 2
    assert call("bench", str(folder)) == 4


def test_models_that_are_no_pair_or_not_one_program(t5: Compiled) -> None:
    with pytest.raises(CaptureError, match="is two programs"):
        capture_model(t5.model)
    bare = hf.T5Model(t5.model.config)
    with pytest.raises(CaptureError, match="without a head"):
        capture_model(bare)
    config = t5.model.config.to_dict() | {"decoder_start_token_id": None, "bos_token_id": None}
    model = hf.T5ForConditionalGeneration(hf.T5Config(**config))
    model.generation_config.decoder_start_token_id = model.generation_config.bos_token_id = None
    with pytest.raises(CaptureError, match="what its answers start with"):
        capture_encoder_decoder(model)


@pytest.mark.parametrize(
    ("length", "parts"),
    [(1, [(0, 1)]), (2, [(0, 1), (1, 2)]), (9, [(0, 2), (2, 6), (6, 7), (7, 8), (8, 9)])],
)
def test_answers_are_fed_call_by_call(length: int, parts: list[tuple[int, int]]) -> None:
    assert list(calls_of(length)) == parts
