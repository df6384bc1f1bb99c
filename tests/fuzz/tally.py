"""What a campaign counts, and its figures as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Fault:
    """An outcome that is neither success nor a documented error.

    Attributes:
        kind: the exception or signal and where it arose; equal kinds count as one.
    """

    kind: str
    detail: str
    count: int = 0


@dataclass
class Tally:
    """What a reader made of its inputs.

    Attributes:
        inputs: all of them; what is neither read nor refused is a fault.
        seconds: of processes, all together. slowest: CPU time of the costliest input.
        skipped: why the reader was not run.
    """

    inputs: int = 0
    read: int = 0
    refused: Counter[int] = field(default_factory=Counter)
    faults: dict[str, Fault] = field(default_factory=dict)
    slowest: float = 0.0
    seconds: float = 0.0
    peak_bytes: int = 0
    skipped: str = ""

    def add(self, row: dict[str, Any]) -> None:
        """Count what a child tells of some inputs."""
        self.inputs += row["done"]
        self.read += row["read"]
        self.refused.update({int(code): count for code, count in row["refused"].items()})
        self.slowest = max(self.slowest, row["slowest"])
        self.peak_bytes = max(self.peak_bytes, row["largest"])

    def add_fault(self, kind: str, detail: str, count: int = 1) -> bool:
        """Whether it is the first of its kind."""
        fault = self.faults.setdefault(kind, Fault(kind, detail))
        fault.count += count
        return fault.count == count

    def add_figures(self, figures: dict[str, Any]) -> None:
        """Count what an earlier campaign told by `to_dict`."""
        if "skipped" in figures:
            return
        names = ("read", "slowest_s", "most_bytes_of_an_input", "refused_by_exit_code")
        read, slowest, largest, refused = (figures[name] for name in names)
        self.add({"done": figures["inputs"], "read": read, "refused": refused, "slowest": slowest, "largest": largest})
        self.seconds += figures["seconds"]
        for fault in figures["faults"]:
            self.add_fault(fault["kind"], fault["detail"], fault["count"])

    def to_dict(self) -> dict[str, Any]:
        """As the results have it."""
        if self.skipped and not self.inputs:
            return {"skipped": self.skipped}
        return {
            "inputs": self.inputs,
            "read": self.read,
            "refused_by_exit_code": dict(sorted(self.refused.items())),
            "faults": [{"kind": row.kind, "count": row.count, "detail": row.detail} for row in self.faults.values()],
            "slowest_s": round(self.slowest, 2),
            "seconds": round(self.seconds, 1),
            "most_bytes_of_an_input": self.peak_bytes,
        }


def figures(tallies: dict[str, Tally]) -> dict[str, Any]:
    """Those of all readers."""
    return {
        "inputs": sum(tally.inputs for tally in tallies.values()),
        "fault_kinds": sum(len(tally.faults) for tally in tallies.values()),
        "readers_run": sum(tally.inputs > 0 for tally in tallies.values()),
        "readers_skipped": sum(bool(tally.skipped) for tally in tallies.values()),
        "readers": {name: tally.to_dict() for name, tally in tallies.items()},
    }


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a campaign that is killed leaves the figures that it wrote before."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)
