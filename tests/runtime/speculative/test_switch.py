"""The switch, by times that are given."""

from __future__ import annotations

from optc.runtime.speculative.switch import Outcome, Switch

MOST = 4


def drive(switch: Switch, steps: int, *, accepted: int, each: float, any_: float = 0.0, rows: int = 1) -> list[int]:
    """Depths of steps of which the first `accepted` drafted tokens are right; each drafted token costs so many plain
    steps, and any draft `any_`."""
    found = []
    for _ in range(steps):
        depth = switch.depth(rows)
        switch.note(
            [Outcome(depth, min(depth, accepted))] * rows, 0.01 * (1 + each * depth + any_ * (depth > 0)), rung=depth
        )
        found.append(depth)
    return found


def test_drafts_that_pay_go_on() -> None:
    switch = Switch(MOST)
    depths = drive(switch, 400, accepted=4, each=0.25)
    assert (switch.best, switch.speedup) == (4, 2.5)
    assert 5 < depths.count(0) < 30  # some plain ones, so that their time stays known


def test_drafts_that_do_not_pay_are_tried_again_seldom() -> None:
    switch = Switch(MOST)
    depths = drive(switch, 2000, accepted=0, each=0.25)
    assert switch.best == 0
    assert 8 <= sum(depth > 0 for depth in depths[:100]) <= 24
    assert sum(depth > 0 for depth in depths[1000:]) <= 16


def test_drafts_that_come_to_pay_are_taken_up_again() -> None:
    switch = Switch(MOST)
    drive(switch, 100, accepted=0, each=0.5)
    assert switch.best == 0
    assert sum(depth > 0 for depth in drive(switch, 400, accepted=4, each=0.1)) > 200


def test_the_depth_is_the_one_that_pays_most() -> None:
    """Two tokens are right: 3 for 1.4 steps, where four drafted ones take 1.8; and all are drafted where it costs nothing."""
    switch = Switch(MOST)
    depths = drive(switch, 300, accepted=2, each=0.2)
    assert switch.best == 2
    assert depths[100:].count(2) > 150
    assert depths[100:].count(4) >= 20  # now and then, so that it would be seen if more were right
    assert 3 not in depths
    drive(switch, 300, accepted=4, each=0.2)
    assert switch.best == 4


def test_a_short_draft_that_pays_is_found_where_the_longest_does_not() -> None:
    """One token is right: 2 for 1.5 steps, where four drafted ones take 3."""
    switch = Switch(MOST)
    depths = drive(switch, 200, accepted=1, each=0.5)
    assert switch.best == 1
    assert depths[50:].count(1) > 100
    assert switch.speedup is not None
    assert switch.speedup > 1.2


def test_a_short_draft_is_left_where_its_own_time_says_so() -> None:
    """By the time of four tokens (2.6 steps) one takes 1.4 and pays; its own time is 2.3 steps for 2 tokens."""
    switch = Switch(MOST)
    depths = drive(switch, 2000, accepted=1, each=0.1, any_=1.2)
    assert switch.best == 0
    assert depths[:100].count(1) >= 4
    assert sum(depth > 0 for depth in depths[:100]) <= 32
    assert sum(depth > 0 for depth in depths[1000:]) <= 32


def test_drafts_that_are_seldom_made_are_no_promise() -> None:
    """A drafter that has two wrong tokens as a rule, and four right ones once in forty steps: 1.1 tokens for 1.42 steps."""
    switch = Switch(MOST)
    for step in range(800):
        rung = switch.depth(1)
        whole = step % 40 == 0
        drafted = min(rung, 4 if whole else 2)
        switch.note([Outcome(drafted, drafted if whole else 0)], 0.01 * (1 + 0.2 * drafted), rung=rung)
    assert switch.best == 0


def test_numbers_of_rows_are_decided_by_themselves() -> None:
    switch = Switch(MOST)
    drive(switch, 100, accepted=0, each=1, rows=16)
    assert switch.depth(16) == 0
    assert sum(depth > 0 for depth in drive(switch, 100, accepted=3, each=0.1, rows=2)) > 80
