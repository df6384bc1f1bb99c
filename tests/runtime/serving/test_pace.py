"""How many steps are launched at once."""

from __future__ import annotations

import pytest

from optc.runtime.serving.pace import Pace


@pytest.mark.parametrize(
    ("step_ms", "host_ms", "steps"),
    [
        (0.1, 0.3, 8),  # the most
        (0.5, 0.3, 3),  # of 1.2 ms
        (1.8, 0.9, 1),
        (1.8, 1.5, 2),  # the host would be late now and then
        (2.0, 2.0, 2),  # it is late: the step takes what the host does
        (10.0, 2.0, 1),
    ],
)
def test_launches_cover_what_the_host_does(step_ms: float, host_ms: float, steps: int) -> None:
    pace = Pace(1, 8)
    for odd in range(16):
        late = 5.0 if odd < 5 else 1.0  # now and then everything is slow
        pace.note(late * step_ms / 1e3, late * host_ms / 1e3)
        assert pace.steps == (steps if odd == 15 else 1)
    pace.fix(4)
    for _ in range(16):
        pace.note(step_ms / 1e3, host_ms / 1e3)
    assert pace.steps == 4
