"""Threads and order of a run, where the example model and the larger reference models are, why tests skip."""

from __future__ import annotations

import atexit
import compileall
import gc
import logging
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# OMP_NUM_THREADS given from outside holds, in the processes that tests start too. Without it, two workers on two
# cores take one thread each. A worker inherits what the process that started it has set: the second name tells it
# what came from outside.
GIVEN_THREADS = os.environ.setdefault("OPTC_TESTS_THREADS", os.environ.get("OMP_NUM_THREADS", ""))
THREADS = int(GIVEN_THREADS.split(",")[0] or (1 if "PYTEST_XDIST_WORKER" in os.environ else 2))
os.environ["OMP_NUM_THREADS"] = str(THREADS)

# Tracing makes so many objects that Python's collector takes a sixth of the time to find next to nothing.
gc.set_threshold(100_000, 10, 10)

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import psutil  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "fiction-3m"
SHARED = ROOT.parent / "shared"

os.environ["HF_HUB_OFFLINE"] = "1"
# Marks of this machine and trusted keys are those of the tests; workers inherit the place.
if "OPTC_TESTS_HOME" not in os.environ:
    os.environ["OPTC_TESTS_HOME"] = tempfile.mkdtemp(prefix="optc-tests-")
    atexit.register(shutil.rmtree, os.environ["OPTC_TESTS_HOME"], ignore_errors=True)
for variable in ("XDG_STATE_HOME", "XDG_CONFIG_HOME"):
    os.environ[variable] = os.environ["OPTC_TESTS_HOME"]
if not torch.cuda.is_available():  # triton reads it when it is imported, and torch imports it when it likes
    os.environ["TRITON_INTERPRET"] = "1"
# What calls kernels in a package is compiled without optimization, and without line numbers: numbers come from kernels.
os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")
os.environ.setdefault("AOT_INDUCTOR_ENABLE_LINE_TABLES", "0")
# Where a library has switched loggers off, torch goes on to write traces for a handler that drops them.
logging.getLogger("torch.__trace").handlers.clear()
torch.set_num_threads(THREADS)
# Engines ask for the number of cores; threads that wait for each other compute, too.
psutil.cpu_count = lambda logical=True: THREADS
# The same examples in every run; `--hypothesis-profile default` looks for others.
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")


def shared_path(*parts: str) -> Path:
    """A path among the shared reference models and texts; skips the test where they are absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs ../shared/{'/'.join(parts)}, which stands only where the project is developed")
    return path


def pytest_configure(config: pytest.Config) -> None:
    """Workers take files in the order of `pytest_collection_modifyitems`, not by their numbers of tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False
    if sys.dont_write_bytecode and not hasattr(config, "workerinput"):
        _compile_sources()


def _compile_sources() -> None:
    """Where Python keeps no compiled modules, every process that tests start would compile all of optc for a second."""
    package = ROOT / "src" / "optc"
    for folder in (package, *(path.resolve() for path in sorted(package.iterdir()) if path.is_symlink())):
        compileall.compile_dir(folder, quiet=1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In a worker, files with slow tests come first, so that no worker waits for one of them at the end."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """What all tests import lives as long as the process: the collector need not go through it again."""
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Numbers that a test or its fixtures draw are the same alone and after any other."""
    _seed()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """Again: the first test of a file has its fixtures set up in between."""
    _seed()


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)  # that of the CPU: `torch.manual_seed` takes a millisecond


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print why tests were skipped: how many for each reason, the most frequent first."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reasons[report.longrepr[2].removeprefix("Skipped: ")] += 1  # (file, line, reason)
    if reasons:
        terminalreporter.section(f"{reasons.total()} skipped")
        for reason, number in sorted(reasons.items(), key=lambda item: (-item[1], item[0])):
            terminalreporter.write_line(f"{number:5}  {reason}")


@pytest.fixture(scope="session", autouse=True)
def place_of_shared_things(tmp_path_factory: pytest.TempPathFactory) -> None:
    """See `once`: all workers of a run share the parent of their folders."""
    from once import set_place

    own = tmp_path_factory.getbasetemp()
    set_place(own.parent if "PYTEST_XDIST_WORKER" in os.environ else own)


@pytest.fixture(scope="session")
def example_model() -> Path:
    """The model folder that ships with the repository."""
    return EXAMPLE


@pytest.fixture(scope="session")
def shared_model():  # type: ignore[no-untyped-def]
    """Call with a model name; skips where the reference models are absent."""
    return lambda name: shared_path("models", name)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing that Dynamo compiled before, or leaves behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
