"""Several runs of `optc train`, one after another in the processes of one group: see test_ranks.py.

Arguments: the runs' own as JSON, and "cuda" for a group of GPUs.
"""

from __future__ import annotations

import json
import os
import shutil
import sys

import torch
import torch.distributed as dist

from optc.cli.main import main as optc
from optc.training.parallel import ParallelConfig, start_processes


def main() -> None:
    kind = sys.argv[2] if len(sys.argv) > 2 else "cpu"
    device = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    start_processes(device, ParallelConfig())  # so that no run ends the group
    for arguments in json.loads(sys.argv[1]):
        if dist.get_rank() == 0:  # what a run published that this one resumes
            shutil.rmtree(arguments[arguments.index("-o") + 1], ignore_errors=True)
        dist.barrier()
        try:
            optc(["train", *arguments])
        except SystemExit as done:
            if done.code:
                raise
        dist.barrier()  # the first rank may still be writing
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
