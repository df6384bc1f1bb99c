"""Runs a training in child processes that are killed at random times and resumed: prints how often, and when.

Arguments: model folder, text, output folder, seed, kills. The children are forked after the imports, so that a
run costs a fraction of a second. Where one is done before its kill comes, on a busy machine, all begins anew.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

torch.set_num_threads(1)

# Imported once, not in each child; no tensor is touched before the forks, which threads would not survive.
import transformers.models.auto.modeling_auto  # noqa: E402
import transformers.models.llama.modeling_llama  # noqa: E402, F401
from training_runs import small_config  # noqa: E402

from optc.training.loop import train  # noqa: E402


def child(model: Path, text: Path, output: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    config = small_config(
        model,
        text,
        output,
        max_steps=30,
        saving={"every": 3},
        validation={"share": 0.2, "every": 2},
        gradient_accumulation=2,
        optimizer={"name": "adamw", "lr": 3e-3},
    )
    train(config, resume=True)
    os._exit(0)


def steps(output: Path) -> int:
    log = output.with_name(output.name + ".run") / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def exited(pid: int) -> bool:
    """Whether a child has ended by itself; it is still there to be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def main() -> None:
    model, text, output = (Path(item) for item in sys.argv[1:4])
    chance, kills = random.Random(int(sys.argv[4])), int(sys.argv[5])
    assert os.waitpid(child(model, text, output.with_name("whole")), 0)[1] == 0
    done: list[int] = []
    while len(done) < kills:
        pid = child(model, text, output)
        goal = steps(output) + chance.randint(3, 8)
        while steps(output) < goal and not exited(pid):
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))  # somewhere in the step or the checkpoint behind it
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            done.append(steps(output))
        else:
            assert status == 0
            shutil.rmtree(output)
            done.clear()
    status = os.waitpid(child(model, text, output), 0)[1]
    print(json.dumps({"killed_at": done, "status": status}))


main()
