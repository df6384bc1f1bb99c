"""Runs a script in processes of one group, with what torchrun puts into their environment; they are forks, so that torch,
transformers and (where an argument names it) DeepSpeed are imported once.

Arguments: numbers of processes, one for each group ("2" or "2,4": one after the other), script, its arguments. Ends with
1 as soon as a process fails, and ends the others.
"""

from __future__ import annotations

import os
import runpy
import signal
import socket
import sys

import torch

# Imported before the forks; no tensor is touched before them, which threads would not survive.
import transformers.models.auto.modeling_auto
import transformers.models.auto.tokenization_auto
import transformers.models.llama.modeling_llama  # noqa: F401

import optc.training.loop  # noqa: F401

if any("deepspeed" in word for word in sys.argv):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as optc.training.deepspeed_zero does
    import deepspeed

    # Gloo alone: DeepSpeed's all-reduce in shared memory is C++ that is compiled at first use, for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def start(rank: int, size: int, port: int) -> int:
    """The process id of a rank."""
    pid = os.fork()
    if pid:
        return pid
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in numbers.items()}})
    status = 1
    try:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as done:
        status = int(done.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(size: int) -> None:
    """One group, up to its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    left = {start(rank, size, port) for rank in range(size)}
    while left:
        pid, status = os.wait()
        left.discard(pid)
        if status:
            for other in left:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)


def main() -> None:
    sizes = sys.argv[1].split(",")
    sys.argv = sys.argv[2:]
    sys.path[0] = os.path.dirname(sys.argv[0])
    for size in sizes:
        run(int(size))


if __name__ == "__main__":
    main()
