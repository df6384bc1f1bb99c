"""Writers of training, for the campaign against the disk: checkpoints of each layout, and whole runs that are resumed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from fuzz.seeds import Seeds
from fuzz.writer import Kind, Writer, sums_state, unless_there


def _stepped() -> tuple[Any, Any]:
    """(model, optimizer) behind one step."""
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    return model, optimizer


def checkpoint_writer(seeds: Seeds, work: Path) -> Writer:
    """A checkpoint of a training run; there is no old one in its place."""
    from optc.training import checkpoint
    from optc.training.data import Position

    del seeds, work
    model, optimizer = _stepped()
    given = checkpoint.RunState(step=1, position=Position(), model="m", corpus="c", config={}, run="r")

    def state(folder: Path) -> str:
        checkpoint.check_whole(folder)
        return sums_state(folder)

    def write(place: Path) -> None:
        assert checkpoint.folder_of(place.parent.parent, 1) == place
        checkpoint.save(place.parent.parent, given, model, optimizer)

    return Writer(write, state, again=unless_there(write), name="checkpoints/step-00000001")


def sharded_writer(seeds: Seeds, work: Path) -> Writer:
    """A checkpoint of a run of several processes, here of one."""
    import torch.distributed as dist

    from optc.training.sharded_checkpoint import save_sharded

    del seeds, work
    model, optimizer = _stepped()

    def write(place: Path) -> None:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        save_sharded(place, model, optimizer, {"step": 1})

    return Writer(write, _whole_state, again=unless_there(write), name="checkpoints/step-00000001")


def deepspeed_writer(seeds: Seeds, work: Path) -> Writer:
    """A checkpoint of a run with DeepSpeed, of one process."""
    import torch
    import torch.distributed as dist

    from optc.training.deepspeed_checkpoint import save_deepspeed
    from optc.training.deepspeed_zero import backward, connect
    from optc.training.settings import ParallelConfig

    del seeds, work
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # as torchrun does
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64))

    def group() -> None:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    group()
    called, optimizer = connect(model, torch.optim.AdamW(model.parameters()), ParallelConfig(kind="deepspeed"))
    backward(called, called(torch.ones(2, 64)).sum(), last=True)
    optimizer.step()
    dist.destroy_process_group()  # its threads do not live on in forks

    def write(place: Path) -> None:
        group()
        save_deepspeed(place, model, optimizer, {"step": 1})

    return Writer(write, _whole_state, again=unless_there(write), name="checkpoints/step-00000001")


def _whole_state(folder: Path) -> str:
    from optc.compiler.files import damage

    why = damage(folder)
    assert why is None, why
    return sums_state(folder)


def trainer(**more: Any) -> Kind:
    """`optc train --resume`: log, checkpoints, the model folder, and the run's folder that goes in the end.

    Args:
        more: keys of the config.
    """

    def make(seeds: Seeds, work: Path) -> Writer:
        from training_runs import small_config, small_model, token_file

        from optc.training.loop import train

        del seeds
        work.mkdir(parents=True, exist_ok=True)
        model, text = small_model(work / "model"), token_file(work / "text.jsonl")

        def write(place: Path) -> None:
            train(small_config(model, text, place, max_steps=5, saving={"every": 2}, **more), resume=True)

        def state(folder: Path) -> str:
            losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
            weights = {
                path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")
            }
            json.loads((folder / "train.json").read_text())
            return json.dumps([losses, sorted(weights.items()), sorted(path.name for path in folder.iterdir())])

        write(work / "first" / "output")  # imports
        return Writer(write, state, kept=("output.run",))

    return Kind(make, light=True)
