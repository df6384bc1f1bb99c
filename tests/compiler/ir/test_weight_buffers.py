"""Memory of weights is used again, and never while a tensor still has it."""

from __future__ import annotations

import torch

from optc.compiler.ir.weight_buffers import BufferPool

_MIB = 1 << 20


def test_memory_goes_to_the_next_tensor_when_the_last_view_is_gone() -> None:
    pool = BufferPool()
    first = pool.empty((1024, 512), torch.float32)
    assert first.is_contiguous()
    place, view = first.data_ptr(), first.t()[3:5]
    del first
    second = pool.empty((1024, 512), torch.float32)
    assert second.data_ptr() != place, "a view still holds it"
    view.fill_(7.0)
    second.zero_()
    assert float(view.min()) == 7.0
    del view
    third = pool.empty((900, 1024), torch.bfloat16)
    assert third.data_ptr() == place
    assert third.shape == (900, 1024)
    assert third.dtype is torch.bfloat16


def test_a_block_is_not_wasted_on_a_tensor_of_less_than_half_its_size() -> None:
    pool = BufferPool()
    large = pool.empty((4 * _MIB,), torch.uint8)
    place = large.data_ptr()
    del large
    assert pool.empty((2 * _MIB - 1,), torch.uint8).data_ptr() != place
    assert pool.empty((2 * _MIB,), torch.uint8).data_ptr() == place


def test_free_blocks_are_bounded() -> None:
    pool = BufferPool(kept_bytes=5 * _MIB)
    held = [pool.empty((2 * _MIB,), torch.uint8) for _ in range(4)]
    del held
    assert [len(block) for block in pool._free] == [2 * _MIB, 2 * _MIB]
    small = pool.empty((10,), torch.uint8)
    del small
    assert len(pool._free) == 2, "small tensors come from the heap"
