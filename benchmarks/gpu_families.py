"""Batch-1 decode of a few layers of other families' shapes with random weights on the GPU, with a ledger of each.

    python benchmarks/gpu_families.py                            # every family, 4 layers, bf16
    python benchmarks/gpu_families.py gemma2 gpt2 --layers 8 --variants bf16 int4

Shapes are those of published models but for the number of layers; weights are random, so the gate's limits are open.
`layer` has, of the first context, the kernels and microseconds of a layer, and its share of the ceiling: what its linears
and attention have to read, at the rate of the fastest streaming kernel in the same run. A head as large as Gemma's hides
a layer in the figures of a whole step of few layers.
"""

from __future__ import annotations

import argparse
import gc
import json
from typing import Any

import torch
from common import RESULTS, record
from gpu_decode import VARIANTS, run_variant
from gpu_timing import card, read_ceiling

import optc

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "gemma2": {
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "vocab_size": 256000,
    },
    "gemma3_text": {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "vocab_size": 262144,
        "max_position_embeddings": 8192,
    },
    "phi3": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32064,
    },
    "gpt2": {"n_embd": 1600, "n_head": 25, "n_positions": 1024, "vocab_size": 50257},
    "gpt_neox": {
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_attention_heads": 32,
        "vocab_size": 50432,
    },
    "granite": {
        "hidden_size": 4096,
        "intermediate_size": 12800,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 49152,
        "residual_multiplier": 0.22,
        "embedding_multiplier": 12.0,
    },
    "olmo2": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 100352,
    },
    "mixtral": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 8192,
    },
}
"""By transformers' names of model types."""


def random_model(family: str, layers: int) -> Any:
    """A model of a family in bf16 on the GPU."""
    from transformers import AutoConfig, AutoModelForCausalLM

    depth = {"n_layer" if family == "gpt2" else "num_hidden_layers": layers}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **SHAPES[family], **depth, **special)
    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


def layer_of(ledger: dict[str, Any], layers: int, ceiling: float) -> dict[str, Any]:
    """Kernels, microseconds and share of the ceiling of one layer: of the kernels whose number is a multiple of layers."""
    if "by_call" not in ledger:
        return ledger
    own = [entry for entry in ledger["by_call"].values() if entry["count"] % layers == 0]
    microseconds, size = (sum(entry[key] for entry in own) / layers for key in ("us", "bytes"))
    return {
        "kernels": ledger["kernels_per_layer"],
        "microseconds": microseconds,
        "bytes": size,
        "share_of_ceiling": size / microseconds * 1e6 / ceiling,
    }


def main() -> None:
    """Make each model, run what was asked for, print and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(SHAPES), metavar="FAMILY", help=", ".join(SHAPES))
    parser.add_argument("--variants", nargs="*", default=["bf16"], choices=list(VARIANTS))
    parser.add_argument("--contexts", nargs="*", type=int, default=[128])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.set_defaults(temperature=0.0, prompts=[], prompt_samples=0, matmul_rate=1.0)
    given = parser.parse_args()
    given.contexts = tuple(given.contexts)
    unknown = set(given.families) - set(SHAPES)
    if unknown:
        parser.error(f"no shape of {', '.join(sorted(unknown))}; there are {', '.join(SHAPES)}")
    ceiling = read_ceiling()
    result: dict[str, Any] = {
        "card": card(),
        "layers": given.layers,
        "read_ceiling_gb_per_s": ceiling / 1e9,
        "families": {},
    }
    for family in given.families:
        program = optc.capture(random_model(family, given.layers))
        rows: dict[str, Any] = {}
        for variant in given.variants:
            rows[variant] = run_variant(program, variant, given, ceiling)
            rows[variant]["layer"] = layer_of(rows[variant]["ledger"][0], given.layers, ceiling)
            print(family, variant, json.dumps(rows[variant]["layer"]), flush=True)
        result["families"][family] = rows
        (RESULTS / "gpu_families.json").write_text(json.dumps(result, indent=2))  # kept where a later one fails
        del program
        gc.collect()
        torch.cuda.empty_cache()
    record("gpu_families", result, 2)


if __name__ == "__main__":
    main()
