"""Folders of Medusa heads: written and read back; malformed ones, and heads of another model, are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from medusa_heads import write_heads
from safetensors.torch import load_file, save_file

from optc.compiler.diagnostics import InputError
from optc.compiler.model_folder.checkpoint import check_folder, weights_digest
from optc.compiler.model_folder.draft_origin import Origin
from optc.compiler.model_folder.medusa import WEIGHTS, MedusaFolder, check_base, heads_digest


@pytest.mark.parametrize("vocabulary", [None, 24])
def test_a_folder_is_read_as_it_was_written(vocabulary: int | None, tmp_path: Path) -> None:
    made = write_heads(tmp_path, 8, heads=3, layers=2, vocabulary=vocabulary, weights="a" * 64)
    found = MedusaFolder.read(tmp_path)
    assert (found.config, found.origin) == (made.config, made.origin)
    assert (found.hidden_size, found.vocab_size) == (8, vocabulary)
    assert found.numbers == 3 * 2 * (8 * 8 + 8) + (0 if vocabulary is None else 3 * vocabulary * 8)
    assert (tmp_path / WEIGHTS).stat().st_mode == (
        tmp_path / "config.json"
    ).stat().st_mode  # for all who read the folder
    assert set(load_file(tmp_path / WEIGHTS)) == {
        *(f"medusa_head.{k}.{j}.linear.{part}" for k in range(3) for j in range(2) for part in ("weight", "bias")),
        *(f"medusa_head.{k}.2.weight" for k in range(3) if vocabulary),
    }
    for ours, theirs in zip(made.heads, found.heads, strict=True):
        assert all(
            torch.equal(*pair)
            for left, right in zip(ours.blocks, theirs.blocks, strict=True)
            for pair in zip(left, right, strict=True)
        )
        assert ours.linear is None or torch.equal(ours.linear, theirs.linear)  # type: ignore[arg-type]


def test_names_without_a_prefix_are_read(tmp_path: Path) -> None:
    write_heads(tmp_path, 8)
    tensors = {name.removeprefix("medusa_head."): tensor for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    assert MedusaFolder.read(tmp_path).hidden_size == 8


def _without(tensors: dict[str, Any]) -> None:
    del tensors["medusa_head.1.0.linear.weight"]


def _narrow(tensors: dict[str, Any]) -> None:
    tensors["medusa_head.1.0.linear.weight"] = torch.zeros(8, 4)


def _infinite(tensors: dict[str, Any]) -> None:
    tensors["medusa_head.0.0.linear.bias"] = torch.full((8,), torch.inf)


def _spare(tensors: dict[str, Any]) -> None:
    tensors["medusa_head.2.0.linear.bias"] = torch.zeros(8)


def _half_own(tensors: dict[str, Any]) -> None:
    tensors["medusa_head.0.1.weight"] = torch.zeros(24, 8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without, r"tensor '1.0.linear.weight' is missing"),
        (_narrow, r"tensor '1.0.linear.weight' is \[8, 4\], not \[8, 8\]"),
        (_infinite, r"tensor '0.0.linear.bias' has values that are not finite"),
        (_spare, r"there is no place for tensor '2.0.linear.bias'"),
        (_half_own, r"tensor '1.1.weight' is missing"),
    ],
)
def test_tensors_that_do_not_fit_are_named(damage: Any, message: str, tmp_path: Path) -> None:
    write_heads(tmp_path, 8)
    tensors = load_file(tmp_path / WEIGHTS)
    damage(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=message):
        MedusaFolder.read(tmp_path)


def test_configs_that_cannot_be(tmp_path: Path) -> None:
    write_heads(tmp_path, 8)
    config = json.loads((tmp_path / "config.json").read_text())
    for wrong in ({"medusa_num_heads": 0}, {"medusa_num_heads": 10**9}, {"medusa_num_layers": "two"}):
        (tmp_path / "config.json").write_text(json.dumps({**config, **wrong}))
        with pytest.raises(InputError, match="the Medusa heads cannot be used"):
            MedusaFolder.read(tmp_path)
    (tmp_path / "config.json").unlink()
    for read in (MedusaFolder.read, heads_digest):
        with pytest.raises(InputError, match=r"config.json"):
            read(tmp_path)


def test_heads_of_another_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    save_file({"x": torch.zeros(2)}, tmp_path / "model" / "model.safetensors")
    info = check_folder(tmp_path / "model")
    write_heads(tmp_path / "ours", 8, weights=weights_digest(info))
    write_heads(tmp_path / "theirs", 8, weights="b" * 64)
    write_heads(tmp_path / "unknown", 8)
    check_base(tmp_path / "ours", info)
    check_base(tmp_path / "unknown", info)
    with pytest.raises(InputError, match=r"trained for another model[^$]*bbbbbbbbbbbb"):
        check_base(tmp_path / "theirs", info)


def test_the_examples_heads_are_of_the_model_of_its_draft() -> None:
    """Both name the same weights."""
    heads, draft = (ROOT / "examples" / f"fiction-26m-{name}" for name in ("medusa", "eagle3"))
    found = MedusaFolder.read(heads)
    assert (found.hidden_size, found.vocab_size, len(found.heads)) == (512, None, 4)
    assert found.origin == Origin.read(draft) is not None
