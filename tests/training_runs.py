"""Small runs for the tests of training: a random Llama of two layers, token files, configs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from optc.training.config import TrainConfig
from optc.training.data import IGNORED, Batch
from optc.training.loop import train
from optc.training.recipe import convert

VOCAB = 64


def small_model(folder: Path, *, seed: int = 0, dropout: float = 0.0, layers: int = 2, vocabulary: int = VOCAB) -> Path:
    """Write a random Llama with a hidden size of 16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=vocabulary,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=True,
        attention_dropout=dropout,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def token_file(path: Path, *, lengths: tuple[int, ...] = (40, 7, 23, 64, 3, 31, 50, 12, 18, 28), seed: int = 0) -> Path:
    """Write documents of random tokens, each a pattern that repeats, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        pattern = torch.randint(3, VOCAB, (5,), generator=generator).tolist()
        rows.append(json.dumps({"tokens": (pattern * length)[:length]}))
    path.write_text("\n".join(rows) + "\n")
    return path


def small_config(model: Path, text: Path, output: Path, **more: Any) -> TrainConfig:
    """A run of a few fast steps on the CPU."""
    tree = {
        "model": str(model),
        "output": str(output),
        "max_steps": 6,
        "batch_size": 4,
        "seq_len": 32,
        "device": "cpu",
        "data": {"text": [str(text)]},
        "optimizer": {"lr": 1e-2},
        "saving": {"every": 2},
    }
    for key, value in more.items():
        tree[key] = {**tree[key], **value} if isinstance(tree.get(key), dict) else value  # type: ignore[dict-item]
    return convert(tree, where="test")


def torchrun(processes: int, script: Path | str, *arguments: object, timeout: float = 1800) -> None:
    """Run a script (or -m MODULE) in gloo processes of one thread each, or as many as the tests are told to use."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    _python(*launcher, script, *arguments, timeout=timeout)


def ranks(processes: int | str, script: Path, *arguments: object, timeout: float = 1800) -> None:
    """As `torchrun` with a script, in forks: a start costs what one process costs. "2,4" is two groups, one after another."""
    _python(Path(__file__).with_name("forked_ranks.py"), processes, script, *arguments, timeout=timeout)


def _python(*command: object, timeout: float) -> None:
    source = Path(__file__).resolve().parents[1] / "src"
    path = os.pathsep.join(filter(None, [str(source), os.environ.get("PYTHONPATH")]))
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": os.environ.get("OPTC_TESTS_THREADS") or "1",
    }
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-4000:]


def interrupted(config: TrainConfig, step: int) -> None:
    """Run, and stop as hard as one process can stop itself."""

    class Stop(BaseException):
        pass

    def on_step(record: Any) -> None:
        if record.step == step:
            raise Stop

    with pytest.raises(Stop):
        train(config, on_step=on_step)


def packed() -> Batch:
    """A row of two documents, of 7 tokens and of 5, and a row of one with padding."""
    tokens = torch.randint(3, VOCAB, (2, 13), generator=torch.Generator().manual_seed(2))
    positions = torch.stack([torch.tensor([*range(7), *range(5)]), torch.arange(12)])
    labels = tokens[:, 1:].clone()
    labels[0, 6] = 5  # the last token of a document is not fed
    labels[1, 9:] = IGNORED
    return Batch(tokens[:, :-1], positions, labels, packed=True, padded=True)
