"""The processes of a server, seen from inside: what they are told, what they tell, and that they end with their parent.

Each has a socket to its parent, the supervisor. The first line is its `ServerConfig`, further ones are orders; the end
of the stream is the end of the parent, however it came, and ends the process at once.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from optc.compiler.diagnostics import OptcError
from optc.runtime.serving.request import EngineInfo
from optc.runtime.serving.settings import ServerConfig


class Ready(Struct, frozen=True, kw_only=True, tag="ready"):
    """A process does its work from now on.

    Attributes:
        info: what the engine says of itself; None from the others.
    """

    info: EngineInfo | None = None


class Failed(Struct, frozen=True, kw_only=True, tag="failed"):
    """An `OptcError`, as it ends a process."""

    kind: str
    what: str
    where: str | None = None
    why: str | None = None
    remedy: str | None = None

    def error(self) -> OptcError:
        """The error, of the class that it was."""
        return _class_of(self.kind)(self.what, where=self.where, why=self.why, remedy=self.remedy)


def _class_of(kind: str, among: type[OptcError] = OptcError) -> type[OptcError]:
    if among.kind == kind:
        return among
    found = (_class_of(kind, item) for item in among.__subclasses__())
    return next((item for item in found if item.kind == kind), OptcError)


class Drain(Struct, frozen=True, kw_only=True, tag="drain"):
    """Take no more requests, finish those that run within `seconds`, and end."""

    seconds: float


Report = Ready | Failed
Order = Drain


def _path(kind: type, value: Any) -> Any:
    return Path(value) if kind is Path else value


def encode_config(config: ServerConfig) -> bytes:
    """The first line that a process is sent."""
    return msgspec.json.encode(config, enc_hook=str) + b"\n"


class Child:
    """This process's end of the socket to its parent."""

    def __init__(self, descriptor: int) -> None:
        # The whole process group gets a terminal's Ctrl-C, and some service managers' SIGTERM: the parent decides.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        self._socket = socket.socket(fileno=descriptor)
        self._lines = self._socket.makefile("rb")
        self.config = msgspec.json.decode(self._lines.readline(), type=ServerConfig, dec_hook=_path)

    def report(self, message: Report) -> None:
        """Tell the parent."""
        self._socket.sendall(msgspec.json.encode(message) + b"\n")

    def fail(self, error: OptcError) -> None:
        """Tell the parent why this process ends."""
        self.report(Failed(kind=error.kind, what=error.what, where=error.where, why=error.why, remedy=error.remedy))

    def listen(self, on_order: Callable[[Order], object]) -> None:
        """Call `on_order` from a thread of its own; when the parent is gone, end the process."""

        def read() -> None:
            for line in self._lines:
                on_order(msgspec.json.decode(line, type=Order))
            shutil.rmtree(Path(self.config.counters).parent, ignore_errors=True)  # the parent may have been killed
            os._exit(0)

        threading.Thread(target=read, name="parent", daemon=True).start()


def run_child(body: Callable[[Child], None], name: Literal["engine", "worker"]) -> None:
    """The main function of a process: `python -m MODULE DESCRIPTOR`."""
    child = Child(int(sys.argv[1]))
    try:
        body(child)
    except OptcError as error:
        child.fail(error)
        sys.exit(error.exit_code)
    except MemoryError:
        child.report(Failed(kind="resource", what=f"out of memory in the {name} process"))
        sys.exit(8)
