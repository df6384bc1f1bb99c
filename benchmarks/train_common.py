"""What the training benchmarks share: the 1B model, policies, losses, a step."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from optc.training.activation_checkpointing import CheckpointingConfig, apply_activation_checkpointing
from optc.training.compile import CompileConfig, apply_compile
from optc.training.linear_cross_entropy import linear_cross_entropy

SHAPES = {  # Llama 3.2 1B; a rehearsal
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
           "intermediate_size": 8192, "vocab_size": 128256},
    "tiny": {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1,
             "intermediate_size": 512, "vocab_size": 512},
}  # fmt: skip
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


def random_model(shape: str, place: torch.device, layers: int | None = None) -> Any:
    """A Llama of the shape with random fp32 weights, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = SHAPES[shape] if layers is None else {**SHAPES[shape], "num_hidden_layers": layers}
    config = LlamaConfig(
        **sizes, max_position_embeddings=8192, tie_word_embeddings=True, use_cache=False,
        attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    with place:
        model = LlamaForCausalLM(config)
    return model.train()


def twin(model: Any) -> Any:
    """The same modules anew, over the same parameters: every contender trains the same weights."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def prepared(model: Any, policy: CheckpointingConfig, scope: str, budget: float = 1.0) -> Any:
    """The twin of a model with a checkpointing policy, compiled, as `optc train` orders it."""
    found = apply_activation_checkpointing(twin(model), policy)
    return apply_compile(found, CompileConfig(scope=scope, activation_budget=budget))  # type: ignore[arg-type]


def batch(shape: str, rows: int, length: int, place: torch.device) -> dict[str, Tensor]:
    """Random tokens."""
    tokens = torch.randint(
        0, SHAPES[shape]["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(0)
    )
    return {"input_ids": tokens.to(place), "labels": tokens.roll(-1, 1).to(place)}


def chunked_loss(model: Any, data: dict[str, Tensor], *, compiled: bool) -> Tensor:
    """Mean loss without whole logits."""
    hidden = model.model(input_ids=data["input_ids"]).last_hidden_state.flatten(0, 1)
    labels = data["labels"].flatten()
    return linear_cross_entropy(hidden, model.lm_head.weight, labels, compiled=compiled) / labels.numel()


def plain_loss(model: Any, data: dict[str, Tensor]) -> Tensor:
    """Mean loss as most training loops compute it: whole logits, cross-entropy in fp32."""
    logits = model(input_ids=data["input_ids"]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), data["labels"].flatten())


def autocast(place: torch.device, enabled: bool = True) -> torch.autocast:
    """bf16 over fp32 weights."""
    return torch.autocast(place.type, dtype=torch.bfloat16, enabled=enabled)


def make_step(
    loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, place: torch.device
) -> Callable[[], float]:
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
