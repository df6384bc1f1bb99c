"""The traits of the dialect's ops, held against what the references do."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import pytest
import torch
from dialect_calls import CALLS, D, H, N, tensors_of
from torch import Tensor

from optc.compiler.ops import library
from optc.compiler.ops.library import OpSpec, attends, find, makes_weight, named, specs

ATTENTION = {
    "attention": "BHSD",
    "cached_attention": "BHSD",
    "cached_attention_": "BHSD",
    "cached_attention_codes": "BHSD",
    "masked_attention": "BHSD",
    "group_query_attention": "BSC",
    "group_query_attention_codes": "BSC",
    "paged_attention_": "NHD",
    "paged_tree_attention_": "NHD",
    "rotary_paged_attention_": "NHD",
}
MUTATES = {
    "cached_attention_": ("k_cache", "v_cache"),
    "paged_attention_": ("k_pool", "v_pool"),
    "paged_tree_attention_": ("k_pool", "v_pool"),
    "rotary_paged_attention_": ("k_pool", "v_pool"),
    "sample_": ("seen", "counts"),
    "greedy_step_": ("input_ids", "position_ids", "slot_mapping", "context_lens"),
    "lay_out_drafts_": ("input_ids", "position_ids", "slot_mapping", "context_lens"),
    "accept_drafts_": ("heads", "picks", "position_ids", "slot_mapping", "context_lens"),
    "choose_draft_": ("drafts",),
    "advance_step_": ("input_ids", "position_ids", "slot_mapping", "context_lens"),
}


def call(spec: OpSpec, form: Any = None) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The tensors before and after a call, and its results."""
    before, after = tensors_of(spec.name), tensors_of(spec.name)
    rest = iter(after)
    args, keywords = CALLS[spec.name]
    out = (form or spec.op)(*[next(rest) if isinstance(item, Tensor) else item for item in args], **keywords)
    return before, after, list(out) if isinstance(out, tuple | list) else [out]


@pytest.mark.parametrize("name", CALLS)
def test_writes_what_the_schema_says(name: str) -> None:
    spec = named(name)
    assert spec is not None
    before, after, _ = call(spec)
    arguments = [argument.name for argument in spec.op._schema.arguments]
    given = [label for label, item in zip(arguments, CALLS[name][0], strict=False) if isinstance(item, Tensor)]
    changed = [
        label
        for label, old, new in zip(given, before, after, strict=True)
        if not torch.equal(old.view(torch.uint8), new.view(torch.uint8))
    ]
    assert tuple(changed) == spec.mutates == MUTATES.get(name, ())


def test_attention_says_its_axes() -> None:
    assert {spec.name: spec.attends for spec in specs() if spec.attends} == ATTENTION
    shapes = {"BHSD": (2, H, 3, D), "BSC": (2, 3, H * D), "NHD": (4, H, D)}
    for name, axes in ATTENTION.items():
        spec = named(name)
        assert spec is not None
        assert tuple(call(spec)[2][0].shape) == shapes[axes]
        assert attends(spec.op)
    assert not attends(torch.ops.aten.add.Tensor)


@pytest.mark.parametrize("name", [spec.name for spec in specs() if spec.aten is not None])
def test_traceable_form_computes_the_same(name: str) -> None:
    spec = named(name)
    assert spec is not None
    for found, expected in zip(call(spec, spec.aten)[2], call(spec)[2], strict=True):
        torch.testing.assert_close(found.float(), expected.float(), rtol=1e-5, atol=1e-5)


def test_who_makes_weights_and_codes() -> None:
    weights = {spec.name for spec in specs() if spec.makes_weight}
    assert weights == {"dequantize", "dequantize_float", "dequantize_codebook", "dequantize_nvfp4", "dequantize_mxfp4"}
    for name in weights:
        spec = named(name)
        assert spec is not None
        assert makes_weight(spec.op)
        assert call(spec)[2][0].shape[0] == N
    codes = {spec.name for spec in specs() if spec.activation_codes is not None}
    assert codes == {"quantize", "quantize_dynamic", "quantize_nvfp4", "quantize_tokens", "quantize_tensor"}
    assert {spec.name for spec in specs() if spec.makes_activation} == {
        "dequantize_activation",
        "dequantize_nvfp4",
        "dequantize_tensor",
    }


def test_products_that_round_inside() -> None:
    """Per call: the same op also takes activations as they are."""
    linear = named("linear_nbits")
    assert linear is not None
    assert [linear.rounds_activations({"activation_group": group}) for group in (-1, 0, 32)] == [
        False,
        True,
        True,
    ]
    dynamic = named("linear_dynamic")
    assert dynamic is not None
    assert dynamic.rounds_activations({})
    assert find(torch.ops.aten.linear.default) is None


def test_modules_of_other_packages_are_imported_with_the_dialect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their ops are then there when a saved program is read."""
    loaded = []

    class Point:
        name, group, value = "toy", library.ENTRY_POINTS, "toy.ops"

        def load(self) -> None:
            loaded.append("toy.ops")

    monkeypatch.setattr(metadata, "entry_points", lambda *, group: [Point()] if group == library.ENTRY_POINTS else [])
    library.load_entry_points()
    assert loaded == ["toy.ops"]
