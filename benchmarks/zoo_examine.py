"""One model of the zoo: written as a folder, compiled, and held to its own eager forward. Runs in a child process."""

from __future__ import annotations

import logging
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from zoo_models import Kind, build
from zoo_pictures import Calls, answered, pairs

LENGTHS = (11, 5, 1)
"""Tokens of the sequences: ragged, one of a single token; the first is run alone too."""
STEPS = 6
"""Tokens that are generated greedily behind each."""
TOLERANCE = 1e-4
"""Largest difference, as a share of the largest output."""


class _SlowError(Exception):
    """The model's own forward takes longer than it may."""


@dataclass
class Truth:
    """What the model itself gives.

    Attributes:
        outputs: [n, C] of each sequence alone.
        padded: of encoders, the same in one batch, padded on the right: some mix padding in.
        tokens: of decoders, greedy ones behind each sequence; of encoder-decoder models, of the answers to them.
        answers: of encoder-decoder models, the logits [STEPS, V] of these tokens.
        calls: of types whose answers are not tokens, and then nothing else.
    """

    sequences: list[list[int]]
    outputs: list[Tensor]
    padded: list[Tensor]
    tokens: list[list[int]]
    answers: list[Tensor] = field(default_factory=list)
    calls: Calls = field(default_factory=list)


def examine(
    kind: Kind, stages: Sequence[str], folder: Path, own_seconds: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of one model, stage by stage as they come: outcome, and what stands behind it.

    The model is built, run and captured once; each target compiles the captured program.

    Args:
        stages: "capture", or targets to compile for.
        own_seconds: what building the model and running its own forward may take.
    """
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGALRM, _raise_slow)
    signal.setitimer(signal.ITIMER_REAL, own_seconds)
    try:
        truth = _truth(kind, folder / "model")
    except Exception as error:  # noqa: BLE001 - whatever transformers raises says that there is no model to compile
        for stage in stages:
            yield stage, {"outcome": "not built", "reason": _line(error)}
        return
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    captured = _Captured(folder / "model", pair=bool(truth.answers))
    for stage in stages:
        begin = time.perf_counter()
        row = _compiled(kind, stage, folder / stage, truth, captured)
        yield stage, {**row, "seconds": round(time.perf_counter() - begin, 1)}


@dataclass
class _Captured:
    """The program of a folder, captured once; a folder of two programs (`pair`) is captured by each compile."""

    folder: Path
    pair: bool

    def program(self) -> Any:
        """Raises, each time, what the capture raised."""
        if self._error is not None:
            raise self._error
        return self._program

    def __post_init__(self) -> None:
        import optc

        self._program: Any = None
        self._error: Exception | None = None
        if self.pair:
            self._program = self.folder
            return
        try:
            self._program = optc.capture(self.folder)
        except Exception as error:  # noqa: BLE001 - the result of each stage
            self._error = error


def _raise_slow(*_: Any) -> None:
    raise _SlowError("its own forward takes too long")


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:240]}"


# -- the model itself ----------------------------------------------------------------------------


def _truth(kind: Kind, folder: Path) -> Truth:
    """Write the model's folder, and run what transformers reads from it."""
    import transformers

    if kind.head in ("picture", "answers"):
        return Truth([], [], [], [], calls=answered(kind, folder))
    made = build(kind)
    made.save_pretrained(folder)
    model = getattr(transformers, kind.architecture).from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    model = model.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    size = int(model.get_input_embeddings().weight.shape[0])
    size = min(size, int(getattr(model.config.get_text_config(), "vocab_size", None) or size))
    drawn = [torch.randint(3, max(size - 1, 4), (length,), generator=generator).tolist() for length in LENGTHS]
    if kind.head == "masked" and model.config.is_encoder_decoder:
        answers = [_answered_by(model, tokens) for tokens in drawn]
        chosen = [logits.argmax(-1).tolist() for logits in answers]
        return Truth(drawn, [], [], chosen, answers)
    outputs = [_forward(model, tokens) for tokens in drawn]
    if not all(bool(torch.isfinite(rows).all()) for rows in outputs):
        raise ValueError("its own forward gives NaN or infinity")
    if not torch.allclose(outputs[0], _forward(model, drawn[0]), rtol=0, atol=1e-6):
        raise ValueError("its own forward is random")
    tokens = [_greedy(model, row) for row in drawn] if kind.head == "causal" else []
    padded = outputs if kind.head == "causal" else _rows(_answer(model, *_padded(drawn)), drawn)
    return Truth(drawn, outputs, padded, tokens)


def _forward(model: Any, tokens: Sequence[int]) -> Tensor:
    answer = _answer(model, *_padded([list(tokens)]))
    return answer[0] if answer.dim() == 3 else answer


def _answer(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, return_dict=True)
    answer: Tensor = out.logits if hasattr(out, "logits") else out[0]
    return answer


def _padded(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, S], padded on the right."""
    size = max(map(len, rows))
    ids = torch.tensor([row + [0] * (size - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (size - len(row)) for row in rows])


def _rows(out: Tensor, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """An output [B, S, C] or [B, C] as what belongs to each sequence."""
    return [part[: len(row)] if out.dim() == 3 else part[None] for part, row in zip(out, rows, strict=True)]


def _greedy(model: Any, tokens: Sequence[int]) -> list[int]:
    row = list(tokens)
    for _ in range(STEPS):
        row.append(int(_forward(model, row)[-1].argmax()))
    return row[len(tokens) :]


def _answered_by(model: Any, tokens: Sequence[int]) -> Tensor:
    """The logits [STEPS, V] of a greedy answer, from the start token on."""
    ids, mask = _padded([list(tokens)])
    row, found = [model.config.decoder_start_token_id], list[Tensor]()
    with torch.no_grad():
        for _ in range(STEPS):
            out = model(input_ids=ids, attention_mask=mask, decoder_input_ids=torch.tensor([row]), return_dict=True)
            found.append(out.logits[0, -1])
            row.append(int(found[-1].argmax()))
    return torch.stack(found)


# -- what was made of it -------------------------------------------------------------------------


def _compiled(kind: Kind, stage: str, output: Path, truth: Truth, captured: _Captured) -> dict[str, Any]:
    from optc.compiler.diagnostics import OptcError

    uncached = ""
    try:
        run = _runner(kind, stage, truth)
        program = captured.program()
        try:
            problems, difference = run(stage, output, truth, program)
        except OptcError as error:
            if "a KV cache" not in error.what:
                raise
            uncached = " ".join(f"{error.what}: {error.where}".split())[:400]
            problems, difference = _decoded(stage, output, truth, program, kv_cache="none")
    except OptcError as error:
        outcome = {5: "gate"}.get(error.exit_code, "refused" if 2 <= error.exit_code <= 6 else "crashed")
        reason = error.what + (f" ({error.why})" if error.why else "")
        row = {"outcome": outcome, "exit": error.exit_code, "reason": " ".join(reason.split())[:400]}
        return row | ({"where": error.where[:400]} if error.where else {})
    except Exception as error:  # noqa: BLE001 - a crash is a result here
        return {"outcome": "crashed", "reason": _line(error), "where": _place(error)}
    outcome = "wrong" if problems else "uncached" if uncached else "exact"
    reason = "; ".join(problems) or uncached
    return {"outcome": outcome, "difference": float(f"{difference:.2g}")} | ({"reason": reason} if reason else {})


def _runner(kind: Kind, stage: str, truth: Truth) -> Callable[..., Compared]:
    if truth.answers:
        return _proved if stage == "capture" else _answered
    return _captured if stage == "capture" else _decoded if kind.head == "causal" else _encoded


def _place(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    assert trace is not None
    return f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"


Compared = tuple[list[str], float]
"""What differs, and the largest difference as a share of the largest output."""


def _captured(stage: str, output: Path, truth: Truth, program: Any) -> Compared:
    """The captured program on the padded batch and on the first sequence alone."""
    module = program.exported.module()

    def run(*inputs: Tensor) -> Sequence[Tensor]:
        out = module(*inputs)
        return out if isinstance(out, tuple) else (out,)

    return _whole(program.contract, run, truth)


def _proved(stage: str, output: Path, truth: Truth, folder: Path) -> Compared:
    """Two programs as the capture itself held them to the model's own forward."""
    from optc.capturing import capture_for_compile

    cpu = torch.device("cpu")
    captured = capture_for_compile(
        folder, None, dtype="fp32", trust_remote_code=False, text=None, work_folder=None, device=cpu
    )
    return [] if captured.proof.proved else ["nothing was compared"], max(
        figures.relative for figures in captured.proof.figures
    )


def _answered(stage: str, output: Path, truth: Truth, folder: Path) -> Compared:
    """A session of two programs: greedy answers to each sequence, together."""
    import optc

    _compile(stage, output, folder)
    with optc.load(output).session as session:
        logits = session.prefill(truth.sequences)
        steps = [logits]
        for step in range(STEPS - 1):
            steps.append(session.decode([tokens[step] for tokens in truth.tokens]))
    found = torch.from_numpy(np.stack(steps, 1))
    problems, worst = _gaps(list(zip(found, truth.answers, strict=True)))
    chosen = found.argmax(-1).tolist()
    if chosen != truth.tokens:
        problems.append(f"greedy tokens {chosen} are not {truth.tokens}")
    return problems, worst


def _encoded(stage: str, output: Path, truth: Truth, program: Any) -> Compared:
    """The artifact in its engine, as `optc compile` opens it. A type under a head that does not generate is run whole,
    also where transformers would generate with its class."""
    from optc.compiler.artifact.engines import find_engine

    whole = {"kv_cache": "none"} if program.contract.kind == "decoder" else {}
    manifest = _compile(stage, output, program, **whole)
    runner = find_engine(manifest.engine, stage).open_runner(output, manifest)
    return _whole(manifest.programs["model"].contract, runner, truth)


def _whole(contract: Any, run: Callable[..., Any], truth: Truth) -> Compared:
    if truth.calls:
        return _gaps(pairs(contract, run, truth.calls))
    found: list[tuple[Tensor, Tensor]] = []
    last = len(truth.sequences) - 1
    for chosen, wanted in (((0, 1, 2), truth.padded), ((0,), truth.outputs[:1]), ((last,), truth.outputs[last:])):
        rows = [truth.sequences[i] for i in chosen]
        ids, mask = _padded(rows)
        positions = torch.arange(ids.shape[1]).expand(ids.shape).contiguous()
        made = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        made["token_type_ids"] = torch.zeros_like(ids)
        with torch.no_grad():
            out = run(*(made[spec.role] for spec in contract.inputs))[0]
        found += zip(_rows(out, rows), wanted, strict=True)
    return _gaps(found)


def _gaps(compared: list[tuple[Tensor, Tensor]]) -> Compared:
    worst, problems = 0.0, []
    for found, wanted in compared:
        if found.shape != wanted.shape:
            return [f"outputs of shape {tuple(found.shape)}, not {tuple(wanted.shape)}"], float("inf")
        gap = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
        worst = max(worst, gap if gap == gap else float("inf"))
    if not worst <= TOLERANCE:
        problems.append(f"outputs differ by {worst:.2g} of the largest")
    return problems, worst


def _decoded(stage: str, output: Path, truth: Truth, program: Any, **options: Any) -> Compared:
    """A session: a ragged prefill, greedy steps, and the logits of all tokens of one sequence."""
    import optc

    _compile(stage, output, program, **options)
    with optc.load(output).session as session:
        logits = session.prefill(truth.sequences)
        compared = [(torch.from_numpy(row), out[-1]) for row, out in zip(logits, truth.outputs, strict=True)]
        chosen: list[list[int]] = [[] for _ in truth.sequences]
        for step in range(STEPS):
            tokens = [int(row.argmax()) for row in logits]
            for row, token in zip(chosen, tokens, strict=True):
                row.append(token)
            if step < STEPS - 1:
                logits = session.decode(tokens)
        scored = torch.cat([torch.from_numpy(part) for part in session.score(truth.sequences[0])])
    problems, worst = _gaps([*compared, (scored, truth.outputs[0])])
    if chosen != truth.tokens:
        problems.append(f"greedy tokens {chosen} are not {truth.tokens}")
    return problems, worst


def _compile(target: str, output: Path, program: Any, **options: Any) -> Any:
    from common import OPEN_GATE

    import optc

    return optc.compile(program, target=target, output=output, **OPEN_GATE, **options).manifest


if __name__ == "__main__":
    sys.exit("run benchmarks/zoo.py")
