"""Linear kernels, and the norm and the lookups of the longest rows, compiled for a GPU that need not be there.

The instructions that they are for, and no spilled registers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton")
DRIVER = Path(__file__).resolve().parents[3] / "triton_compile_driver.py"


@pytest.mark.slow
def test_the_tables_tiles_fit_in_registers() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, DRIVER], env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name: (kernel["stack"], kernel["instructions"]) for name, kernel in found.items()} == {
        **dict.fromkeys(("gemv", "unrolled"), (0, ["ACQBULK", "IDP", "PREEXIT"])),
        "product": (0, ["ACQBULK", "IGMMA", "PREEXIT"]),
        **dict.fromkeys(("norm", "bytes", "nibbles"), (0, ["ACQBULK", "PREEXIT"])),
    }
    assert all(kernel["registers"] < 255 for kernel in found.values()), found
