"""Compiles tiny decoders for TensorRT, and runs the very same model.onnx in ONNX Runtime by the folder's contract."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bounds
import numpy as np
import onnxruntime as ort
import torch
from chosen import chosen
from torch import Tensor

from optc.compiler.calibration.sequences import random_calibration
from optc.compiler.execution.stage_driver import run_stage
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import PassContext
from optc.compiler.target.options import CompileOptions
from optc.compiler.target.target import ExportRequest, ExportResult
from optc.targets.trt import TARGET

CAPACITY = 32
LENGTHS = (21, 9, 14, 5)
_CONTEXT = PassContext(calibration=random_calibration(128, samples=4, length=32, seed=0))


def options(**given: Any) -> CompileOptions:
    """Options of a small compile that builds no plan unless asked to."""
    return chosen("trt", **{"dtype": "fp32", "max_seq_len": CAPACITY, "trt_runtime": "none", **given})


def stages(program: Program, made: CompileOptions) -> tuple[Program, Program]:
    """The program in front of the KV cache (quantized, if it is), and the last stage; without the gate."""
    before = program
    for step in TARGET.recipe("decoder", made):
        if step.rewrite.name == "fixed-kv-cache":
            before = program
        result = step.rewrite.run(program, _CONTEXT)
        assert result.matched or step.optional, step.rewrite.name
        program = result.program
    return before, program


def export(program: Program, folder: Path, made: CompileOptions) -> ExportResult:
    """Export a last stage."""
    folder.mkdir(exist_ok=True)
    return TARGET.export(program, ExportRequest(directory=folder, options=made.own))


def open_session(folder: Path) -> Any:
    """The folder's model in ONNX Runtime, whose own fusions are kept from rounding activations."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 4
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    return ort.InferenceSession(str(folder / "model.onnx"), settings, providers=["CPUExecutionProvider"])


class Runner:
    """A batch over caches of fixed capacity in ONNX Runtime; caches start full of garbage."""

    def __init__(self, session: Any, folder: Path, rows: int) -> None:
        self.session = session
        self.facts = json.loads((folder / "engine.json").read_text())
        self.held = np.zeros(rows, np.int32)
        generator = np.random.default_rng(0)
        self.caches = {
            name: generator.standard_normal([rows, *spec["dims"][1:]]).astype(spec["dtype"])
            for name, spec in self.facts["inputs"].items()
            if name.startswith("past")
        }

    def feed(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Append tokens to each row (right-padded when unequal); their logits, per row [len, V]."""
        width = max(map(len, rows))
        ids = np.array([[*row, *[0] * (width - len(row))] for row in rows], np.int32)
        feed = {"input_ids": ids, "positions": self.held, **self.caches}
        made = dict(zip(self.facts["outputs"], self.session.run(None, feed), strict=True))
        assert made["logits"].dtype == np.float32
        self.caches = {name: made[name.replace("past_key_values", "present")] for name in self.caches}
        self.held = self.held + np.array([len(row) for row in rows], np.int32)
        return [torch.from_numpy(part[: len(row)]) for part, row in zip(made["logits"], rows, strict=True)]


def schedules(folder: Path, rows: Sequence[Sequence[int]]) -> dict[str, list[Tensor]]:
    """Logits of every token, in several ways of feeding them: per schedule, one [len, V] per row."""
    ways: dict[str, list[Tensor]] = {}
    session = open_session(folder)
    for way in ("prefill", "chunks", "steps"):
        ways[way] = []
        for row in rows:
            runner, start, parts = Runner(session, folder, 1), 0, []
            ends = {
                "prefill": [len(row)],
                "chunks": [len(row) // 2, len(row) // 2 + 2, len(row)],
                "steps": list(range(1, len(row) + 1)),
            }[way]
            for end in ends:
                parts += runner.feed([row[start:end]])
                start = end
            ways[way].append(torch.cat(parts))
    runner = Runner(session, folder, len(rows))
    parts = [[part] for part in runner.feed([row[:-4] for row in rows])]
    for step in range(-4, 0):
        for store, part in zip(parts, runner.feed([[row[step]] for row in rows]), strict=True):
            store.append(part)
    ways["ragged"] = [torch.cat(store) for store in parts]
    return ways


def check(program: Program, folder: Path, rows: Sequence[Sequence[int]], *, codes: bool = False) -> None:
    """Assert that ONNX Runtime gives a program's logits in every way of feeding tokens.

    Args:
        codes: the program rounds inputs to codes. A float32 program that does not is held to 1e-4 of its logits.
    """
    expected, rounding = run_stage(program, rows).logits, None
    if expected[0].dtype is torch.float16:
        expected, rounding = bounds.of_half(program, rows)
    elif codes:
        expected, rounding = bounds.of_codes(program, rows)
    for way, logits in schedules(folder, rows).items():
        if rounding:
            bounds.check(logits, expected, rounding, way)
        else:
            assert bounds.gap(logits, expected).largest <= 1e-4, way
