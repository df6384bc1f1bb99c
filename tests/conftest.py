"""Fixtures: where the example model and, when present, the larger reference models are."""

from __future__ import annotations

import os
from pathlib import Path

# Two workers on two cores: one thread each, also in the processes that tests start.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))

import psutil  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "fiction-3m"
SHARED = ROOT.parent / "shared"

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(THREADS)
if THREADS == 1:  # engines ask for the number of cores; threads that wait for each other compute, too
    psutil.cpu_count = lambda logical=True: 1


def shared_path(*parts: str) -> Path:
    """A path among the shared reference models and texts; skips the test where they are absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs ../shared/{'/'.join(parts)}, which stands only where the project is developed")
    return path


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
