"""Wall time of quantizing a large random model on one GPU, and what of it is forced by arithmetic.

    python benchmarks/gpu_quantize.py --method gptq             # Llama-3-8B shape, 128 x 2048 tokens
    python benchmarks/gpu_quantize.py --method awq --layers 4   # a quick look

Random weights: this shows speed and memory, not quality. The floor is one forward over the calibration tokens and
the Gram matrices at the measured rate of bf16 and TF32 products; a GPTQ that ran calibration inputs through every
block before and after rounding it would need two forwards.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from common import LLAMA_8B, LLAMA_SMALL, record

SHAPES = {"8b": LLAMA_8B, "tiny": LLAMA_SMALL}


def random_program(shape: str, layers: int | None, device: torch.device) -> Any:
    """A captured bf16 Llama whose random weights were made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from optc.compiler.capture import capture_model
    from optc.compiler.ir.devices import to_device
    from optc.compiler.rewriting.passes import PassContext
    from optc.passes.fusion.norm import FuseNorm
    from optc.passes.fusion.rotary import FuseRotary

    sizes = dict(SHAPES[shape])
    sizes["num_hidden_layers"] = layers or sizes["num_hidden_layers"]
    config = LlamaConfig(**sizes, max_position_embeddings=8192, tie_word_embeddings=False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    program = capture_model(model)
    for rewrite in (FuseRotary(), FuseNorm()):
        program = rewrite.run(program, PassContext()).program
    generator = torch.Generator(device).manual_seed(0)
    table = program.exported.state_dict
    for name, _ in list(program.weights()):
        old = program.weight(name)
        if old.dtype != torch.bfloat16:
            continue
        new = torch.empty(old.shape, dtype=old.dtype, device=device)
        new = new.fill_(1.0) if old.dim() == 1 else new.normal_(0, 0.02, generator=generator)
        table[name] = torch.nn.Parameter(new, requires_grad=False)
    return to_device(program, device)


class Clock:
    """Seconds per part, with the device idle at both ends of each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            _synchronize()
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                _synchronize()
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

        return run


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of a large matrix product (float32 with TF32)."""
    from optc.compiler.ir.devices import tensor_float_32

    size = 8192 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device).to(dtype)
    with tensor_float_32():
        times = []
        for _ in range(6):
            _synchronize()
            begin = time.perf_counter()
            a @ a
            _synchronize()
            times.append(time.perf_counter() - begin)
    return 2 * size**3 / sorted(times)[len(times) // 2]


def main() -> None:
    """Quantize, print and record the breakdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="gptq", choices=["gptq", "awq"])
    parser.add_argument("--shape", default="8b", choices=list(SHAPES))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    arguments = parser.parse_args()
    from optc.compiler.analysis.linears import head_linear, linear_sites
    from optc.compiler.calibration.sequences import random_calibration
    from optc.compiler.rewriting.passes import PassContext
    from optc.compiler.target.options import QuantRequest
    from optc.passes.quantization.arithmetic import calibrated, scale_pass
    from optc.passes.quantization.arithmetic.stream import Stream
    from optc.targets.methods import choose_quantization, quantization_steps

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = Clock()
    program = clock.timed("capture and weights", random_program)(arguments.shape, arguments.layers, device)
    vocabulary = program.contract.model.vocab_size
    tokens = random_calibration(vocabulary, samples=arguments.samples, length=arguments.seq_len, seed=0)
    context = PassContext(calibration=tokens)
    Stream.advance = clock.timed("forward", Stream.advance)  # type: ignore[method-assign]
    calibrated.gram_matrix = clock.timed("Gram matrices", calibrated.gram_matrix)
    steps = quantization_steps(choose_quantization(QuantRequest(quant=arguments.method, group_size=128)))
    for step in steps:
        kind = type(step.rewrite)
        for name, label in (("round_group", "rounding"), ("choose", "scale search with its Gram matrices")):
            if hasattr(kind, name):
                setattr(kind, name, clock.timed(label, getattr(kind, name)))
    del scale_pass
    head = head_linear(program)
    sites = [site for site in linear_sites(program) if site.node is not head]
    rows = arguments.samples * arguments.seq_len
    sizes = [tuple(program.weight(program.weight_of(site.placeholder)).shape) for site in sites]
    inputs = {site.input: site.columns for site in sites}
    _synchronize()
    begin = time.perf_counter()
    for step in steps:
        result = step.rewrite.run(program, context)
        program = result.program
    _synchronize()
    total = time.perf_counter() - begin
    forward = 2.0 * rows * sum(n * k for n, k in sizes) / rate(device, torch.bfloat16)
    grams = 1.0 * rows * sum(k * k for k in inputs.values()) / rate(device, torch.float32)
    record(
        f"gpu_quantize_{arguments.method}_{arguments.shape}",
        {
            "method": arguments.method,
            "shape": arguments.shape,
            "layers": arguments.layers,
            "tokens": rows,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "parameters_quantized": sum(n * k for n, k in sizes),
            "seconds": total,
            "parts": clock.seconds,
            "floor_seconds": {"forward": forward, "two forwards": 2 * forward, "Gram matrices": grams},
            "peak_gpu_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
            "linears": len(sites),
            "notes": list(result.notes),
        },
        2,
    )


if __name__ == "__main__":
    main()
