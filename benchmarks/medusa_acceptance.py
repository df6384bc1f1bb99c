"""What Medusa heads are worth, without an artifact: their guesses held to what the model itself writes.

    python benchmarks/medusa_acceptance.py                      # the heads of examples/ for fiction-26m, a minute of one core
    python benchmarks/medusa_acceptance.py --heads out/heads --prompts 4

The model continues prompts of unseen books greedily, in float32 by transformers. Every answer is then walked through as an
engine does it: each step keeps the guesses that are what the model wrote, along the chain of likeliest ones, or along the
paths of a tree of 16 that is chosen on calibration text as the pass `choose-draft-tree` does it. Since greedy answers do not
depend on drafts, these are the tokens a step of `--speculative medusa` for one request.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, record
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from optc.compiler.ir.draft_tree import choose_tree
from optc.compiler.model_folder.medusa import MedusaFolder, MedusaHead
from optc.runtime.generation.tokenizer import load_tokenizer
from optc.runtime.measuring.speculation import cut_prompts

SHARED = ROOT.parent / "shared"
RANKS, TREE = 8, 16
CALIBRATION = (24, 32, 64)  # as the pass has it: prompts, their tokens, new ones
UNSEEN = (128, 128)
Ranks = list[int]


@torch.inference_mode()
def written(model: Any, prompts: list[list[int]], count: int) -> tuple[list[list[int]], Tensor]:
    """Greedy answers [R, count], and the states [R, count, H] behind which each of their tokens was decided."""
    tokens, states, past = [], [], None
    fed = torch.tensor(prompts)
    for _ in range(count):
        out = model.model(input_ids=fed, past_key_values=past, use_cache=True)
        past, last = out.past_key_values, out.last_hidden_state[:, -1:]
        fed = model.lm_head(last).argmax(-1)
        tokens.append(fed)
        states.append(last)
    return torch.cat(tokens, 1).tolist(), torch.cat(states, 1)


@torch.inference_mode()
def guesses(model: Any, heads: Sequence[MedusaHead], states: Tensor) -> Tensor:
    """int64 [R, T, heads, RANKS], of each head the likeliest tokens, for heads that share the model's."""
    found = []
    for head in heads:
        x = states
        for weight, bias in head.blocks:
            x = x + functional.silu(functional.linear(x, weight.float(), bias.float()))
        found.append(model.lm_head(x).topk(RANKS, -1).indices)
    return torch.stack(found, 2)


def ranks(text: list[int], made: Tensor, place: int) -> Ranks:
    """Which guess of each head the token behind this place's is, and the next ones; -1: none. Shorter at the end of a text."""
    wanted = text[place + 1 : place + 1 + made.shape[1]]
    same = made[place, : len(wanted)] == torch.tensor(wanted)[:, None]
    return torch.where(same.any(1), same.int().argmax(1), -1).tolist() if wanted else []


def walked(texts: list[list[int]], made: Tensor, keeps: Callable[[Ranks], bool]) -> dict[str, Any]:
    """Tokens a step, and how often a draft was kept up to each depth."""
    kept, steps, tokens = np.zeros(made.shape[2], np.int64), 0, 0
    for text, own in zip(texts, made, strict=True):
        place = 0
        while place < len(text) - 1:
            row = ranks(text, own, place)
            depth = next((size for size in range(len(row)) if not keeps(row[: size + 1])), len(row))
            kept[:depth] += 1
            steps, place = steps + 1, place + depth + 1
        tokens += place
    return {"tokens_a_step": tokens / steps, "kept": (kept / steps).round(3).tolist(), "steps": steps}


def main() -> None:
    """Generate, guess, walk and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "fiction-26m")
    parser.add_argument("--heads", type=Path, default=ROOT / "examples" / "fiction-26m-medusa")
    parser.add_argument("--prompts", type=int, default=16)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    heads, tokenizer = MedusaFolder.read(given.heads).heads, load_tokenizer(given.model)
    assert tokenizer is not None

    def answers(name: str, count: int, length: int, new: int) -> tuple[list[list[int]], Tensor]:
        tokens = tokenizer.encode((SHARED / "text" / name).read_text(encoding="utf-8"))
        texts, states = written(model, cut_prompts(tokens, count, length), new)
        return texts, guesses(model, heads, states)

    texts, made = answers("calibration.txt", *CALIBRATION)
    right = [ranks(text, own, place) for text, own in zip(texts, made, strict=True) for place in range(len(text))]
    whole = [row for row in right if len(row) == len(heads)]
    tree = choose_tree(whole, heads=len(heads), ranks=RANKS, size=TREE)
    paths = {tuple(path) for path in tree.paths}
    texts, made = answers("validation.txt", given.prompts, *UNSEEN)
    result = {
        "model": given.model.name,
        "heads": given.heads.name,
        "prompts": given.prompts,
        "chain": walked(texts, made, lambda row: not any(row)),
        "tree": {**walked(texts, made, lambda row: tuple(row) in paths), "paths": sorted(paths)},
    }
    record("medusa_acceptance", result, 1)


if __name__ == "__main__":
    main()
