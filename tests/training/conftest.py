"""One thread for the small models of these tests: two would wait for each other longer than they compute.

Unless OMP_NUM_THREADS says how many.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import GIVEN_THREADS, THREADS


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Restores the number of threads behind each file."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS if GIVEN_THREADS else 1)
    yield
    torch.set_num_threads(before)
