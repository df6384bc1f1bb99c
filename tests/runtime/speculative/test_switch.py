"""The switch, by times that are given."""

from __future__ import annotations

from optc.runtime.speculative.switch import Outcome, Switch

MOST = 4


def drive(switch: Switch, steps: int, *, accepted: int, each: float, rows: int = 1) -> list[int]:
    """Depths of steps of which the first `accepted` drafted tokens are right; each drafted token costs so many plain
    steps."""
    found = []
    for _ in range(steps):
        depth = switch.depth(rows)
        switch.note([Outcome(depth, min(depth, accepted))] * rows, 0.01 * (1 + each * depth))
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


def test_numbers_of_rows_are_decided_by_themselves() -> None:
    switch = Switch(MOST)
    drive(switch, 100, accepted=0, each=1, rows=16)
    assert switch.depth(16) == 0
    assert sum(depth > 0 for depth in drive(switch, 100, accepted=3, each=0.1, rows=2)) > 80
