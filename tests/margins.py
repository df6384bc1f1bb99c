"""Bounds that nearly broke: comparisons of numbers that held by less than a factor of ten, the closest first.

    find tests -name __pycache__ -prune -exec rm -r {} +
    PYTHONDONTWRITEBYTECODE=1 python -m pytest -p tests.margins -o enable_assertion_pass_hook=true tests/passes

Another processor adds in another order, so what is close here fails there. Read are asserts of the form `a < b` and
`a <= b` whose bound is at most 1; of one in a loop the closest is shown. Compiled tests that lie about were made without
the hook, which is why they go first.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

_FACTOR = 10.0
_NUMBER = r"(?:tensor\()?(\d[\d.]*(?:e[-+]?\d+)?)(?:, dtype=[\w.]+)?\)*"
_COMPARED = re.compile(rf"(?<![\w.\[]){_NUMBER} <=? {_NUMBER}")
_CLOSE: pytest.StashKey[dict[tuple[Path, int], tuple[float, str, str]]] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_CLOSE] = {}


def pytest_assertion_pass(item: pytest.Item, lineno: int, orig: str, expl: str) -> None:
    """An assert held: keep how close it was."""
    close, place = item.config.stash[_CLOSE], (item.path, lineno)
    for value, bound in ((float(found[1]), float(found[2])) for found in _COMPARED.finditer(expl)):
        if 0 < bound <= 1 and bound / _FACTOR < value <= bound and value / bound > close.get(place, (0.0,))[0]:
            close[place] = (value / bound, f"{value:.2g} of {bound:g}", orig)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print them; with several workers each would print its own, so that they are run in one."""
    close = config.stash[_CLOSE]
    terminalreporter.section(f"{len(close)} bounds held by less than a factor of {_FACTOR:g}")
    for (path, line), (_, numbers, text) in sorted(close.items(), key=lambda row: -row[1][0]):
        terminalreporter.write_line(f"{numbers:>20}  {path.relative_to(config.rootpath)}:{line}  {text}")
