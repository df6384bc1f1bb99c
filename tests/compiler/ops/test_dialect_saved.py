"""Every op of the dialect in a saved program, read and run by a process that did not write it."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dialect_calls import CALLS, tensors_of
from once import once
from safetensors.torch import save_file
from torch import Tensor, nn

from optc.compiler.capture import capture_module
from optc.compiler.ops import library


class Call(nn.Module):
    """One call of an op, up to thirteen tensors of which come from outside."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.op = getattr(torch.ops.optc, name).default
        self.args, self.keywords = CALLS[name]

    def forward(
        self,
        a: Tensor,
        b: Any = None,
        c: Any = None,
        d: Any = None,
        e: Any = None,
        f: Any = None,
        g: Any = None,
        h: Any = None,
        i: Any = None,
        j: Any = None,
        k: Any = None,
        l: Any = None,  # noqa: E741
        m: Any = None,
    ) -> Any:
        rest = iter((a, b, c, d, e, f, g, h, i, j, k, l, m))
        args = [next(rest) if isinstance(item, Tensor) else item for item in self.args]
        return self.op(*args, **self.keywords)


READ = """
import json, sys
from pathlib import Path
from safetensors.torch import load_file
from optc.compiler.ir.program import Program
import torch
found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    saved = load_file(folder / "call.safetensors")
    inputs = [saved[f"in{i}"] for i in range(sum(name.startswith("in") for name in saved))]
    program = Program.load(folder)
    out = program(*inputs)
    out = list(out) if isinstance(out, (tuple, list)) else [out]
    out = [item for item in out if item is not None] + inputs  # which an op may write
    # Sums over memory that is aligned otherwise may be rounded otherwise, and the writer may have had a C++ library.
    pairs = [(saved[f"out{i}"].float(), item.float()) for i, item in enumerate(out)]
    found[folder.name] = all(torch.allclose(*pair, rtol=1e-4, atol=1e-4) for pair in pairs)
print(json.dumps(found))
"""


def _save(folder: Path) -> None:
    """Every op's program with a call's inputs and results, then what a new process makes of them."""
    for name in CALLS:
        program = capture_module(Call(name), tensors_of(name))
        program.save(folder / "programs" / name)
        inputs = tensors_of(name)
        table = {f"in{i}": item.clone() for i, item in enumerate(inputs)}
        out = program(*inputs)
        out = list(out) if isinstance(out, tuple | list) else [out]
        out = [item for item in out if item is not None] + inputs  # which an op may write
        table |= {f"out{i}": item.clone().contiguous() for i, item in enumerate(out)}
        save_file(table, folder / "programs" / name / "call.safetensors")
    command = [sys.executable, "-c", READ, str(folder / "programs")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (folder / "found.json").write_text(done.stdout.strip() or json.dumps({"error": done.stderr[-2000:]}))


@functools.cache
def read_elsewhere() -> dict[str, bool]:
    found: dict[str, bool] = json.loads((once("saved-ops", _save) / "found.json").read_text())
    return found


@pytest.mark.parametrize("name", CALLS)
def test_saved_program_runs_in_a_fresh_process(name: str) -> None:
    found = read_elsewhere()
    assert found.get(name) is True, found


def test_every_op_has_a_call() -> None:
    assert set(CALLS) == {spec.name for spec in library.specs()}


def test_library_of_another_version_is_refused() -> None:
    """A schema that a library registered first must be the dialect's: calls would be misread."""
    script = (
        "import torch\n"
        "library = torch.library.Library('optc', 'FRAGMENT')\n"
        "library.define('rotary(Tensor x, Tensor position) -> Tensor')\n"
        "from optc.compiler.diagnostics import TargetError\n"
        "try:\n"
        "    import optc.compiler.ops\n"
        "except TargetError as error:\n"
        "    print(error.what, '|', error.why)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (
        "a C++ op library in this process defines the operator optc::rotary differently from this version of optc"
        " | it has optc::rotary(Tensor x, Tensor position) -> Tensor"
    )
