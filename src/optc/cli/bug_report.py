"""What is left of an error that nobody foresaw: a file for the maintainers, and one line for the user."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import tempfile
import traceback
from datetime import UTC, datetime

from optc.compiler.diagnostics import BugError, described
from optc.compiler.version import version

_PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "numpy", "onnxruntime", "executorch", "triton")


def bug_error(error: BaseException) -> BugError:
    """The error of exit 1, after the report was written to the system's folder for temporary files."""
    place = _innermost(error)
    try:
        handle, name = tempfile.mkstemp(prefix="optc-report-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(report(error))
    except OSError as failure:
        return BugError(
            "optc met an error that it does not know",
            where=place,
            why=f"{described(error)} (no report could be written: {failure})",
            remedy="run again with a writable TMPDIR, and send the report to the maintainers (SECURITY.md says how)",
        )
    return BugError(
        "optc met an error that it does not know",
        where=place,
        why=described(error),
        remedy=f"send {name} to the maintainers of this copy as an issue; if a file from elsewhere caused it, "
        "privately, as SECURITY.md says. Read it first: it holds your command line",
    )


def report(error: BaseException) -> str:
    """Command line, versions and traceback. No environment, no contents of files."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    rows = [
        f"time: {datetime.now(UTC).isoformat(timespec='seconds')}",
        f"command: {sys.argv!r}",
        f"optc: {version()}",
        f"python: {sys.version.split()[0]} on {platform.platform()}",
    ]
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            rows.append(f"{name}: {installed(name)}")
    return "\n".join([*rows, "", *traceback.format_exception(error)])


def _innermost(error: BaseException) -> str:
    """The innermost line of optc's own code."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if f"{os.sep}optc{os.sep}" in frame.filename] or frames
    if not own:
        return "unknown"
    return f"{own[-1].filename.rpartition(f'{os.sep}optc{os.sep}')[2]}:{own[-1].lineno}, in {own[-1].name}"
