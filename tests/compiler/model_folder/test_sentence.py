"""modules.json and the files of its modules, as they come from strangers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_folders import MEAN, TANH, WIDTH, write_sentence_folder

from optc.compiler.diagnostics import OptcError, UsageError
from optc.compiler.model_folder.checkpoint import check_folder, config_digest, weights_digest
from optc.compiler.model_folder.sentence import (
    POOLINGS,
    SETTINGS,
    Dense,
    Normalize,
    Pooling,
    sentence_modules,
    with_modules,
)
from optc.request import PoolingName

DENSE = {"in_features": WIDTH, "out_features": 8, "bias": False, "activation_function": TANH}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentence") / "model"
    return write_sentence_folder(folder, [MEAN[0], ("Dense", DENSE), MEAN[1]], settings={"max_seq_length": 9})


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """What the modules are read from, and no model."""
    for name in ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json", "2_Dense/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    (tmp_path / "2_Dense" / "model.safetensors").write_bytes((whole / "2_Dense" / "model.safetensors").read_bytes())
    return tmp_path


def edit(path: Path, **changes: Any) -> None:
    found = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**found, **changes}))


def module(folder: Path, index: int, **changes: Any) -> None:
    found = json.loads((folder / "modules.json").read_text())
    found[index] |= changes
    (folder / "modules.json").write_text(json.dumps(found))


def dense(folder: Path, **tensors: torch.Tensor) -> None:
    path = folder / "2_Dense" / "model.safetensors"
    save_file({**load_file(path), **tensors}, path)


def pickled(folder: Path) -> None:
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")


def linked(folder: Path) -> None:
    (folder / "1_Pooling").rename(folder.parent / f"{folder.name}-elsewhere")
    (folder / "1_Pooling").symlink_to(folder.parent / f"{folder.name}-elsewhere")


def test_what_is_read(folder: Path) -> None:
    found = sentence_modules(folder)
    assert found is not None
    pool, projection, unit = found.steps
    assert (pool, unit, found.most_tokens, found.lower_case) == (Pooling(("mean",)), Normalize(), 9, False)
    assert isinstance(projection, Dense)
    assert (list(projection.weight.shape), projection.bias, projection.activation) == ([8, WIDTH], None, "Tanh")
    assert sorted(found.files) == [
        "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "modules.json",
        "sentence_bert_config.json",
    ]  # fmt: skip
    assert sentence_modules(folder, "none") is None
    with pytest.raises(UsageError, match="--pooling cls contradicts"):
        sentence_modules(folder, "cls")


def test_a_folder_without_modules(tmp_path: Path) -> None:
    assert sentence_modules(tmp_path) is None
    assert sentence_modules(tmp_path, "none") is None
    assert set(get_args(PoolingName)) == {*POOLINGS, "none"}
    for mode in POOLINGS:
        found = sentence_modules(tmp_path, mode)
        assert found is not None
        assert found.steps == (Pooling((mode,)),)
    with pytest.raises(UsageError, match="unknown pooling 'middle'"):
        sentence_modules(tmp_path, "middle")


def test_modules_are_part_of_what_a_model_is(whole: Path) -> None:
    modules = sentence_modules(whole)
    assert modules is not None
    plain = check_folder(whole)
    info = with_modules(plain, modules)
    assert weights_digest(info) != weights_digest(plain)
    assert config_digest(info) == config_digest(plain)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no list": (lambda f: (f / "modules.json").write_text("{}"), "it is not a list"),
    "no JSON": (lambda f: (f / "modules.json").write_text("[" * 9), "malformed JSON"),
    "nested": (lambda f: (f / "1_Pooling" / "config.json").write_text('{"a":' * 70 + "1" + "}" * 70), "nested"),
    "no type": (lambda f: (f / "modules.json").write_text('[{"type": 3}]'), "malformed JSON"),
    "too many": (lambda f: (f / "modules.json").write_text(json.dumps([{"type": "a"}] * 99)), "too many modules"),
    "unknown": (lambda f: module(f, 2, type="sentence_transformers.models.CNN"), "models.CNN' is not known here"),
    "own code": (lambda f: module(f, 1, type="custom_st.Pooling"), "'custom_st.Pooling' is not known here"),
    "first": (lambda f: module(f, 0, type="sentence_transformers.models.BoW"), "models.BoW' is not known here"),
    "order": (lambda f: module(f, 1, type="sentence_transformers.models.Normalize", path="x"), "in another place"),
    "twice": (lambda f: module(f, 3, type="sentence_transformers.models.Pooling", path="1_Pooling"), "another place"),
    "model elsewhere": (lambda f: module(f, 0, path="0_Transformer"), "the model's files are in '0_Transformer'"),
    "leaves": (lambda f: module(f, 1, path="../other"), "bad path"),
    "absolute": (lambda f: module(f, 1, path="/etc"), "bad path"),
    "itself": (lambda f: module(f, 1, path="."), "bad path"),
    "link": (linked, "bad path"),
    "missing": (lambda f: (f / "1_Pooling" / "config.json").unlink(), "No such file"),
    "mode": (lambda f: edit(f / "1_Pooling" / "config.json", pooling_mode="middle"), "unknown pooling 'middle'"),
    "surrogate": (lambda f: edit(f / "1_Pooling" / "config.json", **{"\ud800": 1}), "surrogates not allowed"),
    "texts": (lambda f: edit(f / SETTINGS, prompts={"query": "\udfff"}), "surrogates not allowed"),
    "names": (lambda f: edit(f / SETTINGS, prompts={"\udfff": "q"}), "surrogates not allowed"),
    "modes": (lambda f: edit(f / "1_Pooling" / "config.json", pooling_mode=[]), "pooling of nothing"),
    "prompt": (lambda f: edit(f / "1_Pooling" / "config.json", include_prompt=False), "leaves the prompt out"),
    "new setting": (lambda f: edit(f / "1_Pooling" / "config.json", pooling_mode_median=True), "pooling_mode_median"),
    "function": (lambda f: edit(f / "2_Dense" / "config.json", activation_function="os.system"), "'os.system'"),
    "residual": (lambda f: edit(f / "2_Dense" / "config.json", use_residual=True), "with a residual"),
    "tokens": (lambda f: edit(f / "2_Dense" / "config.json", module_input_name="token_embeddings"), "token_embeddings"),
    "size": (lambda f: edit(f / "2_Dense" / "config.json", out_features=1 << 40), "<= 1048576"),
    "shape": (lambda f: edit(f / "2_Dense" / "config.json", out_features=9), "found [8, 32], expected [9, 32]"),
    "no bias": (lambda f: edit(f / "2_Dense" / "config.json", bias=True), "missing tensor 'linear.bias'"),
    "spare": (lambda f: dense(f, other=torch.zeros(2)), "unexpected tensor 'other'"),
    "NaN": (lambda f: dense(f, **{"linear.weight": torch.full((8, WIDTH), torch.nan)}), "not finite"),
    "pickle": (pickled, "the weights are pickled"),
    "length": (lambda f: edit(f / "sentence_bert_config.json", max_seq_length=0), ">= 1"),
    "task": (lambda f: edit(f / "sentence_bert_config.json", transformer_task="fill-mask"), "unknown transformer_task"),
    "chat": (
        lambda f: edit(f / "sentence_bert_config.json", modality_config={"message": {"method": "forward"}}),
        "unknown modality_config",
    ),
    "arguments": (lambda f: edit(f / "sentence_bert_config.json", model_args={"layers": 2}), "'layers' in model_args"),
    "kind": (
        lambda f: edit(f / "config_sentence_transformers.json", model_type="SparseEncoder"),
        "the folder is a 'SparseEncoder'",
    ),
    "default": (lambda f: edit(f / "config_sentence_transformers.json", default_prompt_name="q"), "none of the prompts"),
    "prompts": (lambda f: edit(f / "config_sentence_transformers.json", prompts={"q": 3}), "malformed JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(folder: Path, name: str) -> None:
    damage, says = REFUSED[name]
    damage(folder)
    with pytest.raises(OptcError) as caught:
        sentence_modules(folder)
    assert says in str(caught.value)
    assert caught.value.remedy
    assert caught.value.where


def test_what_changes_nothing_is_taken(folder: Path) -> None:
    edit(folder / "sentence_bert_config.json", model_args={"torch_dtype": "float16"}, unpad_inputs=False)
    edit(folder / "config_sentence_transformers.json", prompts={"query": None}, similarity_fn_name="dot", other=[1])
    found = sentence_modules(folder)
    assert found is not None
    assert found.prompts == {"query": ""}
