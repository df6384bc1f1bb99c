"""static-kv-cache: the cached decoder computes what the full forward computes."""

from __future__ import annotations

import pytest
import torch
from stages import apply, captured, full_logits, largest, rewritten, sequences, tiny_decoder
from torch import Tensor

from optc.compiler.execution.stage_driver import run_stage
from optc.compiler.ir.contract import Input
from optc.compiler.ir.program import Program
from optc.passes.kv_cache.static import StaticKVCache

FAMILIES = ["llama", "gpt2", "gemma2", "gemma3", "mistral", "phi", "mixtral"]
LENGTHS = (29, 1, 41, 6)


def _ones(*totals: int) -> Tensor:
    """attention_mask [B, T] with these row sums."""
    return (torch.arange(max(totals)) < torch.tensor(totals)[:, None]).long()


def _garbage(program: Program, rows: int, length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = [spec.dims for spec in program.contract.inputs if spec.role in ("key_cache", "value_cache")]
    return [torch.randn((rows, dims[1], length, dims[3]), generator=generator) for dims in shapes]


@pytest.mark.parametrize(
    ("family", "in_place"),
    [("gemma2", False), ("mistral", False), *((family, True) for family in FAMILIES)],
)
def test_equals_full_forward(family: str, in_place: bool) -> None:
    """tests/export/test_onnx_decoders.py has growing caches of every family."""
    program, rows = captured(family), sequences(*LENGTHS)
    result = rewritten(StaticKVCache(in_place=in_place), family)
    assert (result.matched, result.candidates) == (2, 2)
    expected = [full_logits(program, row) for row in rows]
    assert largest(run_stage(result.program, rows).logits, expected) < 1e-5


@pytest.fixture(scope="module")
def grown() -> Program:
    return rewritten(StaticKVCache(), "mistral").program


@pytest.fixture(scope="module")
def written() -> Program:
    return rewritten(StaticKVCache(in_place=True), "mistral").program


def test_growing_caches_by_hand(grown: Program) -> None:
    """Ragged prefill from nothing, a chunk of 4, one token; presents are as long as the mask."""
    rows = sequences(12, 9)
    expected = [full_logits(captured("mistral"), row) for row in rows]
    ids = torch.tensor([rows[0][:7], [*rows[1][:4], 5, 5, 5]])
    logits, *caches = grown(ids, _ones(7, 4), *_garbage(grown, 2, 0))
    assert [tuple(cache.shape) for cache in caches] == [(2, 2, 7, 16)] * 4
    assert largest([logits[0], logits[1, :4]], [expected[0][:7], expected[1][:4]]) < 1e-5
    chunk = torch.tensor([rows[0][7:11], rows[1][4:8]])
    logits, *caches = grown(chunk, _ones(11, 8), *caches)
    assert [tuple(cache.shape) for cache in caches] == [(2, 2, 11, 16)] * 4
    assert largest([logits[0], logits[1]], [expected[0][7:11], expected[1][4:8]]) < 1e-5
    logits, *caches = grown(torch.tensor([rows[0][11:], rows[1][8:]]), _ones(12, 9), *caches)
    assert [tuple(cache.shape) for cache in caches] == [(2, 2, 12, 16)] * 4
    assert largest([logits[0], logits[1]], [expected[0][11:], expected[1][8:]]) < 1e-5


def test_shared_buffer_of_fixed_capacity(grown: Program) -> None:
    """Caches longer than the mask, full of garbage, keep their length (past-present share buffer)."""
    row = sequences(9)[0]
    expected = full_logits(captured("mistral"), row)
    caches = _garbage(grown, 1, 20)
    logits, *caches = grown(torch.tensor([row[:6]]), _ones(6), *caches)
    parts = [logits[0]]
    for end in range(7, 10):
        logits, *caches = grown(torch.tensor([row[end - 1 : end]]), _ones(end), *caches)
        parts.append(logits[0])
        assert {cache.shape[2] for cache in caches} == {20}
    assert largest([torch.cat(parts)], [expected]) < 1e-5


def test_one_row_of_one_token(grown: Program, written: Program) -> None:
    """Neither batch nor sequence nor past is specialized at 0 or 1."""
    row = sequences(2)[0]
    expected = full_logits(captured("mistral"), row)
    logits, *caches = grown(torch.tensor([row[:1]]), _ones(1), *_garbage(grown, 1, 0))
    assert [tuple(cache.shape) for cache in caches] == [(1, 2, 1, 16)] * 4
    assert largest([logits[0]], [expected[:1]]) < 1e-5
    logits, *_ = grown(torch.tensor([row[1:]]), _ones(2), *caches)
    assert largest([logits[0]], [expected[1:]]) < 1e-5
    caches = _garbage(written, 1, 2)
    for end in (1, 2):
        logits = written(torch.tensor([row[end - 1 : end]]), _ones(end), *caches)
        assert largest([logits[0]], [expected[end - 1 : end]]) < 1e-5


def test_in_place_writes_only_the_new_slots(written: Program) -> None:
    caches = _garbage(written, 1, 8)
    before = [cache.clone() for cache in caches]
    written(torch.tensor([[5, 6, 7]]), _ones(3), *caches)
    for cache, old in zip(caches, before, strict=True):
        changed = (cache != old).flatten(3).any(-1)[0, 0]
        assert changed.tolist() == [True] * 3 + [False] * 5


def test_contract_of_growing_caches(grown: Program) -> None:
    contract = grown.contract
    assert contract.inputs[:4] == (
        Input(name="input_ids", role="input_ids", dtype="int64", dims=("batch", "seq")),
        Input(name="attention_mask", role="attention_mask", dtype="int64", dims=("batch", "total")),
        Input(name="past_key_values.0.key", role="key_cache", dtype="float32", dims=("batch", 2, "past", 16)),
        Input(name="past_key_values.0.value", role="value_cache", dtype="float32", dims=("batch", 2, "past", 16)),
    )
    assert [output.name for output in contract.outputs] == [
        "logits",
        "present.0.key",
        "present.0.value",
        "present.1.key",
        "present.1.value",
    ]
    assert (contract.kv_cache.kind, contract.kv_cache.in_place) == ("linear", False)
    assert contract.layers == captured("mistral").contract.layers
    assert contract.sources == captured("mistral").contract.sources


def test_contract_of_caches_written_in_place(written: Program) -> None:
    assert [output.name for output in written.contract.outputs] == ["logits"]
    assert written.contract.inputs[2].dims == ("batch", 2, "capacity", 16)
    assert (written.contract.kv_cache.kind, written.contract.kv_cache.in_place) == ("linear", True)


@pytest.mark.parametrize("stage", ["grown", "written"])
def test_no_axis_is_specialized(stage: str, request: pytest.FixtureRequest) -> None:
    """Axes of one name are one symbol, of different names different ones, with the ranges promised."""
    program: Program = request.getfixturevalue(stage)
    symbols: dict[str, set[str]] = {}
    for spec, node in zip(program.contract.inputs, program.user_inputs(), strict=True):
        assert node.name == spec.name.replace(".", "_")
        for size, axis in zip(node.meta["val"].shape, spec.dims, strict=True):
            if isinstance(axis, int):
                assert size == axis
            else:
                assert isinstance(size, torch.SymInt), f"{spec.name}: {axis} became {size}"
                symbols.setdefault(axis, set()).add(str(size))
    assert all(len(names) == 1 for names in symbols.values()), symbols
    flat = {axis: names.pop() for axis, names in symbols.items()}
    assert len(set(flat.values())) == 4
    ranges = {str(symbol): bounds for symbol, bounds in program.exported.range_constraints.items()}
    lower = {axis: int(ranges[symbol].lower) for axis, symbol in flat.items()}
    cache = "past" if stage == "grown" else "capacity"
    assert lower == {"batch": 1, "seq": 1, "total": 1, cache: 0 if stage == "grown" else 1}
    assert int(ranges[flat["seq"]].upper) == int(ranges[flat["total"]].upper) == 256


def test_weights_and_source_lines_keep_their_names(grown: Program) -> None:
    before = captured("mistral")
    assert set(dict(grown.weights())) == set(dict(before.weights())) - {
        "model.rotary_emb.original_inv_freq"  # nothing read it
    }
    for name, tensor in grown.weights():
        assert tensor.data_ptr() == before.weight(name).data_ptr(), name
    linear = next(
        node
        for node in grown.calls(torch.ops.aten.linear.default)
        if grown.weight_of(node.args[1]) == "model.layers.1.mlp.down_proj.weight"
    )
    assert "modeling_mistral.py" in linear.meta["stack_trace"]
    assert "model.layers.1.mlp" in [path for path, _ in linear.meta["nn_module_stack"].values()]


# -- logits of some tokens ------------------------------------------------------------------------

SELECTING = StaticKVCache(select_logits=True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_rows_of_logits_are_counted_from_the_last_token(name: str) -> None:
    """Of each row its own; the first token where a row has no more."""
    program = rewritten(StaticKVCache(), name).program
    result = rewritten(SELECTING, name)
    assert (result.matched, result.candidates, result.notes) == (2, 2, ())
    assert result.program.contract.inputs[-1].dims == (1, "rows")
    for rows, width, held in (([7, 3, 5], 7, 0), ([4, 4], 4, 6), ([1, 1, 1], 1, 9)):
        ids = torch.tensor(sequences(*(width for _ in rows)))
        given = [ids, _ones(*(held + length for length in rows)), *_garbage(program, len(rows), held)]
        whole, *expected = program(*given)
        for back in ([1], [3, 1, 2]):
            selected, *caches = result.program(*given, torch.tensor([back]))
            assert selected.shape == (len(rows), len(back), 128)
            assert all(torch.equal(one, other) for one, other in zip(caches, expected, strict=True))
            for row, length in enumerate(rows):
                places = [max(length - item, 0) for item in back]
                assert float((selected[row] - whole[row, places]).abs().max()) <= 1e-5 * float(whole.abs().max())


def test_logits_are_selected_once_and_not_in_place() -> None:
    again = apply(SELECTING, rewritten(SELECTING, "llama").program)
    assert (again.matched, again.misses[0].reason) == (0, "it already has a linear KV cache")
    result = apply(StaticKVCache(in_place=True, select_logits=True), captured("llama"))
    assert result.notes == ("the logits are of all tokens: its caches are written in place",)
    assert result.program.contract.input_index("logits_from_end") is None


def test_sinks_are_kept() -> None:
    program, rows = tiny_decoder(sinks=True), sequences(13, 4)
    result = apply(StaticKVCache(), program)
    assert result.program.contract.layers[0].sinks
    expected = [full_logits(program, row) for row in rows]
    assert largest(run_stage(result.program, rows).logits, expected) < 1e-5


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"causal": False}, "the attention is not causal: old tokens see new ones"),
        ({"padding": True}, "the attention has a padding mask beside the causal one"),
        ({"mix": "conv"}, "the logits of a token depend on other tokens outside attention"),
    ],
)
def test_refuses_what_a_cache_would_change(options: dict[str, object], reason: str) -> None:
    result = apply(StaticKVCache(), tiny_decoder(**options))  # type: ignore[arg-type]
    assert (result.matched, result.candidates) == (0, 1)
    assert result.misses[0].reason.startswith(reason)


def test_refuses_encoders_and_programs_with_a_cache(grown: Program) -> None:
    result = apply(StaticKVCache(), captured("bert"))
    assert (result.matched, result.candidates) == (0, 2)
    assert result.misses[0].reason == "its kind is encoder: only a decoder continues a sequence"
    assert apply(StaticKVCache(), grown).misses[0].reason == "it already has a linear KV cache"
