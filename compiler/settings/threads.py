"""How threads of libgomp wait for each other, which a process says before it loads torch."""

from __future__ import annotations

import os

PATIENT_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads sleep while they wait for each other. Threads that spin take the cores from those that they wait for as soon as
something else runs: on two cores that others kept busy, a step took five to a hundred times as long."""


def wait_patiently() -> None:
    """Let the threads of this process do so, unless the user has said how they wait; without effect once torch is loaded."""
    for name, value in PATIENT_THREADS.items():
        os.environ.setdefault(name, value)
