"""The tests of the CUDA kernels under NVIDIA's compute-sanitizer: accesses outside of memory, races in shared memory.

    python benchmarks/gpu_sanitizer.py                                  # every file, memcheck and racecheck
    python benchmarks/gpu_sanitizer.py --files test_fused_norm.py --tools memcheck

Each file of tests/compiler/kernels/cuda runs in a process of its own. memcheck sees an access outside of a tensor only
where each tensor is an allocation of its own, so PyTorch's cache is off. A row whose tests fail, or whose process dies or
outlasts `--seconds`, is no clean row, whatever the sanitizer says. Tests that need the cache (marked keeps_memory) are left out.
Exit code 1 where a row is not clean.

Needs a GPU whose driver lets tools attach (virtual machines of some kinds do not), and compute-sanitizer from the CUDA
toolkit on the PATH or at --sanitizer.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import ROOT, record

TESTS = ROOT / "tests" / "compiler" / "kernels" / "cuda"
REPORTS = {"memcheck": ("--report-api-errors", "no"), "racecheck": ()}
"""Tools, and what they are to leave out: calls of the driver that PyTorch asks and that answer no."""
TOOLS = tuple(REPORTS)
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")
_LAST = re.compile(r"^.*\b\d+ (?:passed|failed|errors?|skipped)\b.* in [\d.]+s.*$", re.MULTILINE)
"""Pytest's last line."""
_COUNT = re.compile(r"(\d+) (passed|failed|error|skipped)")
_FINDING = re.compile(r"^=+ (?!.*SUMMARY)(?=.*(?:Invalid|hazard|Error|Race|leak))(.*)$", re.MULTILINE)
_FAILED = re.compile(r"^FAILED (\S+)", re.MULTILINE)
_SHOWN = 12


def outcome(output: str, code: int | None) -> dict[str, Any]:
    """What one process printed.

    Args:
        code: of its exit; None where it was stopped.

    Returns:
        {"findings": count or None without a summary, "first": lines, "tests": {"passed": n, ...}, "failed": names, "exit": code,
        "clean": bool}.
    """
    summaries = [int(number) for number in _SUMMARY.findall(output)]
    tests: dict[str, int] = {}
    for number, word in _COUNT.findall((_LAST.findall(output) or [""])[-1]):
        tests[word] = int(number)
    findings = sum(summaries) if summaries else None
    clean = findings == 0 and code == 0 and tests.get("passed", 0) > 0 and not tests.keys() & {"failed", "error"}
    first = list(dict.fromkeys(_FINDING.findall(output)))[:_SHOWN]
    failed = _FAILED.findall(output)
    return {"findings": findings, "first": first, "tests": tests, "failed": failed, "exit": code, "clean": clean}


def run(sanitizer: str, tool: str, file: Path, seconds: int) -> dict[str, Any]:
    """One file's tests under one tool."""
    options = ["--tool", tool, "--target-processes", "all", *REPORTS[tool]]
    command = [sanitizer, *options, sys.executable, "-m", "pytest", "-m", "not keeps_memory", str(file)]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as stopped:
        printed = stopped.stdout or b""
        return outcome(printed.decode(errors="replace") if isinstance(printed, bytes) else printed, None)
    return outcome(done.stdout + done.stderr, done.returncode)


def main() -> int:
    """Every file under every tool; the record is written even if some are not clean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", default=sorted(path.name for path in TESTS.glob("test_*.py")))
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--seconds", type=int, default=240, help="of one file under one tool")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the GPU")
    parser.add_argument("--sanitizer", default="compute-sanitizer")
    arguments = parser.parse_args()
    from gpu_timing import card

    def one(job: tuple[str, str]) -> dict[str, Any]:
        file, tool = job
        row = {"file": file, "tool": tool, **run(arguments.sanitizer, tool, TESTS / file, arguments.seconds)}
        print(row, flush=True)
        return row

    with ThreadPoolExecutor(arguments.jobs) as pool:
        rows = list(pool.map(one, [(file, tool) for file in arguments.files for tool in arguments.tools]))
    clean = sum(row["clean"] for row in rows)
    record("gpu_sanitizer", {"card": card(), "rows": rows, "clean": clean, "of": len(rows)}, threads=1)
    return 0 if clean == len(rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
