"""How much of round-to-nearest's loss each quantization method leaves, on real text.

    python benchmarks/quant_quality.py --model ../shared/models/fiction-26m \
        --calibration ../shared/text/calibration.txt --validation ../shared/text/validation.txt
    python benchmarks/quant_quality.py ... --only gptq-4,best-4 --seeds 0 --windows 16   # a part of the table

Loss is perplexity minus the unquantized model's, over windows of 1024 tokens as `optc eval` cuts them, by the
program run eagerly in fp32. `share` is a method's loss over that of plain rounding to nearest in the same format (the
rows `plain-`: each group's range reaches its largest weight, where rtn searches the range of least error);
KL and top-1 agreement are over the first windows (--kl-windows). Seeds draw the calibration sequences; a share is
the mean over seeds, with the smallest and largest beside it.
"""

from __future__ import annotations

import argparse
import math
import resource
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import record

WINDOW = 1024


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        goal: the largest share that the project set itself. folder: as a model folder has it, whose loader runs no
            operators in front of linears. plain: round on full ranges, without a search.
    """

    name: str
    method: str
    bits: int
    symmetric: bool
    group_size: int | None = 128
    goal: float | None = None
    folder: bool = False
    plain: bool = False

    @property
    def format(self) -> tuple[int, bool, int | None]:
        return self.bits, self.symmetric, self.group_size


ROWS = (
    Row("plain-4", "rtn", 4, True, plain=True),
    Row("plain-4-asym", "rtn", 4, False, plain=True),
    Row("plain-3", "rtn", 3, True, plain=True),
    Row("plain-3-asym", "rtn", 3, False, plain=True),
    Row("rtn-4", "rtn", 4, True),
    Row("rtn-4-asym", "rtn", 4, False),
    Row("rtn-3", "rtn", 3, True),
    Row("rtn-3-asym", "rtn", 3, False),
    Row("gptq-4", "gptq", 4, True, goal=0.42),
    Row("gptq-4-asym", "gptq", 4, False, goal=0.50),
    Row("gptq-3", "gptq", 3, True, goal=0.34),
    Row("awq-4", "awq", 4, True, goal=0.60),
    Row("awq-4-asym", "awq", 4, False, goal=0.70),
    Row("awq+gptq-4-asym", "awq+gptq", 4, False),
    Row("rotate+rtn-4", "rotate+rtn", 4, True),
    Row("rotate+gptq-4", "rotate+gptq", 4, True, goal=0.26),
    Row("rotate+gptq-4-asym", "rotate+gptq", 4, False),
    Row("rotate+gptq-3", "rotate+gptq", 3, True),
    Row("best-3", "best", 3, True),
    Row("best-4", "best", 4, True),
    Row("rotate+best-4", "rotate+best", 4, True, goal=0.26),
    Row("rotate+best-3", "rotate+best", 3, True, goal=0.17),
    Row("best-4-asym", "best", 4, False, goal=0.42),
    Row("best-3-asym", "best", 3, False, goal=0.30),
    Row("int8", "int8", 8, True, 0),
    Row("smoothquant", "smoothquant", 8, True, 0),
    Row("smoothquant folder", "smoothquant", 8, True, 0, folder=True),
    Row("smoothquant-mixed folder", "smoothquant-mixed", 8, True, 0, folder=True),
    Row("rotate+smoothquant", "rotate+smoothquant", 8, True, 0),
    Row("rotate+smoothquant folder", "rotate+smoothquant", 8, True, 0, folder=True),
    Row("w4a8", "w4a8", 4, True),
    Row("llm-int8", "llm-int8", 8, True, 0),
    Row("fp8", "fp8", 8, True, 0),
    Row("fp8-block", "fp8-block", 8, True),
    Row("nf4", "nf4", 4, True, 64),
    Row("nvfp4", "nvfp4", 4, True, 16),
    Row("mxfp4", "mxfp4", 4, True, 32),
)


class Quality:
    """Perplexity, KL and top-1 agreement of programs on one text."""

    def __init__(self, tokens: list[int], windows: int, kl_windows: int) -> None:
        self.tokens = torch.tensor(tokens)
        self.windows = min(windows, (len(tokens) - 1) // WINDOW)
        self.kl_windows = min(kl_windows, self.windows)
        self.reference: list[torch.Tensor] = []

    @torch.no_grad()
    def measure(self, program: Any) -> dict[str, float]:
        from optc.passes.quantization.arithmetic.differentiable import Differentiable

        run = Differentiable(program)
        nll = kl = agree = 0.0
        first = not self.reference
        for window in range(self.windows):
            start = window * WINDOW
            logits = run(self.tokens[None, start : start + WINDOW])[0].float().log_softmax(-1)
            target = self.tokens[start + 1 : start + WINDOW + 1].to(logits.device)
            nll -= float(logits.gather(1, target[:, None]).double().sum())
            if window >= self.kl_windows:
                continue
            if first:
                self.reference.append(logits)
            known = self.reference[window]
            kl += float((known.exp() * (known - logits)).double().sum())
            agree += float((known.argmax(-1) == logits.argmax(-1)).sum())
        seen = self.kl_windows * WINDOW
        return {"perplexity": math.exp(nll / (self.windows * WINDOW)), "kl": kl / seen, "top1": agree / seen}


def quantized(program: Any, row: Row, calibration: Any, seed: int) -> tuple[Any, float, list[Any]]:
    """(the program after the method's passes, seconds, the linears' records of the last rounding)."""
    from optc.compiler.rewriting.passes import PassContext
    from optc.compiler.target.options import QuantRequest
    from optc.passes.quantization.rtn import QuantizeRtn
    from optc.targets.methods import METHODS, choose_quantization, quantization_steps

    fixed = METHODS[row.method].fixed
    asked = QuantRequest(
        quant=row.method,
        bits=None if fixed else row.bits,
        group_size=None if fixed else row.group_size,
        symmetric=row.symmetric,
    )
    begin = time.perf_counter()
    context = PassContext(seed=seed, calibration=calibration, reference=program)
    linears: list[Any] = []
    for step in quantization_steps(choose_quantization(asked), rotations=not row.folder):
        rewrite = step.rewrite
        if row.plain and isinstance(rewrite, QuantizeRtn):
            rewrite = replace(rewrite, ranges="full")
        result = rewrite.run(program, context)
        program = result.program
        linears += result.linears
    return program, time.perf_counter() - begin, linears


def captured(model: Path) -> Any:
    """The program in front of quantization, as the recipes of the targets make it."""
    from optc.compiler.capture import capture_pretrained
    from optc.compiler.pipeline.pipeline import Pipeline
    from optc.compiler.target.target import Step
    from optc.passes.fusion.norm import FuseNorm
    from optc.passes.fusion.rotary import FuseRotary

    program, _ = capture_pretrained(model, dtype="fp32")
    return Pipeline([Step(FuseRotary(), optional=True), Step(FuseNorm(), optional=True)]).run(program).program


def main() -> None:
    """Measure the rows, print the table, write benchmarks/results/quant_quality.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--kl-windows", type=int, default=16)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="", help="Comma-separated rows.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda: where passes and evaluation run.")
    parser.add_argument("--name", default="quant_quality", help="Of the JSON file.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    from optc.compiler.calibration.documents import read_documents
    from optc.compiler.calibration.sequences import cut_sequences
    from optc.compiler.ir.devices import to_device
    from optc.runtime.generation.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(arguments.model)
    assert tokenizer is not None
    documents = read_documents(arguments.calibration, tokenizer)
    quality = Quality(tokenizer.encode(arguments.validation.read_text()), arguments.windows, arguments.kl_windows)
    program = to_device(captured(arguments.model), torch.device(arguments.device))
    base = quality.measure(program)
    print(f"unquantized: perplexity {base['perplexity']:.4f} over {quality.windows} windows", flush=True)
    wanted = [item for item in arguments.only.split(",") if item]
    seeds = [int(item) for item in arguments.seeds.split(",")]
    rows: list[dict[str, Any]] = []
    plain: dict[Any, dict[str, float]] = {}
    for row in ROWS:
        baseline = next((item for item in ROWS if item.plain and item.format == row.format), None)
        needed = row.plain and any(other.name in wanted and other.format == row.format for other in ROWS)
        if wanted and row.name not in wanted and not needed:
            continue
        runs = []
        for seed in seeds if row.method not in ("rtn", "int8", "fp8", "fp8-block", "nf4", "mxfp4") else seeds[:1]:
            calibration = cut_sequences(
                documents,
                samples=arguments.samples,
                length=arguments.seq_len,
                vocab_size=program.contract.model.vocab_size,
                seed=seed,
                source=arguments.calibration.name,
            )
            made, seconds, linears = quantized(program, row, calibration, seed)
            runs.append({"seed": seed, "seconds": seconds, **quality.measure(made)})
            del made, linears
        if row.plain:
            plain[row.format] = runs[0]
        rows.append(_summary(row, runs, base, plain.get(baseline.format) if baseline else None))
        print(_line(rows[-1]), flush=True)
        result = {
            "model": arguments.model.name,
            "device": _device_name(arguments.device),
            "windows": quality.windows,
            "kl_windows": quality.kl_windows,
            "samples": arguments.samples,
            "seq_len": arguments.seq_len,
            "unquantized": base,
            "rows": rows,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
    record(arguments.name, result, arguments.threads)
    print("\n".join(_line(row) for row in rows))


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def _summary(
    row: Row, runs: list[dict[str, float]], base: dict[str, float], plain: dict[str, float] | None
) -> dict[str, Any]:
    def mean(key: str) -> float:
        return sum(run[key] for run in runs) / len(runs)

    out: dict[str, Any] = {
        "name": row.name,
        "method": row.method,
        "bits": row.bits,
        "symmetric": row.symmetric,
        "group_size": row.group_size,
        "perplexity": mean("perplexity"),
        "kl": mean("kl"),
        "top1": mean("top1"),
        "perplexity_increase": mean("perplexity") / base["perplexity"] - 1,
        "seconds": mean("seconds"),
        "runs": runs,
    }
    if plain is not None and not row.plain:
        whole = plain["perplexity"] - base["perplexity"]
        shares = [(run["perplexity"] - base["perplexity"]) / whole for run in runs]
        out |= {
            "share": sum(shares) / len(shares),
            "share_range": [min(shares), max(shares)],
            "kl_share": out["kl"] / plain["kl"],
            "goal": row.goal,
        }
    return out


def _line(row: dict[str, Any]) -> str:
    text = f"{row['name']:26s} ppl {row['perplexity']:8.4f} ({row['perplexity_increase']:+.3%})  KL {row['kl']:.5f}  top-1 {row['top1']:.2%}"
    if "share" in row:
        low, high = row["share_range"]
        goal = f" (goal {row['goal']:.2f})" if row["goal"] else ""
        text += f"  share {row['share']:.3f} [{low:.3f}, {high:.3f}]{goal}  KL share {row['kl_share']:.3f}"
    return f"{text}  {row['seconds']:.0f} s"


if __name__ == "__main__":
    main()
