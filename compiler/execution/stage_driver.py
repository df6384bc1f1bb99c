"""Run any stage of a compile on token sequences, so that stages can be compared.

Whatever a stage takes (whole sequences, a linear cache, a paged pool), the result is the same: the
logits of every token of every sequence, and what each attention layer returned. Stages with a cache
are driven the hard way: a ragged right-padded prefill, a chunk, single-token steps, over caches that
start full of garbage and blocks in shuffled order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from optc.compiler.analysis.aliases import Storage
from optc.compiler.execution.block_manager import BlockManager
from optc.compiler.execution.cross_rows import Cross, calls_of, empty_caches, padded_cross, random_cross
from optc.compiler.ir.contract import CROSS_ROLES, HELD_ROLES, STATE_ROLE, Input, Output, OutputRole
from optc.compiler.ir.cross_inputs import decoder_inputs
from optc.compiler.ir.devices import program_device, seeded
from optc.compiler.ir.program import Program
from optc.compiler.ops.dialect.paged_tree import CAUSAL
from optc.compiler.ops.library import Axes, OpSpec, specs
from optc.compiler.rewriting.eager import runner
from optc.compiler.rewriting.known_products import KnownProducts
from optc.compiler.rewriting.made_weights import MadeWeights
from optc.compiler.rewriting.retrace import Handler, Replay

_FLAT: dict[Axes, Callable[[Tensor], Tensor]] = {
    "BHSD": lambda out: out.transpose(1, 2).flatten(2),
    "BSC": lambda out: out,
    "NHD": lambda out: out.flatten(1),
}
"""An attention's result laid out like the tokens: [B, S, H * Dv], or [N, H * Dv]."""


@dataclass(frozen=True)
class StageRun:
    """What a stage computed.

    Attributes:
        logits: what `role` says. logits: per sequence [len, V]; hidden (of an encoder): [len, C], and then of each
            of the keys and values that a decoder reads [len, H * D]; classes: [len, C], or [1, C] for one answer per
            sequence; embedding: [1, D]; output: each output of a plain module, whatever its shape, or of an encoder
            with several answers each of them, per sequence.
        taps: per attention layer, in graph order, per sequence: the output [len, H * Dv].
        predicts_next: whether the row of a token is about the token after it (decoders).
        seen: what comparisons found out about this run alone (see `drift`), so that the next one need not. Its numbers
            do not change; one with others (`replace`) has seen nothing.
    """

    logits: list[Tensor]
    taps: list[list[Tensor]]
    role: OutputRole = "logits"
    predicts_next: bool = True
    seen: dict[Any, Any] = field(init=False, repr=False, compare=False, default_factory=dict)

    def equals(self, other: StageRun) -> bool:
        """Whether all numbers are the same as those of another run on the same inputs, and none of them is NaN."""
        other = other.beside(self)
        rows, others = ([*run.logits, *(row for tap in run.taps for row in tap)] for run in (self, other))
        return len(rows) == len(others) and all(map(torch.equal, rows, others))

    def beside(self, other: StageRun) -> StageRun:
        """The same on the device of another run, so that the two can be compared."""
        device = other.logits[0].device
        if self.logits[0].device == device:
            return self
        logits = [row.to(device) for row in self.logits]
        return replace(self, logits=logits, taps=[[row.to(device) for row in tap] for tap in self.taps])


def run_stage(
    program: Program,
    sequences: Sequence[Sequence[int]],
    *,
    chunk: int = 4,
    steps: int = 3,
    seed: int = 0,
    engine: Engine | None = None,
    replay: type[Replay] = Replay,
    cross: Cross = (),
    made: MadeWeights | None = None,
    products: KnownProducts | None = None,
) -> StageRun:
    """Run a decoder or encoder Program on token sequences of unequal length.

    Args:
        engine: runs what was written of the program in place of the program, which says what the inputs mean; there
            are no taps then.
        chunk: tokens per row in the one chunk of prefill that follows the first (cached stages).
        steps: single-token decode steps at the end of each sequence (cached stages). A sequence too
            short for all of these has fewer.
        seed: of the garbage in caches and the order of blocks.
        replay: how the calls of the graph are run.
        cross: of a decoder that reads an encoder, what each row reads; random numbers where there is none. Its
            sequences are equally long.
        made: keeps what is made of codes for a run of another stage, too.
        products: keeps products for the next stage that is run.
    """
    assert sequences, "at least one sequence"
    assert all(len(tokens) > 0 for tokens in sequences), "no empty sequences"
    kind = program.contract.kv_cache.kind

    tapped = _Tapped(program, replay, made or MadeWeights(), products) if engine is None else None

    def run(taps: list[Tensor]) -> Callable[..., list[Any]]:
        if tapped is not None:
            return tapped.into(taps)
        assert engine is not None
        return lambda *flat: list(engine(*flat))

    if kind == "none":
        return _run_whole(program, run, sequences)
    if program.contract.cross is not None:
        return _run_reading(program, run, sequences, cross or random_cross(program, len(sequences)), (chunk, steps))
    plan = _plan([len(tokens) for tokens in sequences], chunk, steps)
    drive = _run_linear if kind == "linear" else _run_paged
    return drive(program, run, sequences, plan, torch.Generator().manual_seed(seed))


def run_module(program: Program, inputs: Sequence[Tensor], replay: type[Replay] = Replay) -> list[Tensor]:
    """Run a program of kind "module" on example tensors.

    Returns:
        Its outputs, flat, and behind them the inputs that it writes into, of which it gets copies. Random numbers begin
        alike each time.
    """
    device, written = program_device(program), written_inputs(program)
    tensors = [item.to(device) for item in inputs]
    for index in written:
        tensors[index] = tensors[index].clone()
    with torch.no_grad(), seeded(device):
        return [*replay(program, {}).outputs(*tensors), *(tensors[index] for index in written)]


def written_inputs(program: Program) -> list[int]:
    """The inputs of a program that it writes into, by their places."""
    storage = Storage(program.graph)
    return [index for index, node in enumerate(program.user_inputs()) if storage.written(node)]


Engine = Callable[..., Sequence[Tensor]]
"""Called with the inputs of a contract, flat, it returns the outputs; caches that are kept in place it writes."""

Runner = Callable[[list[Tensor]], Callable[..., list[Any]]]
"""Given a list for attention outputs, a function of flat inputs."""

Call = list[tuple[int, int, int]]
"""One call: (sequence, start, end), the tokens that it feeds."""

Rows = Callable[[Tensor], Iterable[Tensor]]
"""Takes a tensor laid out like the tokens of a call apart into each sequence's rows [n, ...]."""


def _plan(lengths: Sequence[int], chunk: int, steps: int) -> list[Call]:
    """Ragged prefill of all but the last tokens, then a chunk, then single tokens.

    A sequence too short to take part in all of the later calls takes part in the last ones, so that
    every sequence ends with the last call that it can reach.
    """
    tail = [size for size in (chunk, *[1] * steps) if size > 0]
    first = [next(i for i in range(len(tail) + 1) if sum(tail[i:]) < length) for length in lengths]
    done = [length - sum(tail[i:]) for length, i in zip(lengths, first, strict=True)]
    plan: list[Call] = [[(row, 0, end) for row, end in enumerate(done)]]
    for index, size in enumerate(tail):
        call = [(row, done[row], done[row] + size) for row in range(len(done)) if index >= first[row]]
        for row, _, end in call:
            done[row] = end
        plan += [call] if call else []
    return plan


# -- one call with taps -----------------------------------------------------------------------


class _Tapped:
    """The program as functions of flat inputs that also append attention outputs to a list.

    Taps are laid out like the tokens: [B, S, H * Dv], or [N, H * Dv] for a flattened token axis.
    """

    def __init__(
        self, program: Program, replay: type[Replay], made: MadeWeights, products: KnownProducts | None
    ) -> None:
        self._taps: list[Tensor] = []
        handlers = {spec.op: self._handler(spec, _FLAT[spec.attends]) for spec in specs() if spec.attends is not None}
        self._run = runner(program, handlers, replay, made, products)

    def into(self, taps: list[Tensor]) -> Callable[..., list[Any]]:
        """Appends to this list from now on."""
        self._taps = taps
        return self._run

    def _handler(self, spec: OpSpec, flatten: Callable[[Tensor], Tensor]) -> Handler:
        def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            result = spec.op(*args, **kwargs)
            self._taps.append(flatten(result[0] if isinstance(result, tuple | list) else result))
            return result

        return call


class _Collector:
    """Puts rows of logits and taps back where their tokens are."""

    def __init__(self, count: int) -> None:
        self._logits: list[list[Tensor]] = [[] for _ in range(count)]
        self._taps: list[list[list[Tensor]]] = []

    def add(self, call: Call, rows: Rows, logits: Tensor, taps: list[Tensor]) -> None:
        """Append what one call returned."""
        if not self._taps:
            self._taps = [[[] for _ in self._logits] for _ in taps]
        for store, tensor in zip([self._logits, *self._taps], [logits, *taps], strict=True):
            for (index, _, _), row in zip(call, rows(tensor), strict=True):
                store[index].append(row)

    def result(self) -> StageRun:
        logits, *taps = ([torch.cat(parts) for parts in store] for store in (self._logits, *self._taps))
        return StageRun(logits, taps)


# -- the three kinds of stage -----------------------------------------------------------------


def _by_length(call: Call) -> list[Call]:
    """A ragged call in one, or with its longest row apart where this is as long as any two others: most of what is computed
    would be padding."""
    first, *others = sorted(call, key=lambda item: item[1] - item[2])
    if len(others) < 2 or first[2] - first[1] < 2 * (others[0][2] - others[0][1]):
        return [call]
    return [[first], [item for item in call if item is not first]]


def _padded(sequences: Sequence[Sequence[int]], call: Call, device: torch.device) -> Tensor:
    """The tokens of a call, right-padded with the last one: [B, S]."""
    size = max(end - start for _, start, end in call)
    parts = [list(sequences[row][start:end]) for row, start, end in call]
    return torch.tensor([part + part[-1:] * (size - len(part)) for part in parts], device=device)


def _unpadded(call: Call) -> Rows:
    return lambda tensor: [part[: end - start] for part, (_, start, end) in zip(tensor, call, strict=True)]


def _split(call: Call) -> Rows:
    return lambda tensor: tensor.split([end - start for _, start, end in call])


def _mask(call: Call, device: torch.device) -> Tensor:
    """attention_mask [B, T] with as many ones per row as it has tokens after the call."""
    ends = torch.tensor([end for _, _, end in call], device=device)
    return (torch.arange(int(ends.max()), device=device) < ends[:, None]).long()


def _run_whole(program: Program, run: Runner, sequences: Sequence[Sequence[int]]) -> StageRun:
    everything = [(row, 0, len(tokens)) for row, tokens in enumerate(sequences)]
    contract = program.contract
    more = [
        number > 0 and (spec.role in CROSS_ROLES or number < contract.answers)
        for number, spec in enumerate(contract.outputs)
    ]
    collector = _Collector(len(sequences))
    behind: list[tuple[Output, Tensor]] = []
    for call in [everything] if any(more) else _by_length(everything):
        taps: list[Tensor] = []
        out = run(taps)(*_whole_inputs(program, sequences, call))
        collector.add(call, _unpadded(call), _by_token(out[0], contract.outputs[0].role), taps)
        behind = [(spec, item) for spec, item, wanted in zip(contract.outputs, out, more, strict=True) if wanted]
    found = collector.result()
    for spec, item in behind:
        rows = item.transpose(1, 2).flatten(2) if spec.role in CROSS_ROLES else _by_token(item, spec.role)
        found.logits.extend(_unpadded(everything)(rows))
    return replace(found, role=contract.compared_as, predicts_next=contract.kind == "decoder")


def _whole_inputs(program: Program, sequences: Sequence[Sequence[int]], call: Call) -> list[Tensor]:
    """What a stage without a cache reads, in the order of its contract; token ids come first."""
    device = program_device(program)
    ids = _padded(sequences, call, device)
    size = ids.shape[1]
    made: dict[str, Callable[[], Tensor]] = {
        "input_ids": lambda: ids,
        "position_ids": lambda: torch.arange(size, device=device).expand(ids.shape).contiguous(),
        "attention_mask": lambda: _mask(call, device),
        "token_type_ids": lambda: torch.zeros_like(ids),
    }
    for spec, rows in zip(_state_inputs(program), _states(program, call), strict=True):
        made[spec.role] = lambda rows=rows: torch.stack(  # type: ignore[misc]
            [torch.cat((item, item.new_zeros(size - len(item), item.shape[1]))) for item in rows]
        )
    return [made[spec.role]() for spec in program.contract.inputs]


def _state_inputs(program: Program) -> list[Input]:
    """The inputs of a draft model that hold a row of numbers for each token."""
    return [spec for spec in program.contract.inputs if spec.role in ("base_states", "own_states")]


def _states(program: Program, call: Call) -> list[list[Tensor]]:
    """For each of `_state_inputs` random rows [n, C] of each part of a call: the same for a token in whatever call it is fed."""
    device, found = program_device(program), []
    for number, spec in enumerate(_state_inputs(program)):
        parts = []
        for row, start, end in call:
            generator = torch.Generator().manual_seed(2 * row + number)
            made = torch.randn((end, int(spec.dims[-1])), generator=generator)[start:]
            parts.append(made.to(device=device, dtype=getattr(torch, spec.dtype)))
        found.append(parts)
    return found


def _by_token(out: Tensor, role: OutputRole) -> Tensor:
    """An output as [B, S, ...]. One answer for a whole sequence stands at its first token, and nothing after it."""
    if out.dim() > 2:
        return out
    return out[:, None] if role in ("classes", "embedding") else out[..., None]


def _caches(program: Program, sizes: dict[str, int], generator: torch.Generator) -> list[Tensor]:
    """Caches, pools and states full of garbage, with dynamic axes of the given sizes."""

    device = program_device(program)

    def garbage(spec: Input) -> Tensor:
        shape = [size if isinstance(size, int) else sizes[size] for size in spec.dims]
        made = torch.randn(shape, generator=generator)  # the same numbers on every device
        return made.to(device=device, dtype=getattr(torch, spec.dtype))

    return [garbage(spec) for spec in _held_inputs(program)]


def _held_inputs(program: Program) -> list[Input]:
    """What a program keeps of earlier tokens, in order."""
    return [spec for spec in program.contract.inputs if spec.role in HELD_ROLES]


def _run_linear(
    program: Program,
    run: Runner,
    sequences: Sequence[Sequence[int]],
    plan: list[Call],
    generator: torch.Generator,
) -> StageRun:
    """Caches live in a store of full size; a call gets the rows it needs and writes them back.

    Caches that are returned go in as long as the longest past (0 at first) and come back grown;
    caches written in place have spare capacity; those of a fixed capacity have that.
    """
    cache = program.contract.kv_cache
    capacity = cache.capacity or max(len(tokens) for tokens in sequences) + 3
    assert max(len(tokens) for tokens in sequences) <= capacity, "a sequence is longer than the KV cache"
    sizes = dict.fromkeys(("capacity", "past"), capacity) | {"batch": len(sequences)}
    stores = _caches(program, sizes, generator)
    collector = _Collector(len(sequences))
    for call in itertools.chain.from_iterable(map(_by_length, plan)):
        taps: list[Tensor] = []
        rows = torch.tensor([row for row, _, _ in call], device=program_device(program))
        past = capacity if cache.in_place or cache.capacity else max(start for _, start, _ in call)
        kept = [spec.role == STATE_ROLE for spec in _held_inputs(program)]
        caches = [
            (store[rows] if whole else store[rows, :, :past]).contiguous()
            for store, whole in zip(stores, kept, strict=True)
        ]
        tokens = _tokens(program, sequences, call)
        if program.contract.input_index("logits_from_end") is None:
            logits, *presents = run(taps)(*tokens, *caches)
        else:
            size = tokens[0].shape[1]
            logits, *presents = run(taps)(*tokens, *caches, torch.arange(size, 0, -1, device=rows.device)[None])
            logits = torch.stack(
                [row.roll(end - start - size, 0) for row, (_, start, end) in zip(logits, call, strict=True)]
            )
        collector.add(call, _unpadded(call), logits, taps)
        for store, held, whole in zip(stores, caches if cache.in_place else presents, kept, strict=True):
            if whole:
                store[rows] = held
            else:
                store[rows, :, : held.shape[2]] = held
    return collector.result()


def _run_reading(
    program: Program, run: Runner, sequences: Sequence[Sequence[int]], cross: Cross, sizes: tuple[int, int]
) -> StageRun:
    """Answers of one length, over caches that begin empty and come back grown, and over what each row reads."""
    length, device = len(sequences[0]), program_device(program)
    assert all(len(row) == length for row in sequences), "answers of one length"
    masks, read = padded_cross(program, cross, device)
    caches = empty_caches(program, len(sequences), device)
    collector = _Collector(len(sequences))
    for start, end in calls_of(length, *sizes):
        call = [(row, start, end) for row in range(len(sequences))]
        taps: list[Tensor] = []
        ids = _padded(sequences, call, device)
        logits, *caches = run(taps)(*decoder_inputs(program.contract.inputs, ids, masks, caches, read))
        collector.add(call, _unpadded(call), logits, taps)
    return collector.result()


def _tokens(program: Program, sequences: Sequence[Sequence[int]], call: Call) -> tuple[Tensor, Tensor]:
    """Tokens of a call, and where they go: a mask, or how many tokens each row holds already."""
    device = program_device(program)
    ids = _padded(sequences, call, device)
    if not program.contract.kv_cache.capacity:
        return ids, _mask(call, device)
    return ids.int(), torch.tensor([start for _, start, _ in call], dtype=torch.int32, device=device)


def _run_paged(
    program: Program,
    run: Runner,
    sequences: Sequence[Sequence[int]],
    plan: list[Call],
    generator: torch.Generator,
) -> StageRun:
    size = program.contract.kv_cache.block_size
    count = sum(-(-len(tokens) // size) for tokens in sequences) + 2
    manager = BlockManager(count, size, order=torch.randperm(count, generator=generator).tolist())
    pools = _caches(program, {"num_blocks": count}, generator)
    device = program_device(program)
    for request in range(len(sequences)):
        manager.start(request)
    collector = _Collector(len(sequences))
    for call in plan:
        taps: list[Tensor] = []
        inputs = list(manager.step([(row, sequences[row][start:end]) for row, start, end in call]))
        if program.contract.input_index("tree") is not None:
            inputs.append(torch.full_like(inputs[0], CAUSAL))
        if program.contract.input_index("logits_indices") is not None:
            inputs.append(torch.arange(len(inputs[0])))
        inputs += [torch.cat(parts) for parts in _states(program, call)]
        logits = run(taps)(*(item.to(device) for item in inputs), *pools)[0]
        collector.add(call, _split(call), logits, taps)
    return collector.result()
