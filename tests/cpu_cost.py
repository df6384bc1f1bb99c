"""What the tests cost: CPU seconds of each file, its own and those of the processes that it started and waited for.

    python -m pytest -p tests.cpu_cost                                       # all; add --numprocesses 2 --dist loadfile
    python -m pytest -p tests.cpu_cost --costs-to costs.tsv tests/cli        # a row per test and phase, too

Unlike the time on the clock they do not grow with waiting; but where two threads share a core, work beside the tests
doubles them: compare figures of a quiet machine. What several files share (`once`) stands at the file that made it.
"""

from __future__ import annotations

import resource
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_NAME = "cpu_cost"
_SHOWN = 40
_STARTED: pytest.StashKey[dict[str, float]] = pytest.StashKey()


def _spent() -> float:
    """CPU seconds of this process and of its children that ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--costs-to", type=Path, metavar="FILE", help="write the CPU seconds of each test and phase")


def _measured(item: pytest.Item, phase: str) -> Iterator[None]:
    before = _spent()
    try:
        return (yield)
    finally:
        item.stash.setdefault(_STARTED, {})[phase] = _spent() - before


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    return (yield from _measured(item, "setup"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    return (yield from _measured(item, "call"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    return (yield from _measured(item, "teardown"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    """The report carries the cost from a worker to the process that prints."""
    report = yield
    report.user_properties = [*report.user_properties, (_NAME, item.stash.get(_STARTED, {}).get(call.when, 0.0))]
    return report


class _Costs:
    """What arrives where reports are printed."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        spent = next((value for name, value in report.user_properties if name == _NAME), 0.0)
        self.rows.append((float(str(spent)), report.nodeid, str(report.when)))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
        if path := config.getoption("--costs-to"):
            path.write_text("".join(f"{spent:.3f}\t{phase}\t{test}\n" for spent, test, phase in self.rows))
        files: defaultdict[str, float] = defaultdict(float)
        for spent, test, _ in self.rows:
            files[test.partition("::")[0]] += spent
        terminalreporter.section(f"{sum(files.values()):.0f} CPU seconds")
        for file, spent in sorted(files.items(), key=lambda row: -row[1])[:_SHOWN]:
            terminalreporter.write_line(f"{spent:8.1f}  {file}")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Costs())
