"""`torch.compile(backend="optc")` against `backend="inductor"` and eager on the CPU, warm and interleaved, random weights.

    python benchmarks/torch_compile_backend.py                # models of transformers, torchvision and timm; int8 on 115M
    python benchmarks/torch_compile_backend.py --models bert llama-tiny --rounds 10

torchvision and timm are no requirement of optc: `pip install --target SITE --no-deps torchvision timm`, and SITE on
PYTHONPATH.

Ratios are rounds of inductor's time over optc's: above 1 optc is faster. Compiling takes most of the time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import DECODER_115M, OPEN_GATE, interleave, llama_sizes, ratio, record
from picture_models import LIBRARIES, picture_model, ready_torchvision
from picture_models import MODELS as PICTURE_MODELS
from torch import Tensor, nn

Forward = Callable[[], Tensor]
CACHE = 256
"""Tokens that a static cache of the decode step holds."""


def vision(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """ResNet-50 or ViT-B on one picture."""
    from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

    model: nn.Module = (
        ResNetForImageClassification(ResNetConfig(num_labels=1000))
        if kind == "resnet-50"
        else ViTForImageClassification(ViTConfig(num_labels=1000))
    )
    return model, {"pixel_values": torch.randn(1, 3, 224, 224)}


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    """BERT-base on one row of 128 tokens, padded."""
    from transformers import BertConfig, BertModel

    mask = torch.ones(1, 128, dtype=torch.int64)
    mask[:, 100:] = 0
    return BertModel(BertConfig()), {"input_ids": torch.randint(0, 30000, (1, 128)), "attention_mask": mask}


def llama(**sizes: int) -> nn.Module:
    """A random Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**llama_sizes(**sizes), max_position_embeddings=2048))


def tiny_llama() -> tuple[nn.Module, dict[str, Any]]:
    """Two layers on a prompt of 64 tokens."""
    model = llama(layers=2, hidden=256, heads=4, kv_heads=2, mlp=512, vocab=512)
    return model, {"input_ids": torch.randint(0, 512, (1, 64)), "use_cache": False}


class DecodeStep(nn.Module):
    """One token against a static cache, which it writes into at the place that it is given."""

    def __init__(self, model: Any) -> None:
        from transformers import StaticCache

        super().__init__()
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=CACHE)
        self.cache.early_initialization(
            batch_size=1,
            num_heads=model.config.num_key_value_heads,
            head_dim=model.config.hidden_size // model.config.num_attention_heads,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(CACHE // 2)  # every call is the same step
        out = self.model(input_ids=input_ids, position_ids=position_ids, past_key_values=self.cache, use_cache=True)
        logits: Tensor = out.logits
        return logits


def decode_115m() -> tuple[nn.Module, dict[str, Tensor]]:
    """A decode step of 115M parameters, batch 1."""
    ids, positions = torch.randint(0, 24576, (1, 1)), torch.zeros(1, 1, dtype=torch.int64)
    return DecodeStep(llama(**DECODER_115M)), {"input_ids": ids, "position_ids": positions}


def of_library(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model of torchvision or timm, whose only input is called `x`."""
    model, picture = picture_model(name)
    return model, {"x": picture}


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, dict[str, Any]]], dict[str, dict[str, Any] | None]]] = {
    "bert": (bert, {"optc": None}),
    "resnet-50": (lambda: vision("resnet-50"), {"optc": None}),
    "llama-tiny": (tiny_llama, {"optc": None}),
    "llama-115m-decode": (
        decode_115m,
        {"optc": None, "optc int8": {"quant": "int8", "max_relative_error": OPEN_GATE["max_relative_error"]}},
    ),
    "vit-b": (lambda: vision("vit-b"), {"optc": None}),
    **{name: (partial(of_library, name), {"optc": None}) for name in PICTURE_MODELS},
}
"""Model and example inputs, and the options of each build by optc."""
BY_DEFAULT = [name for name in MODELS if name not in ("swin-t", "mixer-s", "deit-s")]
"""The others take time, and are of kinds that are there already."""


def first_tensor(output: Any) -> Tensor:
    """The logits or hidden states of an output of transformers."""
    return output if isinstance(output, Tensor) else output[0]


def measure(name: str, rounds: int, repeats: int) -> dict[str, Any]:
    """Seconds of each contender, ratios, differences from eager."""
    torch.manual_seed(0)
    make, builds = MODELS[name]
    model, inputs = make()
    model = model.eval().requires_grad_(False)
    wanted = {"inductor": ("inductor", None), **{build: ("optc", options) for build, options in builds.items()}}
    with torch.inference_mode():
        expected = first_tensor(model(**inputs)).clone()
    calls: dict[str, Callable[[], Any]] = {"eager": lambda: model(**inputs)}
    compiled: dict[str, float] = {}
    errors: dict[str, float] = {}
    for label, (backend, options) in wanted.items():
        call = build(model, backend, options)
        begin = time.perf_counter()
        with torch.inference_mode():
            found = first_tensor(call(**inputs))
        compiled[label] = round(time.perf_counter() - begin, 1)
        errors[label] = float((found - expected).abs().max() / expected.abs().max())
        calls[label] = lambda call=call: call(**inputs)  # type: ignore[misc]

    def timed(call: Callable[[], Any]) -> Callable[[], float]:
        def once() -> float:
            with torch.inference_mode():
                begin = time.perf_counter()
                for _ in range(repeats):
                    call()
                return (time.perf_counter() - begin) / repeats

        return once

    seconds = interleave({label: timed(call) for label, call in calls.items()}, rounds, warmup=2)
    torch._dynamo.reset()
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "compile_seconds": compiled,
        "largest_difference_from_eager": errors,
        "milliseconds": {label: 1e3 * ratio(row, [1.0] * len(row))["median"] for label, row in seconds.items()},
        "inductor_over": {label: ratio(seconds["inductor"], seconds[label]) for label in builds},
        "eager_over": {label: ratio(seconds["eager"], seconds[label]) for label in builds},
    }


def build(model: nn.Module, backend: str, options: dict[str, Any] | None) -> Callable[..., Any]:
    """A compiled forward with code objects of its own: contenders do not share Dynamo's cache."""
    shell = type("Shell", (nn.Module,), {"forward": lambda self, **inputs: self.inner(**inputs)})()
    shell.inner = model
    compiled: Callable[..., Any] = torch.compile(shell, backend=backend, options=options, dynamic=False)
    return compiled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=BY_DEFAULT)
    parser.add_argument("--rounds", type=int, default=14)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ready_torchvision()
    import optc  # noqa: F401  (registers the name)

    found: dict[str, Any] = {}
    goals: dict[str, bool] = {}
    for name in arguments.models:
        found[name] = measure(name, arguments.rounds, arguments.repeats)
        for build, row in found[name]["inductor_over"].items():
            least = 1.0 if build == "optc" else 1.5
            goals[f"{name}, {build}: at least {least} of inductor's speed in fp32"] = row["median"] >= least
        record(
            "torch_compile_backend",
            {"libraries": LIBRARIES, "models": found, "goals": goals},
            arguments.threads,
        )  # one by one: it takes long


if __name__ == "__main__":
    main()
