"""What the training benchmarks share: the 1B model, policies, losses, a step."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import LLAMA_1B, llama_sizes
from torch import Tensor, nn

from optc.training.activation_checkpointing import CheckpointingConfig, apply_activation_checkpointing
from optc.training.chunked_head import loss_of
from optc.training.compile import CompileConfig, apply_compile
from optc.training.config import DataConfig, OptimizerConfig, TrainConfig
from optc.training.data import Batch
from optc.training.fp8_linears import apply_fp8
from optc.training.settings import Fp8Config
from optc.training.setup import prepare
from optc.training.step import train_step
from optc.training.world import World

SHAPES = {
    "1b": LLAMA_1B,
    "tiny": llama_sizes(layers=3, hidden=128, heads=4, kv_heads=1, mlp=512, vocab=512),  # a rehearsal
}
POLICIES = {
    "none": CheckpointingConfig(),
    "full": CheckpointingConfig(policy="full"),
    "every second block": CheckpointingConfig(policy="every-n", every_n=2),
    "keep matmul, attention": CheckpointingConfig(policy="selective", keep=("matmul", "attention")),
    "keep narrow-matmul, attention": CheckpointingConfig(policy="selective"),
    "keep attention": CheckpointingConfig(policy="selective", keep=("attention",)),
}


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def llama_config(shape: str, layers: int | None = None) -> Any:
    """The shape as transformers has it."""
    from transformers import LlamaConfig

    sizes = SHAPES[shape] if layers is None else {**SHAPES[shape], "num_hidden_layers": layers}
    return LlamaConfig(
        **sizes,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
        architectures=["LlamaForCausalLM"],
    )


def random_model(shape: str, place: torch.device, layers: int | None = None) -> Any:
    """A Llama of the shape with random fp32 weights, made on the device."""
    from transformers import LlamaForCausalLM

    config = llama_config(shape, layers)
    torch.manual_seed(0)
    with place:
        model = LlamaForCausalLM(config)
    return model.train()


def twin(model: Any) -> Any:
    """The same modules anew, over the same parameters: every contender trains the same weights."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def prepared(model: Any, policy: CheckpointingConfig, scope: str, budget: float = 1.0, fp8: bool = False) -> Any:
    """The twin of a model with a checkpointing policy, compiled, as `optc train` orders it."""
    found, _ = apply_fp8(twin(model), Fp8Config(enabled=fp8), device())
    found = apply_activation_checkpointing(found, policy)
    return apply_compile(found, CompileConfig(scope=scope, activation_budget=budget))  # type: ignore[arg-type]


def batch(shape: str, rows: int, length: int, place: torch.device) -> dict[str, Tensor]:
    """Random tokens."""
    tokens = torch.randint(0, SHAPES[shape]["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens.to(place), "labels": tokens.roll(-1, 1).to(place)}


def chunked_loss(model: Any, data: dict[str, Tensor], *, compiled: bool) -> Tensor:
    """Mean loss without whole logits, as `optc train` makes it."""
    config = TrainConfig(compile=CompileConfig(scope="blocks" if compiled else "none"))
    tokens = Batch(data["input_ids"], data["input_ids"], data["labels"], packed=False, padded=False)
    found = loss_of(model, tokens, config, head=model.get_output_embeddings(), teacher=None)
    return found.total / tokens.labels.numel()


def plain_loss(model: Any, data: dict[str, Tensor]) -> Tensor:
    """Mean loss as most training loops compute it: whole logits, cross-entropy in fp32."""
    logits = model(input_ids=data["input_ids"]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), data["labels"].flatten())


def autocast(place: torch.device, enabled: bool = True) -> torch.autocast:
    """bf16 over fp32 weights."""
    return torch.autocast(place.type, dtype=torch.bfloat16, enabled=enabled)


def make_step(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, place: torch.device) -> Callable[[], float]:
    """A function that does one whole step (loss in bf16 autocast, backward, clip, AdamW) and returns its seconds."""
    parameters = [item for group in optimizer.param_groups for item in group["params"]]

    def step() -> float:
        synchronize()
        begin = time.perf_counter()
        with autocast(place):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize()
        return time.perf_counter() - begin

    return step


def product_step(shape: str, rows: int, length: int, folder: Path) -> Callable[[], float]:
    """A whole step of `optc train` (its data, loss, clipping, log record), and its seconds; weights of its own."""
    llama_config(shape).save_pretrained(folder)
    tokens = torch.randint(
        3, SHAPES[shape]["vocab_size"], (64 * length + 1,), generator=torch.Generator().manual_seed(0)
    )
    (folder / "text.jsonl").write_text(json.dumps({"tokens": tokens.tolist()}) + "\n")
    run = prepare(
        TrainConfig(
            model=str(folder),
            from_scratch=True,
            batch_size=rows,
            seq_len=length,
            precision="bf16",
            data=DataConfig(text=(str(folder / "text.jsonl"),), append_eos=False),
            optimizer=OptimizerConfig(lr=1e-6),
            compile=CompileConfig(scope="blocks"),
        ),
        World(),
    )

    def step() -> float:
        synchronize()
        begin = time.perf_counter()
        train_step(run, last_good=None)
        synchronize()
        return time.perf_counter() - begin

    return step
