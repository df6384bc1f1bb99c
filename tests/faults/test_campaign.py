"""`fuzz.campaign` itself: what dies, hangs, leaves its folder or raises is counted, whatever else runs beside it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from fuzz import campaign, child, memory
from fuzz.readers import Input, Reader

from optc.compiler.diagnostics import InputError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the campaign forks and reads /proc")


class _Toy(Reader):
    def make(self, rng: object) -> Input:
        self.number = getattr(self, "number", -1) + 1
        return "input.json", f"{type(self).__name__} {self.number}".encode()

    def read(self, name: str, data: bytes) -> None:
        if self.number % 2:
            raise InputError("no", remedy="none")


class Dies(_Toy):
    def read(self, name: str, data: bytes) -> None:
        if self.number == 3:
            os.kill(os.getpid(), signal.SIGKILL)


class Hangs(_Toy):
    def read(self, name: str, data: bytes) -> None:
        if self.number == 2:
            if os.fork():
                os.wait()
            time.sleep(100)


class Waits(_Toy):
    def read(self, name: str, data: bytes) -> None:
        time.sleep(1.0)


class Makes(_Toy):
    def make(self, rng: object) -> Input:
        end = time.process_time() + 0.4
        while time.process_time() < end:
            pass
        return super().make(rng)


class Spins(_Toy):
    def read(self, name: str, data: bytes) -> None:
        if self.number == 2:
            if os.fork():
                os.wait()
            while True:
                pass


class Raises(_Toy):
    def read(self, name: str, data: bytes) -> None:
        time.sleep(0.01)
        raise KeyError("x")


class Writes(_Toy):
    def read(self, name: str, data: bytes) -> None:
        time.sleep(0.01)
        with open(self.seeds.folder.parent / "outside", "w"):
            pass


class Broken(_Toy):
    def prepare(self) -> None:
        marker = self.place.parent / "broken"
        if marker.exists():  # its seeds were made
            raise RuntimeError("never ready")
        marker.touch()


class Takes(_Toy):
    """One input of all takes much, however many processes read them."""

    def read(self, name: str, data: bytes) -> None:
        marker = self.place.parent / "took"
        much = self.number == 2 and not marker.exists()
        if much:
            marker.touch()
        taken = b"x" * ((120 if much else 20) << 20)
        assert taken
        time.sleep(0.02)


class Holds(_Toy):
    """Each of its processes can read four inputs, none of which takes much."""

    def read(self, name: str, data: bytes) -> None:
        self.held = [*getattr(self, "held", ()), b"x" * (20 << 20)]
        time.sleep(0.02)


class Lacks(_Toy):
    packages = ("no_such_package_of_any_name",)


def run(
    monkeypatch: pytest.MonkeyPatch, folder: Path, readers: list[type[Reader]], *arguments: str, most: float = 0.1
) -> tuple[int, dict]:
    names = ",".join(cls.__name__ for cls in readers)
    words = [
        "campaign",
        "--readers",
        names,
        "--work",
        str(folder / "work"),
        "--json",
        str(folder / "figures.json"),
        *arguments,
    ]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(campaign, "READERS", {cls.__name__: cls for cls in readers})
    monkeypatch.setattr(campaign, "warm", lambda: None)
    monkeypatch.setattr(child, "LIMIT_SECONDS", most)
    monkeypatch.setattr(child, "HANG_SECONDS", 6.0)
    monkeypatch.setenv("TMPDIR", str(folder / "tmp"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        code = campaign.main(show=lambda text: None)
    return code, json.loads((folder / "figures.json").read_text())


def test_every_kind_of_fault_is_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    readers = [_Toy, Dies, Hangs, Waits, Makes, Spins, Raises, Writes, Broken, Lacks]
    kept = tmp_path / "kept"
    arguments = ("--seconds", "0.6", "--jobs", "3", "--keep", str(kept))
    code, found = run(monkeypatch, tmp_path, readers, *arguments)
    assert code == 1
    rows = found["readers"]
    toy = rows["_Toy"]
    assert toy["faults"] == []
    assert toy["inputs"] == toy["read"] + toy["refused_by_exit_code"]["3"] > 10
    assert rows["Dies"]["inputs"] == 4
    assert [(row["kind"], row["count"]) for row in rows["Dies"]["faults"]] == [("SIGKILL", 1)]
    assert rows["Hangs"]["inputs"] == rows["Spins"]["inputs"] == 3
    assert [row["kind"] for row in rows["Hangs"]["faults"]] == ["did not end in 6 s"]
    assert [row["kind"] for row in rows["Spins"]["faults"]] == ["took more than 0.1 s of CPU time"]
    waits = rows["Waits"]  # what the machine does beside it costs an input nothing
    assert (waits["inputs"], waits["faults"]) == (1, [])
    assert waits["slowest_s"] < 0.1
    assert rows["Makes"]["faults"] == []
    (raised,) = rows["Raises"]["faults"]
    assert raised["kind"].startswith("KeyError at ")
    assert raised["count"] == rows["Raises"]["inputs"]
    assert [row["kind"] for row in rows["Writes"]["faults"]] == ["event write"]
    (broken,) = rows["Broken"]["faults"]
    assert "never ready" in broken["kind"]
    assert "no_such_package_of_any_name" in rows["Lacks"]["skipped"]
    assert {path.name: path.read_bytes() for path in (kept / "Dies").rglob("*.json")} == {"input.json": b"Dies 3"}
    assert (found["fault_kinds"], found["readers_run"], found["readers_skipped"]) == (6, 8, 1)


def test_memory_counts_for_the_input_that_takes_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(child, "LIMIT_BYTES", 100 << 20)
    monkeypatch.setattr(memory, "RESTART_BYTES", 70 << 20)
    code, found = run(monkeypatch, tmp_path, [Takes], "--seconds", "30", "--inputs", "4", most=60.0)
    takes = found["readers"]["Takes"]
    assert code == 1
    assert [(row["kind"], row["count"]) for row in takes["faults"]] == [("took more than 2 GiB", 1)], found
    assert 110 << 20 < takes["most_bytes_of_an_input"] < 140 << 20
    code, found = run(monkeypatch, tmp_path, [Holds], "--seconds", "30", "--inputs", "12", most=60.0)
    holds = found["readers"]["Holds"]
    assert (code, holds["faults"]) == (0, [])
    assert holds["most_bytes_of_an_input"] < 40 << 20


def test_what_is_told_while_inputs_begin_is_whole() -> None:
    """The campaign looks at any moment, also between two bytes of a number."""
    shared = child.Shared()
    pid = os.fork()
    if pid == 0:
        for done in range(10**9):
            shared.begin(done, ("x", b"y"))
    try:
        end = time.monotonic() + 0.5
        while not shared.done:
            assert time.monotonic() < end + 60
        looks = 0
        while time.monotonic() < end or looks < 1000:
            looks += 1
            assert shared.overdue(pid) == ""
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        shared.close()


def test_a_goal_by_count_ends_the_campaign_and_earlier_figures_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = ("--seconds", "30", "--jobs", "2")
    code, first = run(monkeypatch, tmp_path, [_Toy], *arguments, "--inputs", "2000")
    assert code == 0
    assert first["inputs"] >= 2000
    assert first["wall_s"] < 25
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps(first))
    goal = str(first["inputs"] + 100)
    code, second = run(monkeypatch, tmp_path, [_Toy], *arguments, "--inputs", goal, "--add", str(earlier))
    assert code == 0
    assert second["inputs"] >= first["inputs"] + 100
    code, third = run(monkeypatch, tmp_path, [_Toy], *arguments, "--inputs", str(10**9), "--minutes", "0.01")
    assert (code, third["fault_kinds"]) == (1, 0)  # fewer than asked for
