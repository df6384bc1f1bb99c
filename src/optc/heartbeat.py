"""Lines of progress where there is no terminal: a log of a long run shows that it goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY = 10.0
"""Seconds between two lines."""


@contextmanager
def heartbeat(title: str, say: Callable[[str], None], every: float = EVERY) -> Iterator[Callable[[str], None]]:
    """Say that work begins, every so many seconds what goes on, and at the end how long it took; yields `update(note)`.

    Args:
        say: prints a line; called from another thread.
    """
    begin, done, note = time.monotonic(), threading.Event(), ""

    def update(text: str) -> None:
        nonlocal note
        note = text

    def beat() -> None:
        while not done.wait(every):
            say(f"{title}: {time.monotonic() - begin:.0f} s" + (f", {note}" if note else ""))

    say(f"{title}: begun")
    thread = threading.Thread(target=beat, name="optc-progress", daemon=True)
    thread.start()
    ended = "stopped"
    try:
        yield update
        ended = "done"
    finally:
        done.set()
        thread.join()
        say(f"{title}: {ended} after {time.monotonic() - begin:.0f} s")
