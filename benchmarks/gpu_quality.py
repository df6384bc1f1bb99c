"""What a model computes on the GPU after `optc.optimize`, beside a reference: greedy tokens and perplexity.

    python benchmarks/gpu_quality.py --model ../shared/models/fiction-26m --text ../shared/text/validation.txt

The reference of `bf16` is transformers in bfloat16; that of a quantized variant is the captured program with the same
quantized weights, dequantized and run call by call by torch: what differs is what the target's passes and kernels do.
Prompts are pieces of the text. `equal` counts the tokens before the first that differs from the reference's own greedy
continuation. `margin` is how far, in logits, the reference puts its own choice above ours where they part, and
`spacing` the distance of neighbouring bfloat16 numbers there: a margin of a few spacings is a tie in that type.
`agree` counts our tokens that the reference would choose after the same ones.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import record
from gpu_timing import card
from torch import Tensor

import optc
from optc.compiler.ir.devices import to_device
from optc.compiler.pipeline.pipeline import Pipeline
from optc.compiler.rewriting.passes import Pass
from optc.optimizing import Optimized
from optc.passes.fusion.norm import FuseNorm
from optc.passes.fusion.rotary import FuseRotary
from optc.passes.quantization.activations import QuantizeActivations
from optc.passes.quantization.fp8 import QuantizeFp8
from optc.passes.quantization.head import QuantizeHead
from optc.passes.quantization.rtn import QuantizeRtn
from optc.runtime.measuring.evaluate import evaluate

GROUP = 64
_INT4 = {"quant": "rtn", "bits": 4, "group_size": GROUP}
VARIANTS: dict[str, tuple[dict[str, Any], tuple[Pass, ...]]] = {
    "bf16": ({}, ()),
    "int8": ({"quant": "int8", "head_bits": 16}, (QuantizeRtn(bits=8, group_size=0),)),
    "fp8": ({"quant": "fp8", "head_bits": 16}, (QuantizeFp8(), QuantizeActivations(format="fp8"))),
    "int4": ({**_INT4, "head_bits": 16}, (QuantizeRtn(bits=4, group_size=GROUP),)),
    "int4-head8": (_INT4, (QuantizeRtn(bits=4, group_size=GROUP), QuantizeHead(group_size=0))),
    "int4-head4": (
        {**_INT4, "head_bits": 4},
        (QuantizeRtn(bits=4, group_size=GROUP), QuantizeHead(bits=4, group_size=GROUP)),
    ),
}
"""Options of a compile, and the passes that round in the reference of its numbers."""
Reference = Callable[[list[int]], Tensor]
DEVICE = torch.device("cuda", 0)


def transformers_reference(model: Path) -> Reference:
    """transformers in bf16: tokens [n] -> logits float32 [n, V]."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval().to(DEVICE)

    def run(tokens: list[int]) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = network(input_ids=torch.tensor([tokens], device=DEVICE), use_cache=False).logits
        return logits[0].float()

    return run


def program_reference(model: Path, rounding: Sequence[Pass]) -> Reference:
    """The captured program after quantization, in bf16."""
    program = to_device(optc.capture(model, dtype="bf16"), DEVICE)
    program = Pipeline([FuseNorm(), FuseRotary(), *rounding]).run(program).program

    def run(tokens: list[int]) -> Tensor:
        places = torch.arange(len(tokens), device=DEVICE)
        logits: Tensor = program(torch.tensor([tokens], device=DEVICE), places[None])
        return logits[0].float()

    return run


def tokens_beside(ours: list[int], prompt: list[int], reference: Reference) -> dict[str, Any]:
    """How our continuation of a prompt compares with the reference."""
    forced = reference([*prompt, *ours])[len(prompt) - 1 : -1]
    agree = forced.argmax(-1).tolist()
    row: dict[str, Any] = {"agree": sum(a == b for a, b in zip(agree, ours, strict=True)), "equal": len(ours)}
    parted = next((i for i, (a, b) in enumerate(zip(agree, ours, strict=True)) if a != b), None)
    if parted is not None:  # up to here both have fed the same tokens
        logits = forced[parted]
        top = float(logits[agree[parted]])
        row |= {
            "equal": parted,
            "margin": top - float(logits[ours[parted]]),
            "spacing": 2.0 ** (math.floor(math.log2(max(abs(top), 1e-9))) - 7),
        }
    return row


def run_variant(model: Path, name: str, text: list[int], given: argparse.Namespace) -> dict[str, Any]:
    """Tokens on prompts, and perplexity on windows, of one variant."""
    options, rounding = VARIANTS[name]
    compiled: Optimized = optc.optimize(model, dtype="bf16", **options)
    reference = program_reference(model, rounding) if rounding else transformers_reference(model)
    step = len(text) // (given.prompts + 1)
    prompts = [text[i * step : i * step + 16 + i] for i in range(1, given.prompts + 1)]
    alone = [compiled.generate(row, max_new_tokens=given.tokens, ignore_eos=True).tokens for row in prompts]
    batch = [item.tokens for item in compiled.generate_batch(prompts, max_new_tokens=given.tokens, ignore_eos=True)]
    rows = [tokens_beside(ours, prompt, reference) for ours, prompt in zip(alone, prompts, strict=True)]
    quality = evaluate(compiled.session, text, lambda row: reference(list(row)).cpu(), windows=given.windows)
    assert quality.reference_perplexity is not None
    result = {
        "equal": [row["equal"] for row in rows],
        "agree": [row["agree"] for row in rows],
        "parted": [{key: row[key] for key in ("margin", "spacing")} for row in rows if "margin" in row],
        "equal_in_a_batch": [
            sum(a == b for a, b in zip(one, two, strict=True)) for one, two in zip(alone, batch, strict=True)
        ],
        "perplexity": quality.perplexity,
        "reference_perplexity": quality.reference_perplexity,
        "perplexity_ratio": quality.perplexity / quality.reference_perplexity,
        "kl": quality.kl,
        "top1": quality.top1_agreement,
    }
    compiled.close()
    print(name, {key: result[key] for key in ("equal", "agree", "perplexity_ratio", "kl", "top1")}, flush=True)
    return result


def main() -> None:
    """Compare every variant, print and record the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--windows", type=int, default=32)
    given = parser.parse_args()
    from optc.runtime.generation.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(given.model)
    assert tokenizer is not None
    text = tokenizer.encode(given.text.read_text()[: given.windows * 8000])
    variants = {name: run_variant(given.model, name, text, given) for name in given.variants}
    record("gpu_quality", {"model": given.model.name, "card": card(), "variants": variants}, 2)


if __name__ == "__main__":
    main()
