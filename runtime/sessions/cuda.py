"""Sessions over saved programs on an NVIDIA GPU: prefill through the program, decode steps as CUDA graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch

import optc.compiler.kernels  # noqa: F401  (registers them)
from optc.compiler.artifact.manifest import Manifest
from optc.compiler.diagnostics import TargetError
from optc.compiler.execution.block_manager import StepInputs
from optc.compiler.ir.devices import program_device, to_device
from optc.compiler.ir.program import Program
from optc.compiler.kernels.cuda.dispatch import kernels_only
from optc.compiler.kernels.cuda.paged_attention import SHORT_CONTEXT
from optc.compiler.kernels.kernel import without_kernel
from optc.compiler.ops.dialect.sampling import NO_TOKEN
from optc.runtime.sessions.cuda_graphs import Recorder, graph_recorder
from optc.runtime.sessions.cuda_memory import MemoryPlan, left_beside, plan_for, read_bandwidth
from optc.runtime.sessions.decode_step import DecodeStep, RequestState, StepState
from optc.runtime.sessions.dequantized_copies import keep_copies
from optc.runtime.sessions.paged import PREFILL_CHUNK, PagedModel, PagedSession
from optc.runtime.sessions.prompt_call import PromptCall, call_size
from optc.runtime.sessions.row_draws import RowDraws
from optc.runtime.sessions.session import Logits, Session, SessionOptions, most_likely, not_finite
from optc.runtime.sessions.step_graph import without_selection
from optc.runtime.sessions.streaming import Choice, Draw, StreamingSession, choice_of
from optc.runtime.sessions.token_reader import TokenReader
from optc.runtime.sessions.torch_linear import to_logits

LEAST_CAPABILITY = (8, 0)
_LEAST_WIDTH = SHORT_CONTEXT
"""Tokens that the block tables of the narrowest captured step hold; each wider one holds four times as many."""
_AHEAD = 2
"""Tokens beyond those of a step for which there is room when it is started: it leaves the next one's slot."""


def open_artifact(folder: Path, manifest: Manifest, options: SessionOptions) -> Session:
    """The session for a verified artifact, on the first GPU.

    Raises:
        TargetError: no GPU, an old one, or packages that are not here.
        ResourceError: it does not fit the GPU's memory.
    """
    device = check_gpu(str(folder))
    program = Program.load((folder / str(manifest.engine_info["graph"])).parent)
    refused = without_kernel(program, "cuda")
    if refused:
        raise TargetError(
            f"{len(refused)} call(s) of the program have no kernel in this version of optc",
            where="; ".join(refused[:4]),
            remedy="compile the model again",
        )
    plan = plan_for(program, device, num_blocks=options.num_blocks)
    return CudaSession(to_device(program, device), plan)


def check_gpu(where: str) -> torch.device:
    """The first GPU, where it can run what is written for CUDA.

    Raises:
        TargetError: says what is missing.
    """
    if not torch.cuda.is_available():
        built = torch.version.cuda
        raise TargetError(
            "an NVIDIA GPU is needed, and there is none here",
            where=where,
            why="torch finds no GPU, or no driver that is new enough" if built else "this torch was built without CUDA",
            remedy="run it on a machine with one"
            + ("; nvidia-smi names the driver" if built else ", with a torch for CUDA"),
        )
    device = torch.device("cuda", 0)
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        raise TargetError(
            "the GPU is too old",
            where=torch.cuda.get_device_name(device),
            why=f"compute capability {capability[0]}.{capability[1]}; the kernels need "
            f"{LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}",
            remedy="use a GPU of the Ampere generation or later",
        )
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise TargetError(
            "the kernels need the package triton, which is not installed",
            where=where,
            remedy="pip install triton, in the version that this torch names",
        ) from error
    return device


class CudaSession(PagedSession, StreamingSession):
    """A session over a paged program on one device.

    Decode steps are captured per batch size, rounded up to a power of two, and per width of the block tables; rows
    beyond the batch are padding. Steps that choose tokens follow each other on the device: the next one is started
    before the tokens of the last one are read. Those that draw are captured apart from greedy ones. Prompts are calls of
    sizes that repeat, the rest of which is padding, and are captured when a size comes again: see `PromptCall`.

    Attributes:
        memory: the plan that the pools were made by.

    Args:
        program: legalized, on the device where it runs. On the CPU, operators run by their references and nothing is
            captured; on a GPU a call that its kernel does not take is refused (`KernelRefusalError`).
        record: what records steps and prompts; None: CUDA graphs on a GPU, and nothing elsewhere.
    """

    def __init__(self, program: Program, plan: MemoryPlan, *, record: Recorder | None = None) -> None:
        device = program_device(program)
        # `forward` itself: the module's hook would compare all inputs with their symbolic sizes before each call.
        super().__init__(program.module().forward, program.contract, num_blocks=plan.num_blocks, device=device)
        self.program, self.memory = program, plan
        self._step_graph = without_selection(program).forward
        self._steps: dict[tuple[int, int, Choice], DecodeStep] = {}
        self._prompts: dict[tuple[int, int], PromptCall] = {}
        self._record = record or (graph_recorder() if device.type == "cuda" else None)

    @property
    def model(self) -> PagedModel:
        return dataclasses.replace(
            super().model,
            step=self._step_graph,
            record=self._record,
            prompt_tokens=self.memory.prompt_tokens,
            chunk=min(self.prefill_chunk, PREFILL_CHUNK),
            on_device=True,
        )

    @property
    def prefill_chunk(self) -> int:
        return self.memory.chunk if self._selects else self.chunk

    def keep_dequantized(self) -> int:
        """Keep dequantized copies of packed weights where the plan leaves room, before anything is captured; see
        `dequantized_copies`. Their bytes; 0 where no kernels run."""
        on_gpu = self._device.type == "cuda"
        return keep_copies(self.program, left_beside(self.memory, self._device)) if on_gpu else 0

    @property
    def warm_up_calls(self) -> int:
        return 2  # the second one is captured

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else ""

    def read_bandwidth(self) -> float | None:
        return read_bandwidth(self._device) if self._device.type == "cuda" else None

    def close(self) -> None:
        self._steps.clear()
        self._prompts.clear()
        for name in ("program", "_graph", "_step_graph"):  # they are gone where it was closed before
            self.__dict__.pop(name, None)
        super().close()

    def _compute(self, inputs: StepInputs, *, every: bool = False) -> Logits:
        size = call_size(len(inputs.input_ids), len(inputs.context_lens))
        is_captured = size[0] <= self.memory.prompt_tokens
        # A call beyond that is padded as well where it is long: cuDNN makes a plan for each size.
        if (is_captured or (self._selects and len(inputs.input_ids) > PREFILL_CHUNK)) and not every:
            return to_logits(self._prompt(size)(inputs))
        return super()._compute(inputs, every=every)

    def _decode(self, tokens: Sequence[int]) -> Logits:
        if any(row not in self._manager for row in range(len(tokens))):
            return super()._decode(tokens)
        self._manager.reserve([(row, 1) for row in range(len(tokens))])
        step = self._step(len(tokens), max(self.lengths) + 1)
        step.load(self._states(tokens))
        step.run()
        logits = to_logits(step.logits[: len(tokens)])
        self._note(tokens)
        return logits

    def choose(self, logits: Logits, draws: Sequence[Draw]) -> list[int]:
        self._check_batch(len(draws))
        kind = choice_of(draws)
        if kind == "greedy":
            return most_likely(logits)
        choice = RowDraws(len(draws), self._device, self.vocab_size if kind == "penalized" else None)
        choice.load(draws, self._texts())
        positions = torch.tensor([length - 1 for length in self.lengths], device=self._device)
        with kernels_only():
            chosen: list[int] = choice.choose(torch.from_numpy(logits).to(self._device), positions).tolist()
        _check_finite(chosen)
        return chosen

    def stream(
        self, tokens: Sequence[int | None], steps: int, draws: Sequence[Draw] | None = None
    ) -> Iterator[list[int | None]]:
        self._check_batch(len(tokens))
        self._check_some(tokens)
        chosen, left, running = list(tokens), steps, _running(tokens)
        while left:
            longest = max(self.lengths[row] for row in running)
            step = self._step(len(tokens), longest + 1, choice_of(draws or ()))
            fits = step.width * self._manager.block_size - longest
            count = min(left, self.context_length - longest, fits)
            if not count:  # as `decode` says it
                self._check_some(chosen)
            for found in self._follow(step, chosen, count, draws or ()):
                yield found
                chosen = found
                left -= 1

    def _follow(
        self, step: DecodeStep, tokens: list[int | None], count: int, draws: Sequence[Draw]
    ) -> Iterator[list[int | None]]:
        """`count` steps on the device, one of them ahead of the one whose tokens are read."""
        running, reader = set(_running(tokens)), TokenReader(step.batch, self._device)
        self._reserve_ahead(step, running, 0, count)
        step.load(self._states(tokens), draws, self._held(tokens) if choice_of(draws) == "penalized" else ())
        step.run()
        reader.start(step.tokens)
        fed = tokens
        for index in range(count):
            if index + 1 < count:
                self._reserve_ahead(step, running, 1, count - index)
                step.run()
                found = reader.turn(step.tokens)
            else:
                found = reader.last()
            self._note(fed)
            fed = [found[row] if row in running else None for row in range(len(tokens))]
            _check_finite(fed)
            yield fed

    # -- state ------------------------------------------------------------------------------

    def _step(self, rows: int, tokens: int, choice: Choice = "greedy") -> DecodeStep:
        """The captured step for so many rows of up to so many tokens."""
        size = self._manager.block_size
        batch, width = 1, _LEAST_WIDTH
        while batch < rows:
            batch *= 2
        while width < tokens:
            width *= 4
        width = -(-min(width, max(self.context_length, tokens)) // size)
        key = (batch, width, choice)
        if key not in self._steps:
            tables = self.vocab_size if choice == "penalized" else None
            self._steps[key] = DecodeStep(
                self._step_graph,
                self._pools,
                StepState(batch, width, self._device),
                block_size=size,
                selects=self._selects,
                draws=None if choice == "greedy" else RowDraws(batch, self._device, tables),
                record=self._record,
            )
        return self._steps[key]

    def _prompt(self, size: tuple[int, int]) -> PromptCall:
        if size not in self._prompts:
            width = min(-(-self.context_length // self._manager.block_size), self._manager.num_blocks)
            self._prompts[size] = PromptCall(
                self._graph,
                self._pools,
                tokens=size[0],
                requests=size[1],
                width=width,
                record=self._record if size[0] <= self.memory.prompt_tokens else None,
            )
        return self._prompts[size]

    def _states(self, tokens: Sequence[int | None]) -> list[RequestState | None]:
        manager = self._manager
        return [
            None if token is None else RequestState(token, manager.length(row), manager.blocks(row))
            for row, token in enumerate(tokens)
        ]

    def _held(self, tokens: Sequence[int | None]) -> list[Sequence[int]]:
        """The tokens of every row, with the one that is about to be fed."""
        return [row if token is None else [*row, token] for row, token in zip(self._texts(), tokens, strict=True)]

    def _texts(self) -> list[Sequence[int]]:
        """The tokens of every row."""
        return [self._manager.tokens(row) for row in range(len(self.lengths))]

    def _reserve_ahead(self, step: DecodeStep, running: Collection[int], started: int, left: int) -> None:
        """Room for a step beyond `started` ones whose tokens are not known yet, and for the slot that it leaves."""
        wanted = min(started + _AHEAD, left)
        for row in self._manager.reserve([(row, wanted) for row in running]):
            assert isinstance(row, int)
            if started:
                step.set_table(row, self._manager.blocks(row))

    def _check_some(self, tokens: Sequence[int | None]) -> None:
        """As `decode` checks tokens, but for rows that stay as they are."""
        held = [0 if token is None else length for token, length in zip(tokens, self.lengths, strict=True)]
        self._check([[token or 0] for token in tokens], held)

    def _note(self, tokens: Sequence[int | None]) -> None:
        """The pool holds these tokens now, one per row."""
        for row, token in enumerate(tokens):
            if token is not None:
                self._manager.append(row, [token])
                self._manager.commit(row)
                self.lengths[row] = self._manager.length(row)


def _running(tokens: Sequence[int | None]) -> list[int]:
    """The rows that do not stay as they are."""
    return [row for row, token in enumerate(tokens) if token is not None]


def _check_finite(tokens: Sequence[int | None]) -> None:
    """
    Raises:
        GateError: a row got `NO_TOKEN`, as its logits are not finite.
    """
    if NO_TOKEN in tokens:
        raise not_finite(f"row {tokens.index(NO_TOKEN)}")
