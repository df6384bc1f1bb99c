"""Weights that stay in a file: they compute what tensors do, and are read no more than needed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import make_model
from hf_folders import source
from stages import sequences
from torch import Tensor
from torch.nn.functional import embedding, linear

from optc.compiler.capture import capture_model, pretrained
from optc.compiler.diagnostics import InputError, ResourceError
from optc.compiler.execution.stage_driver import run_stage
from optc.compiler.ir import lazy_operators, row_blocks, stored_weights
from optc.compiler.ir.lazy_operators import pieces
from optc.compiler.ir.lazy_weights import LazyWeight, materialized
from optc.compiler.ir.stored_weights import WorkFile
from optc.compiler.ir.surgery import add_weight, set_weight
from optc.compiler.ops.packed.onnxruntime import pack_nbits

aten = torch.ops.aten


def _random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of all reads from now on."""
    lengths: list[int] = []
    plain = stored_weights.OpenFile.read_into

    def read(self: stored_weights.OpenFile, buffer: memoryview, offset: int) -> None:
        lengths.append(len(buffer))
        plain(self, buffer, offset)

    monkeypatch.setattr(stored_weights.OpenFile, "read_into", read)
    return lengths


@pytest.fixture
def store(tmp_path: Path) -> Callable[[Tensor], Tensor]:
    return WorkFile(tmp_path).store


def test_moves_and_casts_read_nothing_and_operators_get_the_values(
    store: Callable[[Tensor], Tensor], reads: list[int]
) -> None:
    one, two = _random(512, 128), _random(256, 128)
    lazy_one, lazy_two = store(one), store(two)

    def moved(a: Tensor, b: Tensor) -> list[Tensor]:
        experts = torch.stack([a[:256], b]).float()
        return [
            a.float(),
            a.t(),
            a[7],
            a[3:9],
            a[-4:-1],
            torch.cat([a, b]).float(),
            torch.stack([a[:256], b])[1],
            experts[1],
            experts[0].t(),
            a.view(128, 512)[3],
            a.half().float(),
            a[:, 3:5],
            a.to(torch.bfloat16),
            torch.nn.Parameter(a, requires_grad=False),
            a.permute(1, 0),
            a.unsqueeze(0),
        ]

    lazy = moved(lazy_one, lazy_two)
    assert all(isinstance(item, LazyWeight) for item in lazy)
    assert reads == []
    for mine, plain in zip(lazy, moved(one, two), strict=True):
        read = materialized(mine)
        assert not isinstance(read, LazyWeight)
        assert (mine.shape, mine.stride(), mine.dtype) == (read.shape, read.stride(), read.dtype)
        assert (read.shape, read.dtype) == (plain.shape, plain.dtype)
        assert torch.equal(read, plain)
    x = _random(3, 5, 128, dtype=torch.float32)
    assert torch.equal(linear(x, lazy_one.float()), linear(x, one.float()))
    assert torch.equal(lazy_one + 1, one + 1)
    assert torch.equal(lazy_two.clone().add_(1), two + 1)


def test_a_second_cast_does_not_skip_the_rounding_of_the_first(store: Callable[[Tensor], Tensor]) -> None:
    weight = _random(300, 128, dtype=torch.float32)
    assert torch.equal(materialized(store(weight).bfloat16().float()), weight.bfloat16().float())
    assert not torch.equal(weight.bfloat16().float(), weight)


def test_parts_of_a_weight_are_read_alone(store: Callable[[Tensor], Tensor], reads: list[int]) -> None:
    weight = _random(1000, 64)
    lazy = store(weight)
    ids = torch.tensor([[5, 5, 999], [0, 5, 7]])
    assert torch.equal(embedding(ids, lazy.float()), embedding(ids, weight.float()))
    assert sum(reads) == 4 * 64 * 2, "each row that is looked up, once"
    with pytest.raises(IndexError):
        embedding(torch.tensor([1000]), lazy)
    reads.clear()
    found, expected = (torch.ops.optc.select_rows(table, ids, factor=0.3) for table in (lazy, weight))
    assert torch.equal(found, expected)
    assert sum(reads) == 4 * 64 * 2
    reads.clear()
    assert torch.equal(materialized(lazy[10:12]), weight[10:12])
    assert reads == [2 * 64 * 2]


def test_a_piece_of_a_flat_view_is_read_alone(store: Callable[[Tensor], Tensor], reads: list[int]) -> None:
    """Checking values looks at pieces; each used to read its whole tensor."""
    weight = _random(1000, 64)
    flat = store(weight).view(-1)
    assert torch.equal(materialized(flat[70:200]), weight.view(-1)[70:200])
    assert reads == [130 * 2]
    assert torch.equal(materialized(store(weight).view(250, -1, 64)), weight.view(250, 4, 64))


def test_a_product_with_a_large_weight_reads_it_in_blocks(
    store: Callable[[Tensor], Tensor], reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x = _random(1000, 64), _random(2, 3, 64, dtype=torch.float32)
    monkeypatch.setattr(lazy_operators, "_PRODUCT_BYTES", 300 * 64 * 4)
    found = linear(x, store(weight).float())
    assert reads == [300 * 128, 300 * 128, 300 * 128, 100 * 128]
    torch.testing.assert_close(found, linear(x, weight.float()), rtol=1e-5, atol=1e-5)


def test_rows_of_weights_behind_each_other_are_read_alone(store: Callable[[Tensor], Tensor], reads: list[int]) -> None:
    """As of merged projections."""
    one, two, three = _random(400, 128), _random(300, 128), _random(500, 128)
    whole, lazy = torch.cat([one, two, three]), torch.cat([store(one), store(two), store(three)])
    for first, last in ((10, 20), (390, 410), (400, 700), (399, 701), (0, 1200), (1199, 5000), (3, 3)):
        reads.clear()
        part = lazy[first:last]
        assert torch.equal(materialized(part), whole[first:last]), (first, last)
        assert sum(reads) == whole[first:last].nbytes, (first, last)
    assert torch.equal(torch.cat(list(pieces(lazy, 10_000))), whole)


@pytest.mark.parametrize("zero", [False, True])
def test_codes_are_dequantized_and_multiplied_in_blocks(
    zero: bool, store: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_blocks, "BLOCK", 100 * 256)
    generator = torch.Generator().manual_seed(0)
    codes, scale = torch.randint(0, 16, (1030, 256), dtype=torch.uint8, generator=generator), _random(1030, 2)
    points = torch.randint(0, 16, (1030, 2), dtype=torch.uint8, generator=generator) if zero else None
    knobs = {"bits": 4, "group_size": 128}
    expected = torch.ops.optc.dequantize(codes, scale.float(), points, **knobs)
    found = torch.ops.optc.dequantize(store(codes), scale.float(), points, **knobs)
    assert torch.equal(found, expected)
    x, bias = _random(2, 3, 256, dtype=torch.float32), _random(1030, dtype=torch.float32)
    packed = pack_nbits(codes.reshape(1030, 2, 128), 4)
    points = None if points is None else pack_nbits(points, 4)
    args = (scale.float(), points, bias)
    lazy = store(packed)
    assert isinstance(lazy, LazyWeight)
    for level in (0, 4):
        knobs = {"K": 256, "N": 1030, "bits": 4, "block_size": 128, "accuracy_level": level}
        found = torch.ops.optc.matmul_nbits(x, lazy, *args, **knobs)
        torch.testing.assert_close(found, torch.ops.optc.matmul_nbits(x, packed, *args, **knobs), rtol=1e-5, atol=1e-4)
        near = float((found - linear(x, expected, bias)).norm() / found.norm())
        assert near < 1e-6 if level == 0 else 1e-3 < near < 2e-2, "inputs are rounded at level 4, once"


def test_codes_below_16_take_half_a_byte(tmp_path: Path) -> None:
    work, size = WorkFile(tmp_path), 512 * 256
    codes = torch.arange(size, dtype=torch.uint8).reshape(512, 256)
    for number, (tensor, nbytes) in enumerate([(codes % 16, size // 2), (codes % 17, size), (codes, size)]):
        before = work._end
        lazy = work.store(tensor)
        assert work._end - before == nbytes, number
        assert torch.equal(materialized(lazy), tensor)
        assert torch.equal(materialized(lazy[3:5]), tensor[3:5])
        assert torch.equal(torch.cat(list(pieces(lazy, 1000))), tensor)
    odd = torch.ones(65537, 1, dtype=torch.uint8)
    assert torch.equal(materialized(work.store(odd)), odd)
    assert list(tmp_path.iterdir()) == [], "the file has no name, and is gone with the process"


def test_small_tensors_stay_in_memory(store: Callable[[Tensor], Tensor]) -> None:
    assert not isinstance(store(torch.ones(1000)), LazyWeight)
    lazy = store(torch.ones(100_000))
    assert store(lazy) is lazy


def test_a_lazy_weight_cannot_be_written(store: Callable[[Tensor], Tensor]) -> None:
    lazy = store(torch.ones(100_000))
    with pytest.raises(AssertionError, match="would write a weight that lies in a file"):
        lazy.mul_(2)
    assert torch.equal(torch.zeros(100_000).copy_(lazy), torch.ones(100_000))


def test_a_file_that_shrinks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(8000))
    lazy = stored_weights.in_file(path, 0, (1000,), torch.float64, {})
    os.truncate(path, 4000)
    with pytest.raises(InputError, match="the weights became shorter while they were read"):
        lazy + 1


def test_a_full_disk(store: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ResourceError, match="the disk is full while writing weights to a work file"):
        store(torch.ones(100_000))


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "gpt2"])
def test_a_folder_is_captured_without_reading_its_weights(
    name: str, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read to look for NaN, and again when the program runs; what it computes is what the model in memory does."""
    monkeypatch.setattr(pretrained, "RESIDENT_BYTES", 0)
    monkeypatch.setattr(pretrained, "position_offset", lambda _: 0)  # it runs the model's first layer
    program, info = pretrained.capture_pretrained(source(name), prove=False)
    assert sum(reads) == sum(tensor.nbytes for tensor in info.tensors.values()), "once, by the check"
    assert program.work_file is not None
    texts = sequences(9, 4)
    expected = run_stage(capture_model(make_model(name)), texts)
    found = run_stage(program, texts)
    for mine, plain in zip(found.logits, expected.logits, strict=True):
        assert torch.equal(mine, plain)
    held = program.in_memory()
    assert not any(isinstance(tensor, LazyWeight) for _, tensor in held.weights())
    assert held.fingerprint() == program.fingerprint()


def test_new_weights_of_a_program_go_to_its_work_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "RESIDENT_BYTES", 0)
    monkeypatch.setattr(stored_weights, "_SPILLED_BYTES", 0)
    program = pretrained.capture_pretrained(source("llama"))[0].clone()
    value = torch.arange(600.0).reshape(2, 300)
    node = add_weight(program, "new", value)
    assert isinstance(program.weight("new"), LazyWeight)
    assert torch.equal(materialized(program.weight("new")), value)
    assert (node.meta["val"].shape, node.meta["val"].dtype) == (value.shape, value.dtype)
    name = "model.norm.weight"
    set_weight(program, name, torch.full((64,), 2.0))
    assert isinstance(program.weight(name), torch.nn.Parameter)
    assert torch.equal(materialized(program.weight(name)), torch.full((64,), 2.0))
