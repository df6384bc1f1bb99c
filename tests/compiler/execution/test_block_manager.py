"""The block manager: slots, prefix reuse, eviction, rewinding and what is wasted."""

from __future__ import annotations

import random

import pytest

from optc.compiler.diagnostics import ResourceError
from optc.compiler.execution.block_manager import BlockManager


def _fill(manager: BlockManager, request: object, tokens: list[int]) -> int:
    """Start a request, lay out what was not found, commit; returns what was found."""
    found = manager.start(request, tokens)
    manager.step([(request, tokens[found:])])
    manager.commit(request)
    return found


def test_step_lays_out_a_ragged_batch() -> None:
    manager = BlockManager(6, 4, order=[5, 2, 0, 1, 3, 4])
    manager.start("a")
    manager.start("b")
    manager.step([("a", [10, 11, 12])])
    inputs = manager.step([("b", [20, 21, 22, 23, 24]), ("a", [13, 14])])
    assert inputs.input_ids.tolist() == [20, 21, 22, 23, 24, 13, 14]
    assert inputs.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 4]
    assert inputs.slot_mapping.tolist() == [8, 9, 10, 11, 0, 23, 4]
    assert inputs.block_tables.tolist() == [[2, 0], [5, 1]]
    assert inputs.context_lens.tolist() == [5, 5]
    assert inputs.cu_seqlens.tolist() == [0, 5, 7]
    assert [str(tensor.dtype) for tensor in inputs] == ["torch.int64"] * 3 + ["torch.int32"] * 3
    assert manager.slots("a") == [20, 21, 22, 23, 4]
    assert manager.slots("a", 3) == [23, 4]


def test_shorter_block_tables_are_padded() -> None:
    manager = BlockManager(4, 2)
    manager.start("a")
    manager.start("b")
    assert manager.step([("a", [1]), ("b", [1, 2, 3])]).block_tables.tolist() == [[0, 0], [1, 2]]


def test_out_of_blocks_reserves_nothing() -> None:
    manager = BlockManager(3, 4)
    manager.start("a")
    manager.start("b")
    manager.step([("a", [1, 2, 3])])
    with pytest.raises(ResourceError) as caught:
        manager.step([("a", [4, 5]), ("b", [1, 2, 3, 4, 5])])
    assert str(caught.value) == (
        "the KV pool is out of blocks\n"
        "  cause: 3 blocks needed, 2 of 3 free\n"
        "  remedy: use a larger pool, fewer sequences at a time or shorter prompts"
    )
    assert caught.value.exit_code == 8
    assert (manager.length("a"), manager.length("b"), manager.free_blocks) == (3, 0, 2)
    manager.step([("a", [4, 5]), ("b", [1])])
    assert manager.free_blocks == 0


def test_only_full_committed_blocks_are_found() -> None:
    manager = BlockManager(8, 2)
    manager.start("a", [1, 2, 3, 4, 5])
    manager.step([("a", [1, 2, 3, 4, 5])])
    assert manager.start("early", [1, 2, 3, 4, 5]) == 0
    manager.commit("a")
    assert manager.start("b", [1, 2, 3, 4, 5]) == 4
    assert manager.start("c", [1, 2, 3, 4]) == 2  # one token is left, for its logits
    assert manager.start("d", [1, 2, 9, 4, 5]) == 2
    assert manager.start("e", [9, 9, 3, 4, 5]) == 0  # the same block after another one is another block
    assert manager.slots("b") == manager.slots("a")[:4]
    assert manager.used_blocks == 3


def test_a_block_of_which_a_part_is_shared_is_copied() -> None:
    manager = BlockManager(4, 16)
    _fill(manager, "a", list(range(20)))
    tokens = [*range(10), *range(50, 60)]
    assert manager.start("b", tokens) == 0
    assert manager.fork("b", tokens) == (0, 2, 10)
    assert manager.slots("b") == [*range(32, 42)]
    assert manager.step([("b", tokens[10:])]).slot_mapping.tolist() == [*range(42, 48), *range(48, 52)]
    manager.commit("b")
    assert manager.waste() == 12 + 12
    for name, own in (("few", [0, 1, 2, 9, 9, 9]), ("another beginning", [7, *range(1, 16)])):
        manager.start(name, own)
        assert manager.fork(name, own) is None
    manager.start("full", tokens)
    manager.free("b")
    assert manager.fork("full", tokens) is None, "no block is free for a copy: a has two, full one, and b's last"


def test_a_copy_is_of_the_block_that_shares_most_and_leaves_a_token() -> None:
    manager = BlockManager(6, 4)
    for name, tokens in (("a", [1, 2, 3, 4]), ("b", [1, 2, 8, 9]), ("c", [1, 2, 3, 9])):
        _fill(manager, name, tokens)
        manager.free(name)
    for name, tokens, expected in (("d", [1, 2, 3, 4], 3), ("e", [1, 2, 8, 7], 3), ("f", [1, 2], 1)):
        assert manager.start(name, tokens) == 0
        found = manager.fork(name, tokens)
        assert found is not None
        assert found.tokens == expected
        assert found.source in {"d": (0, 2), "e": (1,), "f": (0, 1, 2)}[name]
        manager.free(name)
    assert manager.free_blocks == 6


def test_freed_prefixes_are_evicted_oldest_first_and_tail_first() -> None:
    manager = BlockManager(4, 2)
    _fill(manager, "a", [1, 2, 3, 4])
    _fill(manager, "b", [5, 6, 7, 8])
    manager.free("a")
    manager.free("b")
    assert (manager.used_blocks, manager.free_blocks) == (0, 4)
    manager.start("c")
    manager.step([("c", [0])])  # takes the tail of a, which was freed first
    assert manager.start("a again", [1, 2, 3, 4, 0]) == 2
    assert manager.start("b again", [5, 6, 7, 8, 0]) == 4


def test_use_renews_a_cached_prefix() -> None:
    manager = BlockManager(2, 2)
    for name, tokens in (("a", [1, 2]), ("b", [3, 4])):
        _fill(manager, name, tokens)
        manager.free(name)
    assert manager.start("a again", [1, 2, 0]) == 2
    manager.free("a again")
    manager.start("c")
    manager.step([("c", [9])])  # b is now the oldest
    assert manager.start("b again", [3, 4, 0]) == 0
    assert manager.start("a once more", [1, 2, 0]) == 2


def test_rewind_frees_blocks_and_forgets_what_will_be_overwritten() -> None:
    manager = BlockManager(8, 4)
    _fill(manager, "a", list(range(11)))
    assert manager.rewind("a", 6) == 6
    assert (manager.length("a"), manager.used_blocks) == (6, 2)
    assert manager.start("b", list(range(11))) == 4  # the second block will be written again
    manager.step([("a", [70, 71])])
    manager.commit("a")
    assert manager.start("c", [0, 1, 2, 3, 4, 5, 70, 71, 9]) == 8
    assert manager.rewind("a", 0) == 0
    assert manager.length("a") == 0


def test_rewind_into_a_shared_block_keeps_less() -> None:
    manager = BlockManager(8, 4)
    _fill(manager, "a", list(range(9)))
    assert _fill(manager, "b", list(range(9))) == 8
    assert manager.rewind("b", 7) == 4  # tokens 4 to 6 must be fed again, elsewhere
    manager.step([("b", [4, 5, 6, 99])])
    assert set(manager.slots("b")[4:]).isdisjoint(manager.slots("a"))
    assert manager.slots("b")[:4] == manager.slots("a")[:4]
    assert manager.rewind("b", 4) == 4


def test_waste_counts_the_tails_of_last_blocks() -> None:
    manager = BlockManager(8, 4)
    _fill(manager, "a", [1, 2, 3, 4, 5])
    assert manager.waste() == 3
    _fill(manager, "b", [1, 2, 3, 4, 6])
    assert (manager.waste(), manager.used_blocks) == (6, 3)
    manager.step([("a", [6, 7, 8])])
    assert (manager.waste(), manager.peak_waste) == (3, 6)
    manager.free("a")
    manager.free("b")
    assert (manager.waste(), manager.peak_waste, manager.peak_used_blocks) == (0, 6, 3)


def test_room_is_reserved_and_tokens_are_laid_out_in_it() -> None:
    manager = BlockManager(5, 4)
    for name in "ab":
        manager.start(name)
        manager.step([(name, [1, 2, 3])])
    assert manager.reserve([("a", 6), ("b", 1)]) == ["a"], "b has room in its block"
    assert [len(manager.blocks(name)) for name in "ab"] == [3, 1]
    assert (manager.waste(), manager.peak_waste, manager.free_blocks) == (10, 10, 1)
    manager.append("a", [4, 5, 6])
    manager.append("a", [7])
    assert (manager.length("a"), manager.waste(), manager.free_blocks) == (7, 6, 1)
    with pytest.raises(AssertionError, match=r"^no room was reserved$"):
        manager.append("b", [4, 5])
    with pytest.raises(ResourceError, match="out of blocks"):
        manager.reserve([("a", 10), ("b", 2)])
    assert [len(manager.blocks(name)) for name in "ab"] == [3, 1]
    assert manager.rewind("a", 5) == 5
    assert (manager.waste(), manager.used_blocks) == (4, 3)
    manager.commit("a")
    manager.free("a", forget=True)
    assert manager.start("c", [1, 2, 3, 4, 5]) == 0, "what is forgotten is not found"
    assert (manager.waste(), manager.free_blocks) == (1, 4)


def test_order_must_name_every_block() -> None:
    with pytest.raises(AssertionError, match=r"^order must name every block once"):
        BlockManager(3, 4, order=[0, 1, 1])


def test_a_pool_has_blocks_and_blocks_have_slots() -> None:
    for blocks, size in ((0, 1), (1, 0)):
        with pytest.raises(AssertionError):
            BlockManager(blocks, size)
    least = BlockManager(1, 1)
    assert (least.peak_waste, least.peak_used_blocks) == (0, 0)
    assert _fill(least, "a", [7]) == 0
    assert least.slots("a") == [0]


def test_a_request_has_one_part_in_a_step() -> None:
    manager = BlockManager(2, 4)
    manager.start("a")
    with pytest.raises(AssertionError, match=r"^a request appears once in a step"):
        manager.step([("a", [1]), ("a", [2])])


@pytest.mark.parametrize("seed", range(6))
def test_no_request_ever_reads_what_another_wrote(seed: int) -> None:
    """Random lives of requests over a small pool: each slot always holds its own prefix."""
    chance, size = random.Random(seed), 3
    manager = BlockManager(12, size)
    pool: dict[int, tuple[int, ...]] = {}  # slot -> every token up to the one it holds
    alive: dict[int, list[int]] = {}
    reused = refused = 0

    def feed(name: int, tokens: list[int]) -> None:
        nonlocal refused
        try:
            inputs = manager.step([(name, tokens)])
        except ResourceError:
            refused += 1
            return
        alive[name] += tokens
        for slot, position in zip(inputs.slot_mapping.tolist(), inputs.position_ids.tolist(), strict=True):
            pool[slot] = tuple(alive[name][: position + 1])
        manager.commit(name)

    for name in range(400):
        prompt = [chance.randrange(2) for _ in range(chance.randrange(1, 14))]
        found = manager.start(name, prompt)
        reused += found
        alive[name] = prompt[:found]
        feed(name, prompt[found:])
        for other in chance.sample(sorted(alive), min(2, len(alive))):
            action = chance.randrange(3)
            if action == 0:
                feed(other, [chance.randrange(2) for _ in range(chance.randrange(1, 4))])
            elif action == 1:
                kept = manager.rewind(other, chance.randrange(len(alive[other]) + 1))
                del alive[other][kept:]
            elif len(alive) > 2:
                manager.free(other)
                del alive[other]
        for other, tokens in alive.items():
            expected = [tuple(tokens[: i + 1]) for i in range(len(tokens))]
            assert [pool[slot] for slot in manager.slots(other)] == expected
        owned = {slot // size for other in alive for slot in manager.slots(other)}
        assert manager.used_blocks == len(owned)
        assert manager.free_blocks == 12 - len(owned)
    assert reused > 100
    assert refused > 10
