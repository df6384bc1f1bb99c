"""Where in a graph's generated code an exception was raised."""

from __future__ import annotations

import traceback

_LONGEST = 200


def last_call(error: BaseException) -> str | None:
    """The line of a graph's code at which it left off, `node = call(...)`, cut off where it is long; None where it was
    not raised below one."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.line for frame in frames if frame.filename.startswith("<eval")]
    return str(lines[-1])[:_LONGEST] if lines else None
