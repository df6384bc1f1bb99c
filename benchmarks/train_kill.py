"""Kill -9 and resume: `optc train` killed at random points ends with the weights of an uninterrupted run.

    python benchmarks/train_kill.py [--kills 20] [--seed 0]

Runs the command as a user does, on the example model and text. Each process is killed at a random time: while it
starts, in a step, while a checkpoint is written. The next one has --resume. Losses and weights are compared bitwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, record


def command(output: Path, steps: int, resume: bool) -> list[str]:
    settings = ["batch_size=2", "seq_len=64", "saving.every=2", "device=cpu", "gradient_accumulation=2"]
    words = [sys.executable, "-m", "optc", "train", "--recipe", "finetune"]
    words += ["--model", str(ROOT / "examples" / "fiction-3m"), "--text", str(ROOT / "examples" / "book.txt")]
    words += ["--max-steps", str(steps), "-o", str(output)]
    words += [word for setting in settings for word in ("--set", setting)]
    return words + ["--resume"] * resume


def logged(output: Path) -> int:
    """Steps that the run has logged so far."""
    path = output.with_name(output.name + ".run") / "log.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "log.jsonl").read_text().splitlines()]


def kill_once(process: subprocess.Popen[bytes], output: Path, chance: random.Random, startup: float) -> dict[str, Any]:
    """Kill at a random time: one in four while it starts, the others some steps later."""
    begin = time.monotonic()
    if chance.random() < 0.25:
        time.sleep(chance.uniform(0, startup))
    else:
        goal = logged(output) + chance.randint(1, 5)
        while logged(output) < goal and process.poll() is None:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    code = process.wait()
    return {"seconds": round(time.monotonic() - begin, 3), "steps_logged": logged(output), "exit_code": code}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    steps = 4 * arguments.kills
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        whole, killed = Path(name) / "whole", Path(name) / "killed"
        begin = time.monotonic()
        subprocess.run(command(whole, steps, False), env=environment, check=True, capture_output=True)
        seconds = time.monotonic() - begin
        kills: list[dict[str, Any]] = []
        while len(kills) < arguments.kills:
            process = subprocess.Popen(
                command(killed, steps, True),
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            kills.append(kill_once(process, killed, chance, seconds / 3))
            print(kills[-1], flush=True)
            if kills[-1]["exit_code"] == 0:
                sys.exit("the run ended before all kills: raise its steps")
        subprocess.run(command(killed, steps, True), env=environment, check=True, capture_output=True)
        digests = [
            hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() for folder in (whole, killed)
        ]
        result = {
            "steps": steps,
            "kills": kills,
            "same_weights": digests[0] == digests[1],
            "weights_sha256": digests,
            "same_losses": losses(whole) == losses(killed),
            "last_loss": losses(whole)[-1],
        }
    record("train_kill", result, arguments.threads)
    if not (result["same_weights"] and result["same_losses"]):
        sys.exit("the resumed run differs from the whole one")


if __name__ == "__main__":
    main()
