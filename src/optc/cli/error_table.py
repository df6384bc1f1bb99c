"""docs/errors.md: the classes of errors, as code has them. `python -m optc.cli.error_table docs/errors.md` writes it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

from optc.compiler import diagnostics
from optc.compiler.diagnostics import OptcError
from optc.compiler.ir import verification

_HEAD = """# Errors

Every error that optc knows is of one of these classes. A message says what went wrong, `where` (file, tensor, node,
flag or line), the `cause` where that is more, and a `remedy`; with `--json` it is an object on stdout with the keys
`error` (the kind), `exit_code`, `what`, `where`, `cause` and `remedy`. In Python they are
`optc.compiler.diagnostics.OptcError` and its subclasses. What optc does not know ends with exit code 1, one message,
and a report file whose name the message says. Control characters of files are shown as escapes.

Signals: after SIGINT, SIGTERM or SIGHUP what was being written is removed, and the exit code is 130, 143 or 129.

"""
_CODES = {
    1: "a bug of optc's: send the report",
    2: "the command line or a recipe is wrong",
    3: "a model, a file or a place cannot be used",
    4: "the target or this machine cannot do it",
    5: "numbers moved by more than they may",
    6: "a pass or a pattern that was asked for matched nothing",
    7: "the artifact is damaged, or not trusted",
    8: "memory, disk or time is exhausted; run it again with more of it",
}


def classes() -> Iterator[type[OptcError]]:
    """Every class of errors with a kind of its own, those with the least exit codes first."""
    found = [item for module in (diagnostics, verification) for item in vars(module).values() if isinstance(item, type)]
    own = {cls for cls in found if issubclass(cls, OptcError)}
    yield from sorted(own, key=lambda cls: (cls.exit_code, cls.__name__))


def error_table() -> str:
    """The document."""
    rows = ["| exit code | kind | class | what it is |", "|---|---|---|---|"]
    for cls in classes():
        text = (inspect.getdoc(cls) or "").splitlines()[0]
        rows.append(f"| {cls.exit_code} | `{cls.kind}` | `{cls.__name__}` | {text} |")
    codes = ["| exit code | meaning |", "|---|---|", "| 0 | done |"]
    codes += [f"| {code} | {meaning} |" for code, meaning in _CODES.items()]
    return _HEAD + "\n".join([*codes, "", *rows]) + "\n"


def main() -> None:
    """Write the document to the path that is given."""
    Path(sys.argv[1]).write_text(error_table(), encoding="utf-8")


if __name__ == "__main__":
    main()
