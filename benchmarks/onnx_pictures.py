"""ONNX files of optc against those of `torch.onnx.export(dynamo=True)` in ONNX Runtime, in turns: ResNet-50 and ViT-B.

    PYTHONPATH=SITE python benchmarks/onnx_pictures.py     # SITE holds onnxscript: pip install --target SITE onnxscript

Models of transformers with random weights, one picture of 224 x 224; the number of pictures is a dynamic axis of both
files. Ratios are rounds of the exporter's time over optc's: above 1 optc's file is faster.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from common import interleave, ratio, record
from picture_models import ready_torchvision

import optc

SIZE = 224


def saved(kind: str, folder: Path) -> Any:
    """A model of transformers, and its folder."""
    import transformers

    torch.manual_seed(0)
    name = "ResNet" if kind == "resnet-50" else "ViT"
    config = getattr(transformers, f"{name}Config")(num_labels=1000, image_size=SIZE)
    model = getattr(transformers, f"{name}ForImageClassification")(config).eval()
    with torch.no_grad():  # running statistics that norms of random weights would have
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    model.save_pretrained(folder)
    return model


def by_exporter(model: Any, pictures: torch.Tensor, path: Path) -> Path:
    """The file of `torch.onnx.export(dynamo=True)`."""
    torch.onnx.export(
        model,
        (pictures.expand(2, -1, -1, -1).contiguous(),),
        str(path),
        dynamo=True,
        input_names=["pixel_values"],
        dynamic_shapes=({0: torch.export.Dim("batch", max=64)},),
        verbose=False,
    )
    return path


def opened(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """A session with ONNX Runtime's own defaults but for its threads; beside the file it writes what it made of the graph."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def measure(kind: str, work: Path, rounds: int, repeats: int, threads: int) -> dict[str, Any]:
    """Milliseconds of both files, their ratio, their differences from eager."""
    model = saved(kind, work / kind)
    pictures = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    begin = time.perf_counter()
    artifact = optc.compile(work / kind, target="onnx-cpu", output=work / f"{kind}-optc").artifact
    compiled = time.perf_counter()
    theirs = by_exporter(model, pictures, work / f"{kind}.onnx")
    seconds = {"optc": round(compiled - begin, 1), "exporter": round(time.perf_counter() - compiled, 1)}
    files = {"optc": artifact / "model.onnx", "exporter": theirs}
    sessions = {name: opened(path, threads) for name, path in files.items()}
    calls = {
        name: len(onnx.load(path.with_suffix(".optimized.onnx"), load_external_data=False).graph.node)
        for name, path in files.items()
    }
    with torch.inference_mode():
        expected = model(pixel_values=pictures).logits.numpy()
    feed = {"pixel_values": pictures.numpy()}
    errors = {
        name: float(np.abs(session.run(None, feed)[0] - expected).max() / np.abs(expected).max())
        for name, session in sessions.items()
    }

    def timed(session: onnxruntime.InferenceSession) -> Callable[[], float]:
        def once() -> float:
            begin = time.perf_counter()
            for _ in range(repeats):
                session.run(None, feed)
            return (time.perf_counter() - begin) / repeats

        return once

    rows = interleave({name: timed(session) for name, session in sessions.items()}, rounds, warmup=2)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "compile_seconds": seconds,
        "calls_after_onnxruntime_rewrote_the_graph": calls,
        "largest_difference_from_eager": errors,
        "milliseconds": {name: 1e3 * ratio(row, [1.0] * len(row))["median"] for name, row in rows.items()},
        "exporter_over_optc": ratio(rows["exporter"], rows["optc"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("resnet-50", "vit-b"), default=["resnet-50", "vit-b"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    ready_torchvision()
    import onnxscript

    with tempfile.TemporaryDirectory() as work:
        found = {
            kind: measure(kind, Path(work), arguments.rounds, arguments.repeats, arguments.threads)
            for kind in arguments.models
        }
    goals = {
        f"{kind}: no slower than the exporter's, by the interval": row["exporter_over_optc"]["ci95"][1] >= 1
        for kind, row in found.items()
    }
    versions = {"onnxscript": onnxscript.__version__, "onnxruntime": onnxruntime.__version__}
    record("onnx_pictures", {"libraries": versions, "models": found, "goals": goals}, arguments.threads)


if __name__ == "__main__":
    main()
