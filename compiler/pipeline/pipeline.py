"""Pipeline: an ordered, printable recipe of passes that verifies, gates, dumps, times and resumes.

What the Pipeline does no pass can forget: structural verification before and after, detection of
passes that matched nothing, the numerics gate, a numbered text dump of every stage, and resuming
from the last finished stage.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from optc.compiler.artifact.manifest import PassRecord
from optc.compiler.artifact.publishing import remove_abandoned_in
from optc.compiler.diagnostics import NoMatchError, TargetError, os_errors
from optc.compiler.execution.drift import Drift, measure_each
from optc.compiler.execution.probe import Probe, for_streaming, random_probe, run_probe
from optc.compiler.execution.stage_driver import StageRun
from optc.compiler.execution.widened import own_rounding
from optc.compiler.ir.devices import onednn_products, program_device, to_device
from optc.compiler.ir.program import Program
from optc.compiler.ir.provenance import module_path
from optc.compiler.ir.text import format_program
from optc.compiler.ir.verification import verify_program
from optc.compiler.ops.library import attends
from optc.compiler.pipeline.gate import PASSES_OWN, Ledger, Limits, Verdict, allowed_total, rounds_activations
from optc.compiler.pipeline.quantization_summary import measured_records
from optc.compiler.pipeline.records import pass_record
from optc.compiler.pipeline.rerounding import rerounding_budget
from optc.compiler.pipeline.stages import load_stage, save_stage
from optc.compiler.rewriting.budget import Budget
from optc.compiler.rewriting.known_products import KnownProducts
from optc.compiler.rewriting.made_weights import MadeWeights
from optc.compiler.rewriting.passes import Pass, PassContext, PassResult
from optc.compiler.rewriting.tokenwise import padding_token
from optc.compiler.settings.fields import check_type
from optc.compiler.target.target import Step

Progress = Callable[[int, str], None]


@dataclass(frozen=True)
class Stage:
    """One executable stage: its number, the pass that made it, its text."""

    number: int
    name: str
    text: str

    @property
    def file_name(self) -> str:
        return f"{self.number:02d}-{self.name}.txt"


@dataclass(frozen=True)
class PipelineResult:
    """The last stage, a record per pass, and the text of every stage (stage 0 is the capture)."""

    program: Program
    records: tuple[PassRecord, ...]
    stages: tuple[Stage, ...]


@dataclass(frozen=True, kw_only=True)
class PipelineOptions:
    """How to run a recipe.

    Attributes:
        probe: what the gate feeds; None takes random tokens (or the module's example inputs).
        limits: what may be lost in all; what they leave open is the sum of the passes' budgets.
        dump_ir: folder for numbered text files, one per stage.
        work_dir: folder of finished stages; a rerun continues after the last one.
        allow_noop: let requested passes match nothing.
    """

    probe: Probe | None = None
    limits: Limits = PASSES_OWN
    dump_ir: Path | None = None
    work_dir: Path | None = None
    allow_noop: bool = False
    context: PassContext = field(default_factory=PassContext)
    progress: Progress | None = None


class Pipeline:
    """A recipe of passes. Plain passes are requested; `Step(..., optional=True)` may match nothing."""

    def __init__(self, steps: Sequence[Pass | Step]) -> None:
        """Raises UsageError: not a list of passes and steps."""
        check_type("steps", steps, list | tuple, "a list of passes")
        for step in steps:
            check_type("a step", step, Pass | Step, "a pass, or a Step that holds one")
        self.steps = tuple(step if isinstance(step, Step) else Step(step) for step in steps)

    def __str__(self) -> str:
        return " -> ".join(f"{step.rewrite}{'?' if step.optional else ''}" for step in self.steps)

    def run(self, program: Program, options: PipelineOptions | None = None) -> PipelineResult:
        """Run the passes in order.

        Raises:
            NoMatchError: a requested pass matched nothing (exit code 6).
            TargetError: a pass that the target cannot do without matched nothing (4).
            GateError: a pass moved the numbers by more than it may (5).
            VerificationError: a pass left a malformed program (1).
            UsageError: an argument of another type (2).
        """
        check_type("program", program, Program, "a Program (optc.capture)")
        check_type("options", options, PipelineOptions | None, "PipelineOptions")
        with onednn_products():  # where weights are many, nearly all of the time goes into products
            return _Run(self.steps, options or PipelineOptions()).run(program)


class _Run:
    """The state of one run: outputs of the capture and of the current program on the probe, and what was recorded."""

    def __init__(self, steps: Sequence[Step], options: PipelineOptions) -> None:
        self.steps, self.options = steps, options
        self.records: list[PassRecord] = []
        self.stages: list[Stage] = []
        self.first: StageRun | None = None
        self.outputs: StageRun | None = None
        self.total: Drift | None = None
        self.ledger = Ledger()
        self.made, self.products = MadeWeights(), KnownProducts()
        self.note = ""
        self.keeps_reference = any(step.rewrite.needs_reference for step in steps)
        self.reference: Program | None = None

    def run(self, program: Program) -> PipelineResult:
        verify_program(program, "capture")
        probe = self.options.probe or default_probe(program, self.options.context.seed)
        self.probe, self.note = for_streaming(program, probe)
        self._finish_stage("capture", program)
        context = self.options.context
        key = f"{program.fingerprint()} {context.calibration!r} {context.seed}" if self.options.work_dir else ""
        keys = []
        for step in self.steps:
            key = hashlib.sha256(f"{key} {step.rewrite!r}".encode()).hexdigest()
            keys.append(key)
        capture = program
        if self.options.work_dir:
            remove_abandoned_in(self.options.work_dir)
        start, program = self._resume(program, keys)
        if start < len(self.steps):
            self.first = run_probe(capture, self.probe, products=self.products)
            self.outputs = self.first if program is capture else run_probe(program, self.probe)
            self.products.next_stage()
        del capture  # its weights may be many
        for number, step in enumerate(self.steps[start:], start=start):
            if not step.applies(program):
                continue
            if self.options.progress:
                self.options.progress(number, step.rewrite.name)
            program = self._step(step, program)
            if self.options.work_dir:
                stage = to_device(program, torch.device("cpu"))  # a rerun may be without the device
                save_stage(self.options.work_dir / keys[number], stage, self.records[-1])
        if self.options.progress:
            self.options.progress(len(self.steps), "done")
        return PipelineResult(program, tuple(self.records), tuple(self.stages))

    def _resume(self, program: Program, keys: Sequence[str]) -> tuple[int, Program]:
        """Load the finished stages of an earlier run of the same recipe on the same program."""
        folder = self.options.work_dir
        start = 0
        while folder and start < len(keys):
            if not self.steps[start].applies(program):
                start += 1
                continue
            if not (folder / keys[start]).is_dir():
                break
            self._note_reference(self.steps[start], program)
            before = program
            program, record = load_stage(folder / keys[start])
            program.work_file = before.work_file
            program = to_device(program, program_device(before))
            if record.matched:
                self.ledger.note(self._budget(self.steps[start].rewrite, before), self.steps[start].rewrite.restores)
            self.records.append(record)
            self._finish_stage(record.name, program)
            start += 1
        return start, program

    def _step(self, step: Step, before: Program) -> Program:
        rewrite, begin = step.rewrite, time.perf_counter()
        self._note_reference(step, before)
        result = rewrite.run(before, self._context(rewrite))
        if not result.matched:
            self._no_match(step, result)
            after, verdict = before, None
        else:
            after = result.program.with_contract(passes=(*result.program.contract.passes, str(rewrite)))
            verify_program(after, rewrite.name)
            verdict = self._gate(rewrite, before, after)
            if self.note:
                result, self.note = replace(result, notes=(*result.notes, self.note)), ""  # once is enough
            if rewrite.lossy and not result.linears:
                result = replace(result, linears=measured_records(before, after))
        seconds, allowed = time.perf_counter() - begin, allowed_total(self.ledger.total, self.options.limits)
        self.records.append(pass_record(rewrite, result, verdict, seconds, before, after, allowed))
        self._finish_stage(rewrite.name, after)
        return after

    def _note_reference(self, step: Step, before: Program) -> None:
        """Keep the program in front of the first lossy pass, if any pass will ask for it."""
        if step.rewrite.lossy and self.keeps_reference and self.reference is None:
            self.reference = before

    def _context(self, rewrite: Pass) -> PassContext:
        """What the pass may know; its own progress goes to the run's, with the time that is left."""
        tell, number, begin = self.options.progress, len(self.records), time.perf_counter()

        def progress(done: int, total: int, what: str) -> None:
            if tell:
                left = (time.perf_counter() - begin) / done * (total - done) if done else 0.0
                note = f", {left:.0f} s left" if done else ""
                tell(number, f"{rewrite.name}: {what} ({done} of {total}{note})")

        reference = self.reference if rewrite.needs_reference else None
        return replace(
            self.options.context,
            progress=progress,
            work_dir=self.options.work_dir,
            reference=reference,
            made=self.made,
        )

    def _no_match(self, step: Step, result: PassResult) -> None:
        if step.optional or self.options.allow_noop:
            return
        misses = "; ".join(f"{miss.node}: {miss.reason}" for miss in result.misses[:8])
        if step.needs:
            raise TargetError(
                f"the target needs {step.needs}, which this model does not take",
                where=misses,
                remedy="--kv-cache none (onnx-cpu, inductor-cpu) computes the whole text for each token: exact, and slow; vllm "
                "and trtllm take the model as it is",
            )
        raise NoMatchError(
            f"pass '{step.rewrite.name}' matched nothing",
            where=misses or "no site looked like its pattern",
            remedy="leave the pass out, or allow it to match nothing with --allow-noop",
        )

    def _gate(self, rewrite: Pass, before: Program, after: Program) -> Verdict:
        """Hold a stage to the one before and to the capture."""
        assert self.first is not None
        assert self.outputs is not None
        outputs = run_probe(after, self.probe, made=self.made, products=self.products)
        self.made.forget_unused()
        self.products.next_stage()
        # Of a stage that changes nothing the losses add up to what they did.
        unchanged = self.total is not None and outputs.equals(self.outputs)
        befores = [self.outputs] if self.outputs is self.first or unchanged else [self.outputs, self.first]
        drift, *total_drift = measure_each([self._beside(run, outputs) for run in befores], outputs, self.probe.text)
        if not unchanged:
            self.total = total_drift[0] if total_drift else drift
        total = self.total
        assert total is not None
        budget = self._budget(rewrite, before)
        verdict = Verdict(rewrite.name, drift, total, budget, compute_dtype(after), rewrite.lossy)
        self.ledger.note(budget, rewrite.restores)
        rounding = functools.cache(functools.partial(self._rounding, before))  # a forward: both checks may ask for it
        verdict.check(self.ledger, self.options.limits, attention_paths(before), rounding)
        self.outputs = outputs
        return verdict

    def _beside(self, earlier: StageRun, outputs: StageRun) -> StageRun:
        """An earlier stage's run, without what it wrote into inputs where a pass of the recipe leaves them alone."""
        if outputs.role == "output" and any(step.rewrite.leaves_inputs for step in self.steps):
            return replace(earlier, logits=earlier.logits[: len(outputs.logits)])
        return earlier

    def _budget(self, rewrite: Pass, before: Program) -> Budget | None:
        """What a pass may cost behind this program; None: it must keep the numbers.

        Where activations are rounded while the program runs, a sum in another order moves some of them to the next code,
        and a logit by far more than rounding: what is lost is bounded instead.
        """
        if rewrite.lossy:
            return rewrite.budget(before)
        return rerounding_budget(self.records) if rounds_activations(before) else None

    def _rounding(self, before: Program) -> Drift | None:
        """How far a 16-bit stage is from itself in float32; None where it mixes types that cannot be widened."""
        assert self.outputs is not None
        try:
            return own_rounding(before, self.outputs, self.probe)
        except RuntimeError:
            return None

    def _finish_stage(self, name: str, program: Program) -> None:
        stage = Stage(len(self.stages), name, format_program(program))
        self.stages.append(stage)
        if self.options.dump_ir:
            folder = self.options.dump_ir
            with os_errors("writing the IR dump", str(folder)):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / stage.file_name).write_text(stage.text)


def compute_dtype(program: Program) -> torch.dtype:
    """The floating dtype that most weight bytes have, codes of 8 bits apart (fp32 when there is none)."""
    sizes: dict[torch.dtype, int] = {}
    for _, tensor in program.weights():
        if tensor.is_floating_point() and tensor.itemsize > 1:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else torch.float32


def attention_paths(program: Program) -> list[str]:
    """Module path of every attention operator, in graph order; for messages and plots."""
    return [path for node in program.graph.nodes if attends(node.target) and (path := module_path(node))]


def default_probe(program: Program, seed: int) -> Probe:
    """Random tokens for language models; the example inputs for plain modules."""
    if program.contract.kind != "module":
        model = program.contract.model
        probe = random_probe(model.vocab_size, seed, longest=min(40, model.context_length or 40))
        padding = padding_token(program)
        return probe if padding is None else probe.without(padding, model.vocab_size)
    inputs = program.exported.example_inputs
    return Probe(tensors=example_inputs(program, seed) if inputs is None else tuple(inputs[0]))


def example_inputs(program: Program, seed: int) -> tuple[torch.Tensor, ...]:
    """Random numbers and ones of the shapes of a program's inputs, dynamic axes of size 3."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for spec in program.contract.inputs:
        shape = [size if isinstance(size, int) else 3 for size in spec.dims]
        dtype = getattr(torch, spec.dtype)
        floating = dtype.is_floating_point
        tensors.append(
            torch.randn(shape, generator=generator).to(dtype) if floating else torch.ones(shape, dtype=dtype)
        )
    return tuple(tensors)
