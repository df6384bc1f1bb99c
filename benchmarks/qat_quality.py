"""How much of the perplexity that rounding to nearest loses is won back by quantization-aware training.

    python benchmarks/qat_quality.py --model ../shared/models/fiction-26m --train ../shared/text/train.txt \
        --validation ../shared/text/validation.txt --device cuda --steps 1500 --sequences 32
    python benchmarks/qat_quality.py ... --formats int4-g32 --steps 60 --windows 16     # a quick look

The unquantized model is the teacher: loss = (1 - share) * cross-entropy + share * KL(teacher || student). Each format
is trained, written by `save_trained`, captured again from the folder, and measured as benchmarks/quant_quality.py does:
windows of 1024 tokens of the validation text, run eagerly in fp32. `recovered` is 1 - (perplexity loss of QAT) /
(perplexity loss of rounding to nearest in the same format). Training never reads the validation text.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import record
from quant_quality import Quality, Row, captured, quantized
from torch import Tensor

GOAL = 0.75
FORMATS = {
    "int4-g32": (4, 32, True),
    "int4-g128": (4, 128, True),
    "int4-g128-asym": (4, 128, False),
    "int3-g32": (3, 32, True),
    "int3-g128": (3, 128, True),
    "int3-g128-asym": (3, 128, False),
    "int2-g32-asym": (2, 32, False),
    "w8a8": (8, 0, True),
}


@dataclass(frozen=True)
class Training:
    """One way to train; rates are peaks of a cosine after a short warm-up."""

    steps: int
    sequences: int
    seq_len: int
    rate: float
    scale_rate: float
    kl_share: float
    scales: str
    start: str
    seed: int


def batches(tokens: Tensor, how: Training) -> Iterator[Tensor]:
    """Windows [sequences, seq_len + 1] at random places of the text."""
    generator = torch.Generator().manual_seed(how.seed)
    for _ in range(how.steps):
        starts = torch.randint(len(tokens) - how.seq_len - 1, (how.sequences,), generator=generator)
        yield torch.stack([tokens[start : start + how.seq_len + 1] for start in starts.tolist()])


def train(teacher: Any, student: Any, tokens: Tensor, how: Training, device: torch.device) -> list[float]:
    """Train the student in place; the loss of every step."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=how.rate, betas=(0.9, 0.95), weight_decay=0.0)
    warmup = min(20, how.steps // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, how.steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    losses: list[Tensor] = []
    begin = time.perf_counter()
    student.train()
    for number, batch in enumerate(batches(tokens, how)):
        batch = batch.to(device)
        with autocast:
            with torch.no_grad():
                known = teacher(input_ids=batch[:, :-1], use_cache=False).logits.float().log_softmax(-1)
            found = student(input_ids=batch[:, :-1], use_cache=False).logits.float().log_softmax(-1)
        kl = (known.exp() * (known - found)).sum(-1).mean()
        loss = how.kl_share * kl
        if how.kl_share < 1:
            loss = loss - (1 - how.kl_share) * found.gather(-1, batch[:, 1:, None]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.detach())
        if number % max(1, how.steps // 10) == 0:
            print(
                f"  step {number:5d}  loss {float(losses[-1]):.4f}  {time.perf_counter() - begin:.0f} s",
                flush=True,
            )
    student.eval()
    return [float(loss) for loss in losses]


def load(folder: Path, device: torch.device) -> Any:
    """A model in float32 on a device."""
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)


def measure_format(
    name: str, arguments: argparse.Namespace, how: Training, teacher: Any, tokens: Tensor, quality: Quality
) -> dict[str, Any]:
    """Perplexity of rounding to nearest and of QAT in one format."""
    from optc.compiler.ir.devices import to_device
    from optc.training.export import SaveConfig, save_trained
    from optc.training.qat import QatConfig, apply_qat

    device = torch.device(arguments.device)
    bits, size, symmetric = FORMATS[name]
    rounded, _, _ = quantized(
        to_device(captured(arguments.model), device),
        Row(name, "int8" if name == "w8a8" else "rtn", bits, symmetric, size, plain=True),
        None,
        0,
    )
    nearest = quality.measure(rounded)
    config = QatConfig(
        enabled=True,
        bits=bits,
        group_size=size,
        symmetric=symmetric,
        scales=how.scales,  # type: ignore[arg-type]
        start=how.start,  # type: ignore[arg-type]
        scale_rate=how.scale_rate,
        activations="int8" if name == "w8a8" else "none",
    )
    begin = time.perf_counter()
    student = apply_qat(load(arguments.model, device), config)
    losses = train(teacher, student, tokens, how, device)
    seconds = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "qat"
        save_trained(student, arguments.model, folder, SaveConfig())
        trained = quality.measure(to_device(captured(folder), device))
    return {
        "format": name,
        "bits": bits,
        "group_size": size,
        "symmetric": symmetric,
        "rtn": nearest,
        "qat": trained,
        "seconds": seconds,
        "first_loss": losses[0],
        "last_loss": sum(losses[-10:]) / len(losses[-10:]),
    }


def main() -> None:
    """Train and measure every format, print the table, write benchmarks/results/qat_quality.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--formats", default="int4-g32,int3-g32,int3-g128", help=", ".join(FORMATS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--sequences", type=int, default=16, help="Per step.")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--scale-rate", type=float, default=1.0)
    parser.add_argument("--kl-share", type=float, default=1.0)
    parser.add_argument("--scales", default="learned", choices=["learned", "minmax"])
    parser.add_argument("--start", default="search", choices=["search", "full"])
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--kl-windows", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda.")
    parser.add_argument("--name", default="qat_quality", help="Of the JSON file.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    from optc.compiler.ir.devices import to_device
    from optc.runtime.generation.tokenizer import load_tokenizer

    device = torch.device(arguments.device)
    tokenizer = load_tokenizer(arguments.model)
    assert tokenizer is not None
    tokens = torch.tensor(tokenizer.encode(arguments.train.read_text()))
    quality = Quality(tokenizer.encode(arguments.validation.read_text()), arguments.windows, arguments.kl_windows)
    base = quality.measure(to_device(captured(arguments.model), device))
    print(f"unquantized: perplexity {base['perplexity']:.4f}; {len(tokens)} training tokens", flush=True)
    teacher = load(arguments.model, device).eval().requires_grad_(False)
    how = Training(
        arguments.steps,
        arguments.sequences,
        arguments.seq_len,
        arguments.rate,
        arguments.scale_rate,
        arguments.kl_share,
        arguments.scales,
        arguments.start,
        arguments.seed,
    )
    rows = []
    for name in arguments.formats.split(","):
        row = measure_format(name, arguments, how, teacher, tokens, quality)
        lost = row["rtn"]["perplexity"] - base["perplexity"]
        row["recovered"] = 1 - (row["qat"]["perplexity"] - base["perplexity"]) / lost
        row["goal"] = GOAL
        rows.append(row)
        print(line(row), flush=True)
    result = {
        "model": arguments.model.name,
        "windows": quality.windows,
        "unquantized": base,
        "rows": rows,
        "training": how.__dict__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }
    record(arguments.name, result, arguments.threads)
    print("\n".join(line(row) for row in rows))


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    rtn, qat = row["rtn"], row["qat"]
    return (
        f"{row['format']:15s} rtn {rtn['perplexity']:8.4f}  qat {qat['perplexity']:8.4f}  recovered {row['recovered']:.1%}"
        f" (goal {row['goal']:.0%})  KL {rtn['kl']:.5f} -> {qat['kl']:.5f}  top-1 {rtn['top1']:.2%} -> {qat['top1']:.2%}"
        f"  {row['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
