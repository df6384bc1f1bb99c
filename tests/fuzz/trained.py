"""Checkpoints of training runs of several processes, here of one."""

from __future__ import annotations

import json
import random
import shutil
from typing import Any

from fuzz.readers import Input
from fuzz.whole import FolderReader, mutated_file, stepped


class ShardedCheckpoint(FolderReader):
    """A checkpoint in shards: its state, its tensors, and its hashes, which are right for what it holds."""

    cost = 60.0

    def prepare(self) -> None:
        import torch.distributed as dist

        from optc.training.sharded_checkpoint import save_sharded

        self._model, optimizer = stepped()
        made = self.place / "made"
        shutil.rmtree(made, ignore_errors=True)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        save_sharded(made, self._model, optimizer, {"step": 1})
        dist.destroy_process_group()  # ranks give each other plans as pickles, which are none of the file's
        self.copy_of(made, "step-00000001")
        self.sound = {name: data for name, data in self.sound.items() if name.startswith("step-")}

    def make(self, rng: random.Random) -> Input:
        name = rng.choice(sorted(name for name in self.sound if not name.endswith("SHA256SUMS")))
        return name, mutated_file(name, self.sound[name], rng)

    def read(self, name: str, data: bytes) -> None:
        import torch

        from optc.training.sharded_checkpoint import load_sharded

        self.replace(name, data)
        optimizer = torch.optim.AdamW(self._model.parameters())
        found: dict[str, Any] = load_sharded(self.place / "step-00000001", self._model, optimizer)
        json.dumps(found)
