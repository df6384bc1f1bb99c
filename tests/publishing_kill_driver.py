"""Writes an artifact in forks that are killed at their first, second, third ... file operation, until one gets through.

Arguments: the output; "write" or "rewrite"; "exchange", or "renames" where folders cannot be swapped. Prints the target
that the artifact had after each kill, "absent" where there was none, as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec
from artifacts import make_artifact

from optc.compiler.artifact import publishing
from optc.compiler.artifact.folder import rewrite, verify


def write_new(output: Path) -> None:
    make_artifact(output, force=True, target="new")


def rewrite_new(output: Path) -> None:
    rewrite(output, lambda directory, manifest: msgspec.structs.replace(manifest, target="new"))


JOBS = {"write": write_new, "rewrite": rewrite_new}


def dies_at(step: int, job: str, output: Path) -> bool:
    """Run a job in a forked process that is SIGKILLed at its n-th file operation; False if it got through."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event: str, _: object) -> None:
            nonlocal seen
            seen += event.startswith(("os.", "open", "shutil.", "ctypes.", "fcntl."))
            if seen == step + 1:
                seen += 1  # the kill is an event too
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        code = 1
        try:
            JOBS[job](output)
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def never(*_: Any) -> bool:
    """Stands for a kernel without RENAME_EXCHANGE."""
    return False


def main() -> None:
    output, job, swap = Path(sys.argv[1]), *sys.argv[2:]
    if swap == "renames":
        publishing.rename_with = never
    os.fsync = lambda handle: None  # type: ignore[assignment]  # a kill is no power cut; saves half a minute
    seen: list[str] = []
    make_artifact(output, target="old")
    while dies_at(len(seen), job, output):
        seen.append(verify(output).target if output.exists() else "absent")
        make_artifact(output, force=output.exists(), target="old")  # the next run, over what is left
        left = sorted(path.name for path in output.parent.iterdir())
        assert left == [output.name], left
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
