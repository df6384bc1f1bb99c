"""Folders of sentence-transformers as one program, against transformers' forward and pooling written out by hand."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers as hf
from artifacts import make_manifest
from command_line import optc, optc_json
from conftest import ROOT
from safetensors.torch import load_file
from sentence_folders import (
    TEXTS,
    WIDTH,
    WORDS,
    embedding_artifact,
    randomized,
    tiny_bert,
    whole_folder,
    write_sentence_folder,
    write_tokenizer,
)
from serving_server import text_artifact
from torch import Tensor

import optc as package
from optc.compiler.capture import capture_pretrained
from optc.compiler.capture.embedding import EmbeddingHead
from optc.compiler.capture.proof import prove_model
from optc.compiler.capture.proof.reference import Batch
from optc.compiler.diagnostics import CaptureError, GateError, InputError, UsageError
from optc.compiler.ir.program import Program
from optc.compiler.model_folder.sentence import Pooling, SentenceModules
from optc.runtime.measuring.tensors import source_run
from optc.runtime.sessions.embedding_model import ragged_batches

MODES = ["lasttoken", "cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean"]
Capture = pytest.CaptureFixture[str]


def tokens_of(folder: Path, text: str, most: int = 16) -> list[int]:
    """What the tokenizer of the folder makes of a text, cut as sentence-transformers lets transformers cut it."""
    core = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    core.enable_truncation(most)
    return list(core.encode(text).ids)


def pooled(model: Any, ids: Sequence[int], modes: Sequence[str]) -> Tensor:
    """Ways of pooling, as their papers and sentence-transformers' documentation describe them, side by side."""
    with torch.no_grad():
        states = model(input_ids=torch.tensor([ids])).last_hidden_state[0].double()
    count = len(ids)
    ramp = torch.arange(1.0, count + 1, dtype=torch.float64)
    found = {
        "lasttoken": states[count - 1],
        "cls": states[0],
        "max": states.amax(0),
        "mean": states.sum(0) / count,
        "mean_sqrt_len_tokens": states.sum(0) / count**0.5,
        "weightedmean": (states * ramp[:, None]).sum(0) / (count * (count + 1) / 2),
    }
    return torch.cat([found[mode] for mode in modes])


def by_hand(text: str) -> Tensor:
    """The embedding of `whole_folder` of a text that is lower-cased already."""
    folder = whole_folder()
    model = hf.BertModel.from_pretrained(folder)
    tensors = load_file(folder / "2_Dense" / "model.safetensors")
    x = pooled(model, tokens_of(folder, text), ["mean", "cls"])
    x = torch.tanh(tensors["linear.weight"].double() @ x + tensors["linear.bias"].double())
    return x / x.norm()


def padded(rows: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    size = max(map(len, rows))
    ids = [[0] * (size - len(row)) * left + [*row] + [0] * (size - len(row)) * (not left) for row in rows]
    mask = [[0] * (size - len(row)) * left + [1] * len(row) + [0] * (size - len(row)) * (not left) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def run(program: Program, ids: Tensor, mask: Tensor) -> Tensor:
    made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    out = program(*(made[spec.role] for spec in program.contract.inputs))
    found: Tensor = out[0] if isinstance(out, tuple | list) else out
    return found


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Program]:
    """A decoder's model with every way of pooling side by side: causal attention lets padding on the left change nothing."""
    config = hf.Qwen3Config(
        vocab_size=len(WORDS) + 4, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, intermediate_size=64, max_position_embeddings=40, pad_token_id=0,
    )  # fmt: skip
    folder = write_sentence_folder(
        tmp_path_factory.mktemp("qwen") / "model",
        [("Pooling", {"pooling_mode": MODES, "embedding_dimension": WIDTH})],
        model=randomized(hf.Qwen3ForCausalLM(config)),
    )
    return folder, package.capture(folder)


def test_every_way_of_pooling_under_padding(qwen: tuple[Path, Program]) -> None:
    folder, program = qwen
    facts = program.contract.embedding
    assert facts is not None
    assert (facts.size, list(facts.pooling), facts.normalized) == (6 * WIDTH, MODES, False)
    assert (program.contract.kind, program.contract.outputs[0].role) == ("encoder", "embedding")
    assert program.proof is not None
    assert program.proof.reference.startswith("Qwen3Model")
    model = hf.Qwen3Model.from_pretrained(folder)
    rows = [[5, 9, 4, 7, 8, 6, 10], [6, 5], [11]]
    wanted = torch.stack([pooled(model, row, MODES) for row in rows])
    for left in (False, True):
        torch.testing.assert_close(run(program, *padded(rows, left=left)).double(), wanted, atol=1e-4, rtol=0)


def test_a_head_that_is_wrong_is_noticed(qwen: tuple[Path, Program], monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof of stage 0 pools by itself: one way in another place, and a mask that is not looked at."""
    folder, program = qwen
    model = hf.Qwen3Model.from_pretrained(folder)
    other = EmbeddingHead(SentenceModules((Pooling((*MODES[:-2], MODES[-1], MODES[-2])),)), torch.float32)
    with pytest.raises(GateError, match="the program is not what Qwen3Model computes"):
        prove_model(program, model, head=other)
    right = EmbeddingHead(SentenceModules((Pooling(tuple(MODES)),)), torch.float32)
    assert prove_model(program, model, head=right).proved
    monkeypatch.setattr(Batch, "rows", lambda self, output: list(output))  # padding is pooled, too
    with pytest.raises(GateError, match="the program is not what Qwen3Model computes"):
        prove_model(program, model, head=right)


def test_sliding_windows_in_both_directions(tmp_path: Path) -> None:
    """Masks that transformers makes by vmap, as those of EmbeddingGemma, are captured as plain calls."""
    config = hf.Gemma3TextConfig(
        vocab_size=len(WORDS) + 4, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, head_dim=16,
        num_key_value_heads=1, intermediate_size=16, max_position_embeddings=40, sliding_window=6,
        layer_types=["sliding_attention"], use_bidirectional_attention=True,
    )  # fmt: skip
    folder = write_sentence_folder(
        tmp_path / "model", [("Pooling", {"pooling_mode": "mean"})], model=randomized(hf.Gemma3TextModel(config))
    )
    program, _ = capture_pretrained(folder)
    assert {node.op for node in program.graph.nodes} == {"placeholder", "call_function", "output"}
    model, row = hf.Gemma3TextModel.from_pretrained(folder), [5, 9, 4, 7, 8, 6, 10, 12, 11]
    wanted = pooled(model, row, ["mean"])
    found = run(program, torch.tensor([row]), torch.ones((1, 9), dtype=torch.long))[0]
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=0)


def test_the_encoder_of_a_model_that_has_a_decoder(tmp_path: Path) -> None:
    """T5, as sentence-t5 and GTR have it: no end of positions but that of the folder."""
    config = hf.T5Config(vocab_size=len(WORDS) + 4, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    folder = write_sentence_folder(
        tmp_path / "model",
        [("Pooling", {"pooling_mode": "mean"})],
        settings={"max_seq_length": 12},
        model=randomized(hf.T5EncoderModel(config)),
    )
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**saved, "is_encoder_decoder": True}))  # as on the hub
    program, _ = capture_pretrained(folder)
    assert program.contract.model.context_length == 12
    row = [5, 9, 4, 7, 8]
    wanted = pooled(hf.T5EncoderModel.from_pretrained(folder), row, ["mean"])
    found = run(program, torch.tensor([row]), torch.ones((1, 5), dtype=torch.long))[0]
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=0)


def test_texts_to_embeddings() -> None:
    """Ragged batches, prompts, case and length; each text gets what it gets alone."""
    model = package.load(embedding_artifact())
    long = " ".join(["sea"] * 30)
    texts = [*TEXTS, "The OLD man", f"{long} [SEP]"]
    found = model.embed(texts, prompt_name="document", truncate=True, batch_tokens=24)
    assert (found.shape, found.dtype) == ((5, 24), np.float32)
    wanted = torch.stack([by_hand(text) for text in [*TEXTS, "the old man", f"{long} [SEP]"]])
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    for text, row in zip(texts, found, strict=True):
        np.testing.assert_allclose(model.embed(text, prompt_name="document", truncate=True), row, atol=1e-6)
    np.testing.assert_allclose(model.embed(["a boat"])[0], by_hand("query : a boat"), atol=1e-5)  # the default
    np.testing.assert_allclose(model(["a boat"])[0], by_hand("query : a boat"), atol=1e-5)
    with pytest.raises(InputError, match="a text has 32 tokens, the context holds 16"):
        model.embed([long], prompt_name="document")
    with pytest.raises(UsageError, match="unknown prompt 'querry'"):
        model.embed("a", prompt_name="querry")
    with pytest.raises(InputError, match="an empty text"):
        model.embed([])
    with pytest.raises(UsageError, match="texts"):
        model.embed([3])
    with pytest.raises(InputError, match="token id 99 is outside the vocabulary"):
        model.embed_tokens([[5], [99]])


def test_texts_of_like_length_share_a_batch() -> None:
    """Each once, the longest first; padding counts towards the budget, which a single text may exceed."""
    lengths = [3, 9, 1, 30, 2, 8, 3, 3]
    batches = list(ragged_batches(lengths, 18))
    assert [[lengths[index] for index in batch] for batch in batches] == [[30], [9, 8], [3, 3, 3, 2, 1]]
    assert sorted(index for batch in batches for index in batch) == list(range(8))
    assert [len(batch) for batch in ragged_batches([1] * 7, 100, most=3)] == [3, 3, 1]


def test_commands(tmp_path: Path, capsys: Capture) -> None:
    """run --embed, eval beside the source, bench; and what they refuse."""
    artifact, lines, out = embedding_artifact(), tmp_path / "lines.txt", tmp_path / "out.npy"
    lines.write_text("\n\n".join(TEXTS) + "\n")
    given = ("--prompt-name", "document", "--truncate", "--text", lines, "--save-outputs", out)
    found = optc_json(capsys, "run", artifact, "--embed", *given)
    assert [row["text"] for row in found["embeddings"]] == TEXTS
    assert found["size"] == 24
    saved = np.load(out)
    np.testing.assert_array_equal(saved, np.array([row["embedding"] for row in found["embeddings"]], np.float32))
    np.testing.assert_allclose(saved[1], by_hand("a boat"), atol=1e-5)
    assert optc("run", artifact, "--embed", "--prompt", "a boat") == 0
    assert capsys.readouterr().out.startswith("a boat: ")
    lines.write_text("\n".join(TEXTS[:2]))
    quality = optc_json(capsys, "eval", artifact, "--text", lines)
    assert quality["cosine"] == pytest.approx(1, abs=1e-6)
    assert (quality["rows"], quality["beside"]) == (2, str(whole_folder().resolve()))
    assert optc_json(capsys, "bench", artifact, "--batch", 3, "--prompt-length", 8, "--samples", 2)["batch"] == 3
    for arguments, says in (
        (("--embed",), "give either --prompt or --text"),
        (("--embed", "--prompt", "a", "--text", lines), "not both"),
        (("--embed", "--prompt", "a", "--top-k", "3"), "--top-k has no effect with --embed"),
        (("--embed", "--prompt", "a", "--save-outputs", tmp_path / "x.txt"), "no .npy or .npz"),
        (("--prompt", "a", "--truncate"), "--truncate has no effect without --embed"),
    ):
        assert optc("run", artifact, *arguments) == 2
        assert says in capsys.readouterr().err
    assert optc("inspect", artifact) == 0
    line = "embeddings: 24 numbers, pooling mean and cls, length 1, lower case; prompts: document, query (default)"
    assert line in capsys.readouterr().out.splitlines()
    assert optc("compile", whole_folder(), "--target", "vllm", "-o", tmp_path / "folder") == 4
    assert "not what makes embeddings" in capsys.readouterr().err
    plan = optc_json(capsys, "plan", whole_folder(), "--target", "onnx-cpu")
    assert plan["linears"] == 13


def test_pooling_that_was_asked_for(tmp_path: Path) -> None:
    """A plain encoder; what `optc eval` compares with pools its source in the same way."""
    tiny_bert().save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    program = package.capture(tmp_path, pooling="lasttoken")
    wanted = pooled(hf.BertModel.from_pretrained(tmp_path), tokens_of(tmp_path, TEXTS[0], 40), ["lasttoken"])
    ids, mask = padded([tokens_of(tmp_path, TEXTS[0], 40), [5]], left=False)
    torch.testing.assert_close(run(program, ids, mask)[0].double(), wanted, atol=1e-4, rtol=0)
    source = source_run(make_manifest(contract=program.contract), tmp_path)
    assert source is not None
    given = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    np.testing.assert_allclose(source(given)["embedding"][0], wanted, atol=1e-4)


def test_what_has_no_embeddings(tmp_path: Path, capsys: Capture) -> None:
    assert optc("run", text_artifact(), "--embed", "--prompt", "a") == 2
    assert "--embed has no effect on a model that generates text" in capsys.readouterr().err
    with pytest.raises(UsageError, match="no effect on what is no model folder"):
        package.capture(torch.nn.Linear(2, 2), (torch.ones(1, 2),), pooling="mean")
    folder = write_sentence_folder(tmp_path / "model", [("Pooling", {"pooling_mode": "mean"})])
    (folder / "2_Dense").mkdir()
    entries = json.loads((folder / "modules.json").read_text())
    entries.append({"type": "sentence_transformers.models.LSTM", "path": "2_LSTM"})
    (folder / "modules.json").write_text(json.dumps(entries))
    with pytest.raises(CaptureError, match=r"sentence_transformers\.models\.LSTM"):
        package.capture(folder)


PAGE = (ROOT / "docs" / "embeddings.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_commands_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """As they stand, but for the model, which is a tiny one, and what it has groups for; the server and its load: tests of
    serving and of loads."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "minilm").symlink_to(embedding_artifact())
    (tmp_path / "lines.txt").write_text("\n".join(TEXTS[:2]))
    commands = [line.partition(" #")[0] for kind, text in BLOCKS if not kind for line in text.splitlines()]
    first, second, *others, server, load, last, _curl = [line for line in commands if line.strip()]
    assert first == "optc compile sentence-transformers/all-MiniLM-L6-v2 --target onnx-cpu -o out/minilm"
    assert server.strip() == "optc serve out/minilm"
    assert load.strip() == "optc bench --serve out/minilm --prompt-length 16 --concurrency 8"
    assert last == "optc compile examples/fiction-3m --target onnx-cpu --pooling mean -o out/fiction-embed"
    small = f"{second} --group-size 32".replace("sentence-transformers/all-MiniLM-L6-v2", str(whole_folder()))
    for command in (small, *others):
        name, *words = shlex.split(command)
        assert name == "optc"
        assert optc(*words) == 0, capsys.readouterr().err
    quality = optc_json(capsys, "eval", "out/minilm-int8", "--text", "lines.txt")
    assert 0.999 < quality["cosine"] < 1
    (script,) = [text for kind, text in BLOCKS if kind == "python"]
    scope: dict[str, Any] = {}
    exec(script, scope)
    np.testing.assert_allclose(scope["vectors"][0], by_hand("query : the old man"), atol=1e-5)
