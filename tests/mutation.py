"""Mutation testing: every small change of the code that the rest is trusted to must turn a test red.

    python tests/mutation.py                     # all modules; hours
    python tests/mutation.py gate block-manager  # some of them

mutmut (the extra `mutants`) changes one operator, number, argument or name at a time and runs the tests that reach the
changed function. It wants a source tree without symbolic links, so it gets a copy. At least 90 % of a module's mutants
must be killed; those that survive stand in `mutants.toml` with the reason, and no others may.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KNOWN = Path(__file__).with_name("mutants.toml")
LEAST = 0.9

MODULES: dict[str, tuple[str, tuple[str, ...]]] = {
    "gate": ("compiler/pipeline/gate.py", ("tests/compiler/pipeline/test_gate.py",)),
    "budget": ("compiler/rewriting/budget.py", ("tests/compiler/pipeline/test_gate.py",)),
    "rerounding": ("compiler/pipeline/rerounding.py", ("tests/compiler/pipeline/test_rerounding.py",)),
    "drift": ("compiler/execution/drift.py", ("tests/compiler/execution/test_drift.py",)),
    "wide-rows": ("compiler/execution/wide_rows.py", ("tests/compiler/execution/test_drift.py",)),
    "verification": ("compiler/ir/verification.py", ("tests/compiler/ir/test_verification.py",)),
    "publishing": (
        "compiler/artifact/publishing.py",
        ("tests/compiler/artifact/test_publishing_steps.py", "tests/compiler/artifact/test_publishing.py"),
    ),
    "manifest": ("compiler/artifact/manifest.py", ("tests/compiler/artifact/test_manifest.py",)),
    "block-manager": (
        "compiler/execution/block_manager.py",
        ("tests/compiler/execution/test_block_manager.py",),
    ),
    "integer": ("compiler/formats/integer.py", ("tests/compiler/formats/test_integer.py",)),
    "group-sizes": ("compiler/formats/group_sizes.py", ("tests/compiler/formats/test_integer.py",)),
    "grid": (
        "passes/quantization/arithmetic/grid.py",
        ("tests/passes/quantization/arithmetic/test_grid.py",),
    ),
}
"""Name -> (module, the tests that shall kill its mutants)."""

_FOLDERS = ("compiler", "passes", "exporters", "targets", "runtime", "training")


def stage(folder: Path, module: str, tests: tuple[str, ...]) -> None:
    """Copy the source tree without links, with mutmut's settings for one module."""
    skipped = shutil.ignore_patterns("__pycache__", *_FOLDERS)
    shutil.copytree(ROOT / "src" / "optc", folder / "src" / "optc", ignore=skipped)
    for name in _FOLDERS:
        shutil.copytree(ROOT / name, folder / "src" / "optc" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tests", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    settings = [
        "\n[tool.mutmut]",
        'source_paths = ["src/optc"]',
        f'only_mutate = ["src/optc/{module}"]',
        'also_copy = ["examples"]',
        f"pytest_add_cli_args_test_selection = {list(tests)}",
        'pytest_add_cli_args = ["-p", "no:logging", "-p", "no:cacheprovider"]',
        "timeout_constant = 30.0",
        "use_git_change_detection = false",
    ]
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + "\n".join(settings) + "\n")


def run(name: str, folder: Path) -> tuple[int, dict[str, str]]:
    """Run mutmut on a module: how many mutants there are, and what became of those that were not killed.

    A mutant is named by its function and what it changes, as mutmut's numbers shift with every edit.
    """
    module, tests = MODULES[name]
    stage(folder, module, tests)
    path = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part and Path(part) != ROOT / "src"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}

    def mutmut(*arguments: str) -> str:
        command = [sys.executable, "-m", "mutmut", *arguments]
        ran = subprocess.run(
            command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if ran.returncode:
            raise SystemExit(f"mutmut {arguments[0]} failed on {name}:\n{ran.stdout[-4000:]}")
        return ran.stdout

    mutmut("run", "--max-children", "1")
    listed = [line.strip().rsplit(": ", 1) for line in mutmut("results", "--all", "true").splitlines() if ": " in line]
    alive = {key: state for key, state in listed if state not in _DEAD}
    return len(listed), {_describe(key, mutmut("show", key)): state for key, state in alive.items()}


_DEAD = ("killed", "timeout", "caught by type check", "suspicious", "segfault")
"""What mutmut calls a mutant that a test noticed; the last two ended the tests' own process by a signal."""


def _describe(key: str, shown: str) -> str:
    """FUNCTION: what stood there -> what the mutant has instead."""
    function = (
        re.sub(r"__mutmut_\d+$", "", key.rpartition(".")[2]).removeprefix("x_").removeprefix("xǁ").replace("ǁ", ".")
    )
    lines = [line for line in shown.splitlines() if not line.startswith(("---", "+++"))]
    parts = (" ".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+")
    return f"{function}: {' -> '.join(parts)}"


def judge(name: str, count: int, alive: dict[str, str], known: dict[str, str]) -> list[str]:
    """What is wrong with a module's result."""
    problems = [
        f"{name}: {key} {state}, and is not in {KNOWN.name}" for key, state in alive.items() if key not in known
    ]
    problems += [f"{name}: {key} is in {KNOWN.name} and does not survive" for key in known if key not in alive]
    killed = 1 - len(alive) / count if count else 0.0
    print(f"{name}: {count} mutants, {killed:.1%} killed")
    return problems + ([f"{name}: {killed:.1%} killed, {LEAST:.0%} are asked for"] if killed < LEAST else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(MODULES)}  [default: all]")
    names = parser.parse_args().modules or list(MODULES)
    unknown = sorted(set(names) - set(MODULES))
    if unknown:
        parser.error(f"unknown modules: {', '.join(unknown)}")
    known = tomllib.loads(KNOWN.read_text()) if KNOWN.exists() else {}
    problems = []
    for name in names:
        with tempfile.TemporaryDirectory(prefix="optc-mutants-") as folder:
            count, alive = run(name, Path(folder))
        problems += judge(name, count, alive, known.get(name, {}))
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
