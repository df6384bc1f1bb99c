"""What every lossy pass costs, in the gate's own measures: the numbers that the passes' budgets stand on.

    python benchmarks/pass_drift.py                                     # the example model and random ones
    python benchmarks/pass_drift.py --model ../shared/models/fiction-26m --only rtn,fp8

Runs the recipes without the gate. One line per pass: its drift from the stage before, and that stage's from the
capture, on the built-in passage (random tokens where there is no tokenizer).
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from common import ROOT, record

EXAMPLE = ROOT / "examples" / "fiction-3m"
RANDOM = ("random-wide", "random-large", "random-deep")
"""Random Llamas: as transformers makes them (a nearly flat distribution), with weights four times as large, and with 22
layers."""

Recipe = tuple[str, dict[str, Any]]
RECIPES: dict[str, Recipe] = {
    **{
        f"{method}-{bits}{'' if symmetric else '-asym'}": (
            "onnx-cpu" if bits in (4, 8) else "vllm",
            {
                "quant": method,
                "bits": bits,
                "symmetric": symmetric,
                **({} if bits in (4, 8) else {"layout": "gptq"}),
            },
        )
        for method in ("rtn", "gptq")
        for bits in (8, 4, 3, 2)
        for symmetric in (True, False)
    },
    "head-8": ("onnx-cpu", {"head_bits": 8}),
    "head-8-asym": ("onnx-cpu", {"quant": "rtn", "symmetric": False}),
    "head-4": ("onnx-cpu", {"head_bits": 4}),
    "head-4-asym": ("onnx-cpu", {"quant": "rtn", "symmetric": False, "head_bits": 4}),
    "rtn-4-channel": ("vllm", {"quant": "rtn", "group_size": 0}),
    "rtn-8-channel": ("vllm", {"quant": "rtn", "bits": 8, "group_size": 0}),
    "awq-4": ("onnx-cpu", {"quant": "awq"}),
    "awq-3": ("vllm", {"quant": "awq", "bits": 3, "layout": "gptq"}),
    "awq+gptq-4": ("vllm", {"quant": "awq+gptq"}),
    "best-4": ("vllm", {"quant": "best"}),
    "best-3": ("vllm", {"quant": "best", "bits": 3, "layout": "gptq"}),
    "best-2": ("vllm", {"quant": "best", "bits": 2, "layout": "gptq"}),
    "auto-4": ("onnx-cpu", {"quant": "auto"}),
    "auto-2.5": ("onnx-cpu", {"quant": "auto", "average_bits": 2.5}),
    "auto-6": ("onnx-cpu", {"quant": "auto", "average_bits": 6}),
    "int8": ("onnx-cpu", {"quant": "int8"}),
    "int8-inductor": ("inductor-cpu", {"quant": "int8"}),
    "rtn-4-inductor": ("inductor-cpu", {"quant": "rtn"}),
    "smoothquant": ("onnx-cpu", {"quant": "smoothquant"}),
    "llm-int8": ("inductor-cpu", {"quant": "llm-int8"}),
    "fp8": ("vllm", {"quant": "fp8"}),
    "fp8-inputs": ("trtllm", {"quant": "fp8", "kv_cache_dtype": "fp8", "dtype": "bf16"}),
    "nf4": ("inductor-cpu", {"quant": "nf4"}),
    "nvfp4": ("vllm", {"quant": "nvfp4"}),
    "rtn-4-xnnpack": ("executorch", {"quant": "rtn"}),
    "int8-xnnpack": ("executorch", {"quant": "int8"}),
    "kv-int8-layer": ("", {"format": "int8", "granularity": "layer"}),
    "kv-int8-head": ("", {"format": "int8", "granularity": "head"}),
    "kv-int8-channel": ("", {"format": "int8", "granularity": "channel"}),
    "kv-fp8-layer": ("", {"format": "fp8", "granularity": "layer"}),
    "kv-fp8-head": ("", {"format": "fp8", "granularity": "head"}),
}


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to measure on: its capture, what the gate would feed, and calibration tokens."""

    program: Any
    probe: Any
    calibration: Any


def subject(model: str, samples: int, length: int) -> Subject:
    """A model folder, or one of the random models."""
    from optc.calibrating import make_calibration
    from optc.compiler.calibration.sequences import random_calibration
    from optc.compiler.capture import capture_model, capture_pretrained
    from optc.compiler.execution.probe import random_probe, text_probe
    from optc.request import from_python
    from optc.runtime.generation.tokenizer import load_tokenizer

    if model not in RANDOM:
        program, info = capture_pretrained(Path(model), dtype="fp32")
        request = from_python("vllm", calibration_samples=samples, calibration_seq_len=length)
        tokenizer = load_tokenizer(info.path)
        assert tokenizer is not None, f"{model} has no tokenizer"
        passage = (resources.files("optc.compiler") / "data" / "passage.txt").read_text()
        probe = text_probe(tokenizer.encode(passage))
        return Subject(program, probe, make_calibration(program, info, request))
    program = capture_model(random_model(model))
    vocabulary = program.contract.model.vocab_size
    tokens = random_calibration(vocabulary, samples=samples, length=length, seed=0)
    return Subject(program, random_probe(vocabulary), tokens)


def random_model(name: str) -> torch.nn.Module:
    """A Llama with random weights, of width 256."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        num_hidden_layers=22 if name == "random-deep" else 4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=768,
        vocab_size=8192,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1 and name == "random-large":
            parameter.mul_(4.0)
    return model


def steps_of(recipe: Recipe, kind: str) -> list[Any]:
    """The passes of a recipe."""
    from optc.compiler.target.target import Step
    from optc.passes.kv_cache.quantize import QuantizeKVCache
    from optc.request import from_python
    from optc.resolving import recipe_steps, resolve

    target, options = recipe
    if not target:
        return [Step(QuantizeKVCache(**options))]
    return recipe_steps(resolve(from_python(target, **options)), kind)


def drifts(subject: Subject, steps: Sequence[Any]) -> Iterator[tuple[Any, Any, Any]]:
    """(pass, drift from the stage before, drift from the capture) of each pass that matched and has a budget."""
    from optc.compiler.execution.drift import measure
    from optc.compiler.execution.probe import run_probe
    from optc.compiler.pipeline.gate import rounds_activations
    from optc.compiler.rewriting.passes import PassContext

    program, first = subject.program, run_probe(subject.program, subject.probe)
    before, reference = first, None
    for step in steps:
        if not step.applies(program):
            continue
        reference = program if reference is None and step.rewrite.lossy else reference
        rounding = rounds_activations(program)
        context = PassContext(calibration=subject.calibration, reference=reference)
        result = step.rewrite.run(program, context)
        if not result.matched:
            continue
        program = result.program
        after = run_probe(program, subject.probe)
        if step.rewrite.lossy or rounding:
            yield (
                step.rewrite,
                measure(before, after, subject.probe.text),
                measure(first, after, subject.probe.text),
            )
        before = after


def row(recipe: str, rewrite: Any, step: Any, total: Any) -> dict[str, Any]:
    """One line of the table."""

    def short(drift: Any) -> dict[str, Any]:
        table = {name: getattr(drift, name) for name in ("kl", "top1", "perplexity", "relative", "cosine")}
        lead = 4 * max(drift.kl, 0.0) ** 0.5
        decided = drift.decided(lead)
        return {key: None if value is None else round(value, 6) for key, value in table.items()} | {
            "decided": decided[0],
            "decided_top1": round(decided[1], 4),
            "flatness": round(drift.flatness, 3),
        }

    return {"recipe": recipe, "pass": rewrite.name, "step": short(step), "total": short(total)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help=f"model folder, or one of {', '.join(RANDOM)} (repeatable)")
    parser.add_argument("--only", default="", help="recipes whose name starts with one of these, by comma")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/pass_drift.json")
    args = parser.parse_args()
    wanted = tuple(args.only.split(",")) if args.only else ("",)
    rows = []
    for model in args.model or (str(EXAMPLE), *RANDOM):
        measured = subject(model, args.samples, args.length)
        for name, recipe in RECIPES.items():
            if not name.startswith(wanted):
                continue
            begin = time.perf_counter()
            for found in drifts(measured, steps_of(recipe, measured.program.contract.kind)):
                rows.append({"model": Path(model).name, **row(name, *found)})
                step, total = rows[-1]["step"], rows[-1]["total"]
                print(
                    f"{Path(model).name:12} {name:15} {rows[-1]['pass']:20} "
                    + "  |  ".join(
                        f"kl {part['kl']:8.5f} top1 {part['top1']:.3f} ({part['decided_top1']:.3f} of {part['decided']:3d})"
                        f" rel {part['relative']:.4f} cos {part['cosine']:.5f} ppl {part['perplexity'] or 0.0:+.4f}"
                        for part in (step, total)
                    )
                    + f"  {time.perf_counter() - begin:.0f} s",
                    flush=True,
                )
    if args.record:
        record("pass_drift", {"rows": rows}, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
