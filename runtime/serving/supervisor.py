"""The process that a user starts: it starts the engine's and the API's, watches them, restarts and drains them.

It holds the two sockets that outlive its children: the one for HTTP, so that no connection is refused while a worker
restarts, and the one of the engine, in whose queue workers wait for the next engine when one has died.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Literal

import msgspec

from optc.compiler.diagnostics import InputError, OptcError, ResourceError
from optc.compiler.settings.threads import PATIENT_THREADS
from optc.runtime.serving.child import Drain, Failed, Ready, Report, encode_config
from optc.runtime.serving.counters import Counters
from optc.runtime.serving.own_folder import own_folder
from optc.runtime.serving.request import EngineInfo
from optc.runtime.serving.settings import API_KEY_VARIABLE, ServeOptions, ServerConfig
from optc.runtime.serving.watchdog import patience, stops_answering

MOST_DEATHS, WITHIN_SECONDS = 3, 300.0
"""A process that ends on its own more often than this is not started again: the server ends."""

_GRACE = 5.0  # seconds beyond a drain until a worker is killed
_PAUSE = 0.1  # seconds before a process is started again
_BACKLOG = 2048
Event = Literal["ready", "died", "restarted", "draining", "stopped"]
Tell = Callable[[Event, dict[str, object]], None]
"""Called with what happened and its particulars."""


class _Process:
    """A child and the socket to it."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, ours: socket.socket) -> None:
        self.name, self.process = name, process
        self._ours = ours
        self.writer: asyncio.StreamWriter | None = None
        self.failed: Failed | None = None
        self.hung = ""
        self.watch: asyncio.Task[None] | None = None

    async def follow(self, on_ready: Callable[[Ready], None]) -> int:
        """Read what the child reports until it ends; its return code."""
        reader, self.writer = await asyncio.open_connection(sock=self._ours)
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                report = msgspec.json.decode(line, type=Report)
                if isinstance(report, Ready):
                    on_ready(report)
                else:
                    self.failed = report
        code = await self.process.wait()
        if self.watch is not None:
            self.watch.cancel()
        self.writer.close()
        return code

    def order(self, message: Drain) -> None:
        if self.writer is not None:
            self.writer.write(msgspec.json.encode(message) + b"\n")

    def kill(self) -> None:
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()


class Supervisor:
    """One server.

    Args:
        config: of the server; `engine_socket` and `counters` are filled in here.
        tell: is told what happens.
    """

    def __init__(self, config: ServerConfig, tell: Tell) -> None:
        self._config, self._tell = config, tell
        self._options: ServeOptions = config.options
        self._children: dict[str, _Process] = {}
        self._waiting_for: set[str] = set()
        self._info: EngineInfo | None = None
        self._deaths: dict[str, list[float]] = {}
        self._draining = False
        self._error: OptcError | None = None
        self._end = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._started = time.monotonic()

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            InputError: the address cannot be listened on.
            OptcError: what the engine says when it cannot start.
            ResourceError: a process died too often.
        """
        with contextlib.ExitStack() as stack:
            self._http = stack.enter_context(listen_http(self._options.host, self._options.port))
            place = stack.enter_context(own_folder())
            self._engine_listener = stack.enter_context(_listen_unix(str(place / "engine")))
            Counters.create(place / "counters", self._options.workers)
            self._counters = Counters(place / "counters", self._options.workers)
            self._config = msgspec.structs.replace(
                self._config, engine_socket=str(place / "engine"), counters=str(place / "counters")
            )
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._on_signal, number)
                stack.callback(loop.remove_signal_handler, number)
            names = ["engine", *(f"worker-{index}" for index in range(self._options.workers))]
            self._waiting_for = set(names)
            try:
                for name in names:
                    self._keep(name)
                await self._end.wait()
            finally:
                await self._stop()
        if self._error is not None:
            raise self._error

    @property
    def url(self) -> str:
        host, port = self._http.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def _ending(self) -> bool:
        return self._draining or self._error is not None

    # -- children ---------------------------------------------------------------------------

    def _keep(self, name: str) -> None:
        task = asyncio.get_running_loop().create_task(self._kept(name))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _kept(self, name: str) -> None:
        """Start a child, again and again until it is not to be there any more."""
        while not self._ending():
            child = await self._start(name)
            code = await child.follow(lambda report: self._on_ready(name, report))
            del self._children[name]
            if self._ending():
                return
            self._on_death(name, code, child)
            await asyncio.sleep(_PAUSE)

    async def _start(self, name: str) -> _Process:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        engine = name == "engine"
        module = "optc.runtime.serving.engine_process" if engine else "optc.runtime.serving.http.worker"
        inherited = [theirs.fileno(), (self._engine_listener if engine else self._http).fileno()]
        environment = PATIENT_THREADS | {key: value for key, value in os.environ.items() if key != API_KEY_VARIABLE}
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                module,
                *map(str, inherited),
                pass_fds=inherited,
                stdin=asyncio.subprocess.DEVNULL,
                env=environment,
            )
        index = 0 if engine else int(name.removeprefix("worker-"))
        keys = () if engine else self._config.api_keys
        config = msgspec.structs.replace(self._config, worker=index, api_keys=keys)
        with contextlib.suppress(BlockingIOError, ConnectionError):  # one that is gone already is noticed below
            ours.send(encode_config(config))
        if engine:
            self._counters.count_start()
        child = self._children[name] = _Process(name, process, ours)
        return child

    def _on_ready(self, name: str, report: Ready) -> None:
        self._info = report.info or self._info
        if report.info is not None:
            child = self._children[name]
            seconds = patience(self._options, report.info)
            child.watch = asyncio.get_running_loop().create_task(self._watched(child, seconds))
        first = bool(self._waiting_for)
        self._waiting_for.discard(name)
        if first and not self._waiting_for:
            assert self._info is not None
            info = msgspec.to_builtins(self._info)
            seconds = round(time.monotonic() - self._started, 3)
            self._tell("ready", {"url": self.url, "model": self._config.name, "seconds": seconds, **info})
        elif not first:
            self._tell("restarted", {"process": name})

    async def _watched(self, child: _Process, seconds: float) -> None:
        """Kill the engine once it hangs: who waits for it is told at once, and the next one starts."""
        if await stops_answering(self._config.engine_socket, seconds):
            child.hung = f"it did not answer for {seconds:g} seconds, and was killed"
            child.kill()

    def _on_death(self, name: str, code: int, child: _Process) -> None:
        failed = child.failed
        if failed is not None and name in self._waiting_for:  # it says why it cannot start: the next would, too
            self._give_up(failed.error())
            return
        now = time.monotonic()
        recent = [item for item in self._deaths.get(name, []) if now - item < WITHIN_SECONDS]
        self._deaths[name] = [*recent, now]
        why = f"{failed.error()}" if failed is not None else child.hung or _ended(code)
        self._tell("died", {"process": name, "why": why})
        if len(recent) >= MOST_DEATHS:
            self._give_up(
                ResourceError(
                    f"the {name} process ended {len(recent) + 1} times within {WITHIN_SECONDS:.0f} seconds",
                    where=str(self._config.folder),
                    why=f"the last time: {why}",
                    remedy="look above for what it printed; where the system killed it for memory, give fewer "
                    "--kv-blocks or --max-running",
                )
            )

    def _give_up(self, error: OptcError) -> None:
        self._error = self._error or error
        self._end.set()

    # -- the end ----------------------------------------------------------------------------

    def _on_signal(self, number: int) -> None:
        if self._draining:  # asked twice: now
            for name, child in self._children.items():
                if name != "engine":
                    child.order(Drain(seconds=0))
            return
        self._tell("draining", {"signal": signal.Signals(number).name, "seconds": self._options.drain_seconds})
        self._draining = True
        self._end.set()

    async def _stop(self) -> None:
        """Let the workers finish what runs, or end at once where there was an error; then the engine."""
        self._draining = True
        self._http.close()
        seconds = self._options.drain_seconds if self._error is None else 0.0
        workers = [child for name, child in self._children.items() if name != "engine"]
        for child in workers:
            child.order(Drain(seconds=seconds))
        deadline = time.monotonic() + seconds + _GRACE
        while time.monotonic() < deadline and any(child.process.returncode is None for child in workers):
            await asyncio.sleep(0.02)
        for child in list(self._children.values()):
            child.kill()
        for task in list(self._tasks):
            await task
        if self._error is None:
            self._tell("stopped", {"seconds": round(time.monotonic() - self._started, 3)})


def _ended(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"


def listen_http(host: str, port: int) -> socket.socket:
    """The socket for HTTP.

    Raises:
        InputError: the address cannot be had.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        found = socket.socket(family, kind)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(_BACKLOG)
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"cannot listen on {host} port {port}",
            why=str(error),
            remedy="give another --port or --host; --port 0 takes a free one",
        ) from error
    return found


def _listen_unix(path: str) -> socket.socket:
    found = socket.socket(socket.AF_UNIX)
    found.bind(path)
    found.listen(128)
    return found
