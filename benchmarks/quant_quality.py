"""How much of round-to-nearest's loss each quantization method leaves, on real text.

    python benchmarks/quant_quality.py --model ../shared/models/fiction-26m \
        --calibration ../shared/text/calibration.txt --validation ../shared/text/validation.txt
    python benchmarks/quant_quality.py ... --only gptq-4,best-4 --seeds 0 --windows 16   # a part of the table

Loss is perplexity minus the unquantized model's, over windows of 1024 tokens as `optc eval` cuts them, by the
program run eagerly in fp32. `share` is a method's loss over that of plain rounding to nearest in the same format (the
rows `plain-`: each group's range reaches its largest weight, where rtn searches the range of least error);
KL and top-1 agreement are over the first windows (--kl-windows). Seeds draw the calibration sequences; a share is
the mean over seeds, with the smallest and largest beside it. Rows of ModelOpt (`modelopt-`) are its own
configurations on the same model, sequences of the first seed and text (`modelopt_peer.py`; extra `test-oracles`).

    python benchmarks/quant_quality.py ... --only modelopt-nvfp4 --add   # keep the rows of the JSON file beside it
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, commit, record
from modelopt_peer import quantized_by_modelopt
from quant_rows import ROWS, Row

WINDOW = 1024


class Quality:
    """Perplexity, KL and top-1 agreement of programs on one text."""

    def __init__(self, tokens: list[int], windows: int, kl_windows: int) -> None:
        self.tokens = torch.tensor(tokens)
        self.windows = min(windows, (len(tokens) - 1) // WINDOW)
        self.kl_windows = min(kl_windows, self.windows)
        self.reference: list[torch.Tensor] = []

    @torch.no_grad()
    def measure(
        self, logits_of: Callable[[torch.Tensor], torch.Tensor], windows: int | None = None
    ) -> dict[str, float]:
        """Of what gives logits [1, T, vocabulary] for tokens [1, T]; the first that is measured is the reference."""
        windows = self.windows if windows is None else windows
        nll = kl = agree = 0.0
        first = not self.reference
        for window in range(windows):
            start = window * WINDOW
            logits = logits_of(self.tokens[None, start : start + WINDOW])[0].float().log_softmax(-1)
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
        return {"perplexity": math.exp(nll / (windows * WINDOW)), "kl": kl / seen, "top1": agree / seen}


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


class Bench:
    """The model, its texts, and what is measured of each row."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from optc.compiler.calibration.documents import read_documents
        from optc.compiler.ir.devices import to_device
        from optc.runtime.generation.tokenizer import load_tokenizer

        self.arguments = arguments
        tokenizer = load_tokenizer(arguments.model)
        assert tokenizer is not None
        self.documents = read_documents(arguments.calibration, tokenizer)
        self.quality = Quality(
            tokenizer.encode(arguments.validation.read_text()), arguments.windows, arguments.kl_windows
        )
        self.program = to_device(captured(arguments.model), torch.device(arguments.device))
        self.conditions = {
            "model": arguments.model.name,
            "windows": self.quality.windows,
            "kl_windows": self.quality.kl_windows,
            "seq_len": arguments.seq_len,
        }

    def calibration(self, seed: int) -> Any:
        from optc.compiler.calibration.sequences import cut_sequences

        return cut_sequences(
            self.documents,
            samples=self.arguments.samples,
            length=self.arguments.seq_len,
            vocab_size=self.program.contract.model.vocab_size,
            seed=seed,
            source=self.arguments.calibration.name,
        )

    def unquantized(self, kept: dict[str, Any] | None) -> dict[str, float]:
        """Of the program, or as it was kept, when only the windows of KL are run."""
        measured = self.quality.measure(evaluated(self.program), None if kept is None else self.quality.kl_windows)
        return measured if kept is None else kept

    def run(self, row: Row, seed: int) -> dict[str, float]:
        calibration = self.calibration(seed)
        if row.peer:
            begin = time.perf_counter()
            model = quantized_by_modelopt(
                self.arguments.model, row.method, calibration.tokens, weights_alone=row.weights_alone
            )
            seconds = time.perf_counter() - begin
            return {"seed": seed, "seconds": seconds, **self.quality.measure(lambda tokens: model(tokens).logits)}
        made, seconds, _ = quantized(self.program, row, calibration, seed)
        return {"seed": seed, "seconds": seconds, **self.quality.measure(evaluated(made))}

    def seeds(self, row: Row) -> list[int]:
        """One where the seed changes nothing, and of ModelOpt, whose rows are for comparison."""
        seeds = [int(item) for item in self.arguments.seeds.split(",")]
        return seeds[:1] if row.peer or row.method in ("rtn", "int8", "fp8", "fp8-block", "nf4", "mxfp4") else seeds


def evaluated(program: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """What gives a program's logits."""
    from optc.passes.quantization.arithmetic.differentiable import Differentiable

    return Differentiable(program)


def kept_result(name: str, conditions: dict[str, Any]) -> dict[str, Any]:
    """The JSON file's result, which must be of the same conditions."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    other = {key: result[key] for key, value in conditions.items() if result[key] != value}
    if other:
        raise SystemExit(f"--add: {name}.json was measured with {other}, not {conditions}")
    for row in result["rows"]:  # each says its own, where once all had one
        for key in ("device", "samples"):
            row.setdefault(key, result.get(key))
    return result


def parsed() -> argparse.Namespace:
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
    parser.add_argument(
        "--add", action="store_true", help="Keep the other rows of the JSON file, and the unquantized one."
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda: where passes and evaluation run.")
    parser.add_argument("--name", default="quant_quality", help="Of the JSON file.")
    return parser.parse_args()


def main() -> None:
    """Measure the rows, print the table, write benchmarks/results/quant_quality.json."""
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    bench = Bench(arguments)
    kept = kept_result(arguments.name, bench.conditions) if arguments.add else None
    base = bench.unquantized(kept["unquantized"] if kept else None)
    print(f"unquantized: perplexity {base['perplexity']:.4f} over {bench.quality.windows} windows", flush=True)
    wanted = [item for item in arguments.only.split(",") if item]
    rows: dict[str, dict[str, Any]] = {row["name"]: row for row in kept["rows"]} if kept else {}
    for row in ROWS:
        plain = next((item for item in ROWS if item.plain and item.format == row.format and not item.peer), None)
        needed = row.plain and any(other.name in wanted and other.format == row.format for other in ROWS)
        if wanted and row.name not in wanted and (not needed or row.name in rows):
            continue
        runs = [bench.run(row, seed) for seed in bench.seeds(row)]
        rows[row.name] = _summary(row, runs, base, rows.get(plain.name) if plain else None) | {
            "commit": commit(),
            "device": _device_name(arguments.device),
            "samples": arguments.samples,
        }
        print(_line(rows[row.name]), flush=True)
    order = [row.name for row in ROWS]
    result = bench.conditions | {
        "unquantized": base,
        "rows": sorted(rows.values(), key=lambda row: order.index(row["name"])),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    record(arguments.name, result, arguments.threads)
    print("\n".join(_line(row) for row in result["rows"]))


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
