"""The switch, by times that are given."""

from __future__ import annotations

from optc.runtime.speculative.switch import Switch


def drive(switch: Switch, steps: int, *, tokens: float, cost: float, rows: int = 1) -> list[bool]:
    """Steps whose drafts give so many tokens a row, at so many times the time of a plain one."""
    found = []
    for _ in range(steps):
        drafted = switch.wants(rows)
        given = int(rows * tokens) if drafted else rows
        switch.note(rows, tokens=given, seconds=0.01 * (cost if drafted else 1), drafted=drafted)
        found.append(drafted)
    return found


def test_drafts_that_pay_go_on() -> None:
    switch = Switch()
    steps = drive(switch, 400, tokens=3, cost=2)
    assert switch.on
    assert switch.speedup == 1.5
    assert sum(steps) > 370  # some plain ones, so that their time stays known


def test_drafts_that_do_not_pay_are_tried_again_seldom() -> None:
    switch = Switch()
    steps = drive(switch, 2000, tokens=2, cost=2.5)
    assert not switch.on
    assert 8 <= sum(steps[:100]) <= 24
    assert sum(steps[1000:]) <= 16


def test_drafts_that_come_to_pay_are_taken_up_again() -> None:
    switch = Switch()
    drive(switch, 100, tokens=1, cost=2)
    assert not switch.on
    assert sum(drive(switch, 400, tokens=4, cost=2)) > 200


def test_numbers_of_rows_are_decided_by_themselves() -> None:
    switch = Switch()
    drive(switch, 100, tokens=1, cost=2, rows=16)
    assert not switch.wants(16)
    assert sum(drive(switch, 100, tokens=3, cost=1.5, rows=2)) > 80
