"""Whether the engines compute what the quantized Program computes, on real text.

    python benchmarks/quant_engines.py --model ../shared/models/fiction-26m \
        --calibration ../shared/text/calibration.txt --validation ../shared/text/validation.txt
    python benchmarks/quant_engines.py ... --methods gptq --targets onnx-cpu --windows 2   # a part

The model is quantized once per method; the Program runs eagerly, and each engine at accuracy level 0 (activations as
they are) and 4 (fast). Printed: the largest difference in logits, its 99.9th percentile, and by how much perplexity
differs. Where the method itself rounds activations, a ratio between two codes may go either way: see docs/quantize.md.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import record
from quant_quality import WINDOW, Row, captured, quantized

LEVELS = (0, 4)


def program_logits(program: Any, windows: list[list[int]]) -> list[np.ndarray]:
    """Logits [W, V] of each window, by the Program run eagerly."""
    from optc.passes.quantization.arithmetic.differentiable import Differentiable

    run = Differentiable(program)
    with torch.no_grad():
        return [run(torch.tensor([window[:-1]]))[0].float().numpy() for window in windows]


def engine_logits(program: Any, target: str, level: int, windows: list[list[int]], folder: Path) -> list[np.ndarray]:
    """The same by the artifact that is compiled of it."""
    import optc

    optc.compile(program, target=target, output=folder, accuracy_level=level)
    with optc.load(folder).session as session:
        return [np.concatenate(list(session.score(window[:-1]))) for window in windows]


def perplexity(logits: list[np.ndarray], windows: list[list[int]]) -> float:
    """exp(mean negative log-likelihood) over all windows."""
    total, count = 0.0, 0
    for values, window in zip(logits, windows, strict=True):
        likely = torch.from_numpy(values).double().log_softmax(-1)
        total -= float(likely.gather(1, torch.tensor(window[1:])[:, None]).sum())
        count += len(window) - 1
    return math.exp(total / count)


def main() -> None:
    """Measure, print, write benchmarks/results/quant_engines.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--methods", default="gptq,smoothquant")
    parser.add_argument("--targets", default="onnx-cpu,inductor-cpu")
    parser.add_argument("--windows", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    from optc.compiler.calibration.documents import read_documents
    from optc.compiler.calibration.sequences import cut_sequences
    from optc.runtime.generation.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(arguments.model)
    assert tokenizer is not None
    text = tokenizer.encode(arguments.validation.read_text())
    windows = [text[i * WINDOW : (i + 1) * WINDOW + 1] for i in range(arguments.windows)]
    source = captured(arguments.model)
    calibration = cut_sequences(
        read_documents(arguments.calibration, tokenizer),
        samples=128,
        length=512,
        vocab_size=source.contract.model.vocab_size,
        seed=0,
        source=arguments.calibration.name,
    )
    rows: list[dict[str, Any]] = []
    for method in arguments.methods.split(","):
        bits = 8 if method in ("smoothquant", "int8", "llm-int8") else 4
        program, _, _ = quantized(source, Row(method, method, bits, True), calibration, 0)
        expected = program_logits(program, windows)
        base = perplexity(expected, windows)
        for target in arguments.targets.split(","):
            for level in LEVELS if bits == 4 else LEVELS[:1]:
                with tempfile.TemporaryDirectory() as folder:
                    found = engine_logits(program, target, level, windows, Path(folder) / "artifact")
                gaps = np.abs(np.stack(found) - np.stack(expected))
                own = perplexity(found, windows)
                rows.append(
                    {
                        "method": method,
                        "target": target,
                        "accuracy_level": level,
                        "largest_logit_difference": float(gaps.max()),
                        "difference_99.9": float(np.quantile(gaps.reshape(-1)[::17], 0.999)),
                        "perplexity": own,
                        "program_perplexity": base,
                        "perplexity_difference": own / base - 1,
                    }
                )
                print(rows[-1], flush=True)
    record("quant_engines", {"model": arguments.model.name, "windows": len(windows), "rows": rows}, 2)


if __name__ == "__main__":
    main()
