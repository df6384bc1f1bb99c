"""Recurrent states, attention sinks and windows over chunked prefill, ragged batches and rewinding, against transformers.

    python benchmarks/held_states.py
    python benchmarks/held_states.py --models gpt_oss --targets onnx-cpu inductor-cpu

Models of a scaled shape (4 layers of 512, a vocabulary of 8192) with random weights, compiled from a folder and opened as
users open them. Each row of a ragged batch is fed in chunks and single tokens; its logits are held to one forward of
transformers over the whole row, greedy tokens to `generate` of that row alone. Then rows are taken back to fewer tokens and
continued otherwise, where the model's layers allow it, and the refusal is kept where they do not.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import record

import optc
from optc.compiler.diagnostics import TargetError
from optc.runtime.sessions.session import Session

SIZES: dict[str, Any] = {
    "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
    "vocab_size": 8192, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
DELTA: dict[str, Any] = {
    "linear_num_value_heads": 8, "linear_num_key_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_next": (
        "Qwen3NextConfig", "Qwen3NextForCausalLM",
        {**DELTA, "intermediate_size": 1024, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128,
         "shared_expert_intermediate_size": 128},
    ),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", {**DELTA, "intermediate_size": 1024}),
    "gpt_oss": (
        "GptOssConfig", "GptOssForCausalLM",
        {"intermediate_size": 256, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 32},
    ),
}  # fmt: skip
"""Config, class and sizes of each: gated delta rule beside attention, with and without experts; sinks and windows."""
LENGTHS = (120, 61, 7, 88)
"""Tokens of the ragged rows, of which the last `TAIL` are fed in a chunk and one by one."""
CHUNK, STEPS = 37, 3
"""The chunk that follows the prefill is as long as the shortest row allows, this at most."""
TOLERANCE = 1e-4
NEW_TOKENS = 16


def made(name: str) -> Any:
    """A model whose logits are no accident of small weights."""
    import transformers

    config_class, model_class, sizes = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**SIZES, **sizes))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=weight.shape[-1] ** -0.5)
            else:
                weight.add_(0.1 * torch.randn_like(weight))
    return model.eval().requires_grad_(False)


def own_logits(model: Any, row: list[int]) -> np.ndarray[Any, Any]:
    """[tokens, vocabulary] of one forward of transformers."""
    with torch.inference_mode():
        found: np.ndarray[Any, Any] = model(input_ids=torch.tensor([row]), use_cache=False).logits[0].numpy()
    return found


def gap(found: Any, expected: Any) -> float:
    """Largest difference as a share of the largest logit."""
    return float(np.abs(np.asarray(found) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max())


def fed_in_chunks(session: Session, rows: list[list[int]], wanted: list[Any]) -> float:
    """Ragged prefill, a chunk of unequal parts, then single tokens; the largest gap of all logits that come back."""
    ends = [len(row) - STEPS for row in rows]
    starts = [max(1, end - CHUNK - number) for number, end in enumerate(ends)]
    gaps = []
    logits = session.prefill([row[:start] for row, start in zip(rows, starts, strict=True)])
    gaps += [gap(logits[i], wanted[i][start - 1]) for i, start in enumerate(starts)]
    logits = session.extend([row[start:end] for row, start, end in zip(rows, starts, ends, strict=True)])
    gaps += [gap(logits[i], wanted[i][end - 1]) for i, end in enumerate(ends)]
    for step in range(STEPS):
        logits = session.decode([row[end + step] for row, end in zip(rows, ends, strict=True)])
        gaps += [gap(logits[i], wanted[i][end + step]) for i, end in enumerate(ends)]
    return max(gaps)


def taken_back(session: Session, model: Any, rows: list[list[int]]) -> dict[str, Any]:
    """Take each row back to half of its tokens and go on with others; or what the session says to that."""
    session.prefill(rows)
    kept = [len(row) // 2 for row in rows]
    try:
        session.rewind(kept)
    except TargetError as error:
        session.rewind([0] * len(rows))
        again = session.extend(rows)
        wanted = [own_logits(model, row)[-1] for row in rows]
        return {"refused": str(error).splitlines()[0], "exit_code": error.exit_code, "anew": gap(again, wanted)}
    other = [list(reversed(row[half:])) for row, half in zip(rows, kept, strict=True)]
    logits = session.extend(other)
    wanted = [own_logits(model, [*row[:half], *more])[-1] for row, half, more in zip(rows, kept, other, strict=True)]
    return {"rewound": gap(logits, wanted)}


def greedy(opened: Any, model: Any, rows: list[list[int]]) -> bool:
    """Whether a ragged batch gives the tokens that transformers gives each row alone."""
    found = [item.tokens for item in opened.generate_batch(rows, max_new_tokens=NEW_TOKENS, ignore_eos=True)]
    wanted = []
    for row in rows:
        ids = torch.tensor([row])
        answer = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS,
            min_new_tokens=None, eos_token_id=None, pad_token_id=2,
        )  # fmt: skip
        wanted.append(answer[0, len(row) :].tolist())
    return found == wanted


def measure(name: str, target: str, work: Path) -> dict[str, Any]:
    """One model on one target."""
    model = made(name)
    folder = work / name
    if not folder.exists():
        model.save_pretrained(folder)
    begin = time.perf_counter()
    artifact = optc.compile(folder, target=target, output=work / f"{name}-{target}").artifact
    seconds = time.perf_counter() - begin
    opened = optc.load(artifact)
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, SIZES["vocab_size"], (length,), generator=generator).tolist() for length in LENGTHS]
    result = {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "compile_seconds": round(seconds, 1),
        "logits": fed_in_chunks(opened.session, rows, [own_logits(model, row) for row in rows]),
        "greedy_tokens_equal": greedy(opened, model, rows),
        **taken_back(opened.session, model, rows),
    }
    opened.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--targets", nargs="+", default=["onnx-cpu"])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        for target in arguments.targets:
            for name in arguments.models:
                found[f"{name} on {target}"] = row = measure(name, target, Path(work))
                print(name, target, row, flush=True)
    figures = ("logits", "rewound", "anew")
    exact = all(
        row["greedy_tokens_equal"] and all(row.get(figure, 0.0) <= TOLERANCE for figure in figures)
        for row in found.values()
    )
    record("held_states", {"lengths": LENGTHS, "models": found, "exact": exact}, arguments.threads)


if __name__ == "__main__":
    main()
