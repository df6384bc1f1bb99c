"""Kill -9 and resume: `optc train` killed at random points ends with the weights of an uninterrupted run.

    python benchmarks/train_kill.py [--kills 20] [--seed 0]

Runs the command on the example model and text, in processes forked after its imports, so that starting one is cheap.
Each is killed at a random time: while it reads model and text, in a step, while a checkpoint is written. The next one
has --resume. Losses and weights are compared bitwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama  # noqa: F401
from common import ROOT, record

from optc.cli.main import main as optc
from optc.training import loop  # noqa: F401


def launch(output: Path, steps: int, resume: bool) -> int:
    """Fork a process that runs `optc train`; its pid."""
    settings = ["batch_size=2", "seq_len=64", "saving.every=2", "device=cpu", "gradient_accumulation=2"]
    words = [
        "train", "--recipe", "finetune", "--model", str(ROOT / "examples" / "fiction-3m"), "--text",
        str(ROOT / "examples" / "book.txt"), "--max-steps", str(steps), "-o", str(output), "--json",
        *[word for setting in settings for word in ("--set", setting)], *(["--resume"] if resume else []),
    ]  # fmt: skip
    pid = os.fork()
    if pid:
        return pid
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    optc(words)
    raise AssertionError("optc ends the process")


def finish(pid: int) -> None:
    """Wait for a process that must end well."""
    status = os.waitpid(pid, 0)[1]
    if status:
        sys.exit(f"optc train failed ({status})")


def logged(output: Path) -> int:
    """Steps that the run has logged so far."""
    path = output.with_name(output.name + ".run") / "log.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "log.jsonl").read_text().splitlines()]


def kill_once(pid: int, output: Path, chance: random.Random, startup: float) -> dict[str, Any]:
    """Kill at a random time: one in four while it starts, the others some steps later."""
    begin = time.monotonic()
    if chance.random() < 0.25:
        time.sleep(chance.uniform(0, startup))
    else:
        goal = logged(output) + chance.randint(1, 5)
        while logged(output) < goal:
            if os.waitpid(pid, os.WNOHANG)[0]:
                sys.exit("the run ended before it was killed")
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.3))
    os.kill(pid, signal.SIGKILL)
    if not os.WIFSIGNALED(os.waitpid(pid, 0)[1]):
        sys.exit("the run ended before it was killed")
    return {"seconds": round(time.monotonic() - begin, 3), "steps_logged": logged(output)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    steps = 4 * arguments.kills
    torch.set_num_threads(arguments.threads)
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        whole, killed = Path(name) / "whole", Path(name) / "killed"
        begin = time.monotonic()
        finish(launch(whole, steps, False))
        seconds = time.monotonic() - begin
        kills: list[dict[str, Any]] = []
        while len(kills) < arguments.kills:
            kills.append(kill_once(launch(killed, steps, True), killed, chance, seconds / 3))
            print(kills[-1], flush=True)
        finish(launch(killed, steps, True))
        digests = [
            hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
            for folder in (whole, killed)
        ]
        result = {
            "steps": steps, "kills": kills, "same_weights": digests[0] == digests[1], "weights_sha256": digests,
            "same_losses": losses(whole) == losses(killed), "last_loss": losses(whole)[-1],
        }  # fmt: skip
    record("train_kill", result, arguments.threads)
    if not (result["same_weights"] and result["same_losses"]):
        sys.exit("the resumed run differs from the whole one")


if __name__ == "__main__":
    main()
