"""Rounds of drafts on the device, over programs of the CUDA target on the CPU, against plain decoding and whole texts."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_sessions import LENGTHS, MIXED, PENALIZED, lowered
from eagle3_models import BOUNDARIES, captured_draft, expected
from medusa_heads import write_heads
from recorded_calls import Recordings
from serving import Got, run, take
from stages import apply, captured, sequences
from torch import Tensor

from optc.compiler.diagnostics import TargetError
from optc.compiler.execution.block_manager import StepInputs
from optc.compiler.ir.program import Program
from optc.passes.kv_cache.paged import PageKVCache
from optc.runtime.sampling import Sampling
from optc.runtime.serving.engine import engine_for
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.paged_engine import PagedEngine
from optc.runtime.serving.plan import Chosen, Plan, Rounds
from optc.runtime.serving.request import Generate
from optc.runtime.serving.round import Round
from optc.runtime.serving.round_drafting import RoundDrafting
from optc.runtime.serving.round_runner import RoundRunner
from optc.runtime.sessions.cuda import CudaSession
from optc.runtime.sessions.cuda_memory import MemoryPlan
from optc.runtime.sessions.draft_graphs import draft_graphs
from optc.runtime.speculative.device_drafter import DeviceDrafter, Eagle3OnDevice, Verified
from optc.runtime.speculative.opening import eagle3_on_device
from optc.runtime.speculative.settings import Speculation

COUNT, DEPTH = 24, 3
ONE = np.ones(1, np.int64)
FED = Plan(0 * ONE, ONE, 0 * ONE, [], 0 * ONE, ONE, [], [])


@functools.cache
def base_program() -> Program:
    return lowered(captured("llama"), expose_hidden=BOUNDARIES)


@functools.cache
def draft_program() -> Program:
    return lowered(captured_draft())


def opened(program: Program, blocks: int = 16, record: Recordings | None = None) -> CudaSession:
    return CudaSession(program, MemoryPlan(0, 0, 0, num_blocks=blocks, prompt_tokens=256), record=record)


class Knowing(Eagle3OnDevice):
    """Compares its drafts with those of whole texts, and gives others, of which some are right.

    Attributes:
        texts: what requests get without drafts. wrong: share of the tokens that are not.
        checked: drafts that were compared.
    """

    texts: Sequence[Sequence[int]] = ()
    wrong, checked = 0.2, 0
    engine: PagedEngine

    def draft(self, verified: Verified, drafts: Tensor, count: int) -> None:
        super().draft(verified, drafts, count)
        rng = np.random.default_rng(self.checked)
        rows = self.engine.scheduler.rows
        for row, pick in enumerate(verified.picks.tolist()):
            if not rows.decoding[row] or int(verified.inputs.slot_mapping[pick]) < 0:
                continue
            prompt = self.engine.scheduler.at(row).tokens
            text = next(list(text) for text in self.texts if list(text[: len(prompt)]) == prompt)
            end = int(verified.inputs.position_ids[pick]) + 2
            if end < len(text):
                slots = min(int(rows.room[row]), int(rows.end[row]) - 1) - end
                self._check(text[:end], drafts[row, : min(count, 2 + slots)].tolist())
                right = torch.tensor([*text[end : end + count], *[0] * count][:count])
                bad = torch.from_numpy(rng.random(count) < self.wrong)
                drafts[row, :count] = torch.where(bad, (right + 1) % 128, right)

    def _check(self, text: Sequence[int], found: list[int]) -> None:
        self.checked += 1
        assert found == expected(text, len(found))


def drafter(kind: type[Eagle3OnDevice] = Eagle3OnDevice, blocks: int = 16) -> Eagle3OnDevice:
    made = eagle3_on_device(opened(draft_program(), blocks))
    made.__class__ = kind
    return made


def rounds(session: CudaSession, own: DeviceDrafter | None, *, adaptive: bool = False, **options: int) -> PagedEngine:
    method = "eagle3" if own is not None else "medusa"
    speculation = Speculation(method=method, draft_tokens=DEPTH if own is not None else 0, adaptive=adaptive)  # type: ignore[arg-type]
    chosen = EngineOptions(speculation=speculation, **{"max_running": 4, "token_budget": 64, **options})  # type: ignore[arg-type]
    engine = engine_for(session, chosen, drafter=own)
    assert isinstance(engine, PagedEngine)
    assert isinstance(engine._runner, RoundRunner)
    return engine


def requests(samplings: list[Sampling], lengths: Sequence[int] = LENGTHS, **others: object) -> list[Generate]:
    return [
        Generate(id=str(place), prompt=prompt, max_new_tokens=COUNT, sampling=sampling, **others)  # type: ignore[arg-type]
        for place, (prompt, sampling) in enumerate(zip(sequences(*lengths), samplings, strict=True))
    ]


def plainly(wanted: list[Generate]) -> dict[str, Got]:
    return run(engine_for(opened(base_program()), EngineOptions(max_running=4, token_budget=64)), wanted)


def tokens(got: dict[str, Got]) -> dict[str, list[int]]:
    return {name: item.tokens for name, item in got.items()}


def knowing(
    wanted: list[Generate], plain: dict[str, Got], blocks: int = 16, **options: int
) -> tuple[PagedEngine, Knowing]:
    own = drafter(Knowing, blocks)
    assert isinstance(own, Knowing)
    own.texts = [[*item.prompt, *plain[item.id].tokens] for item in wanted]
    own.engine = rounds(opened(base_program(), blocks), own, **options)
    return own.engine, own


def test_drafts_are_those_of_whole_texts_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy and drawn, ragged; requests join in the middle, and the second time their blocks are found in the pool. Many
    rounds are launched before the host has read those in front of them."""
    extended: list[bool] = []
    extend = Round.extend
    monkeypatch.setattr(Round, "extend", lambda self, limits: (extended.append(True), extend(self, limits))[1])
    wanted = requests(MIXED)
    plain = plainly(wanted)
    engine, own = knowing(wanted, plain)
    for _ in range(2):
        got: dict[str, Got] = {}
        for item in wanted:
            engine.submit(item)
            for _ in range(2):
                take(got, engine.step())
        run(engine, got=got)
        assert tokens(got) == tokens(plain)
    figures = engine.metrics().speculation
    assert figures is not None
    assert figures.acceptance_length is not None
    assert 2 < figures.acceptance_length < 1 + DEPTH
    assert own.checked > 30
    assert len(extended) > 3
    assert engine.metrics().used_blocks == 0


def test_drafts_of_rounds_that_were_dropped_are_not_verified() -> None:
    """Drafts are all right. A request is cancelled, so rounds that were launched ahead are dropped: the drafts on the device
    continue their tokens then, not those of the rows."""
    wanted = requests(MIXED[:1] * 2, (5, 9))
    plain = plainly(wanted)
    engine, own = knowing(wanted, plain)
    own.wrong = 0.0
    runner = engine._runner
    assert isinstance(runner, RoundRunner)
    got: dict[str, Got] = {}
    for item in wanted:
        engine.submit(item)
    while runner._ahead is None:
        take(got, engine.step())
    engine.cancel("0")
    run(engine, got=got)
    figures = engine.metrics().speculation
    assert figures is not None
    assert got["1"].tokens == plain["1"].tokens
    assert figures.drafted_at[0] >= 4
    assert figures.accepted_at == figures.drafted_at


def test_no_rounds_are_launched_ahead_in_which_a_row_could_get_nothing() -> None:
    """A budget that leaves each row a drafted token, where two rounds take up to eight, and drafts end
    where slots do."""
    wanted = requests([Sampling()] * 2, (5, 9))
    plain = plainly(wanted)
    engine, own = knowing(wanted, plain, max_running=2, token_budget=4)
    own.wrong, own._check = 0.0, lambda *_: None  # type: ignore[method-assign]
    collect, least = engine._runner.collect, list[int]()

    def noting() -> Chosen:
        given = collect()
        least.append(int(given.counts.min(initial=DEPTH)))
        return given

    engine._runner.collect = noting  # type: ignore[method-assign]
    assert tokens(run(engine, wanted)) == tokens(plain)
    assert min(least) == 1


def test_a_pool_too_small_for_all() -> None:
    """Requests give way in the middle, and are computed again; rounds end where slots do."""
    wanted = requests([Sampling()] * 3, (60, 61, 62))
    plain = plainly(wanted)
    engine, own = knowing(wanted, plain, blocks=4)
    assert tokens(run(engine, wanted)) == tokens(plain)
    assert engine.metrics().preemptions > 0
    assert own.checked > 5


@pytest.mark.parametrize(
    ("samplings", "others"),
    [(MIXED, {}), (PENALIZED, {}), ([Sampling()] * 3, {"logprobs": 2, "logit_bias": {7: 3.0}})],
    ids=["drawn", "penalized", "open"],
)
def test_recorded_calls(samplings: list[Sampling], others: dict[str, object]) -> None:
    """Rounds, and calls of rows that rounds do not take; twice, with recordings in place of graphs."""
    wanted = requests(samplings, **others)
    plain = plainly(wanted)
    record = Recordings()
    engine = rounds(opened(base_program(), record=record), drafter())
    for _ in range(2):
        assert tokens(run(engine, wanted)) == tokens(plain)
    assert sum(record.replays) > 10
    assert ("a round of drafts" in record.names) == (not others)  # one of the penalized rows is not, and ends last


def test_drafts_that_do_not_pay_are_switched_off() -> None:
    """Rounds without drafts go on writing what later drafts read."""
    wanted = requests([Sampling()] * 3)
    plain = plainly(wanted)
    engine, own = knowing(wanted, plain)
    assert engine._drafting is not None
    rungs = iter([0, 2, 1, 0, 1] * 40)
    engine._drafting._switch = type(
        "Turns", (), {"depth": lambda _, rows: next(rungs), "note": lambda *_, **__: None}
    )()
    assert tokens(run(engine, wanted)) == tokens(plain)
    assert own.checked > 10


def test_rounds_without_drafts_are_launched_as_many_at_once_as_hide_the_host() -> None:
    """And no more than four with drafts, whose launches are long; what the switch is told counts all of a step."""
    engine = rounds(opened(base_program()), drafter())
    drafting = engine._drafting
    assert isinstance(drafting, RoundDrafting)
    told: list[float] = []
    drafting._switch = type("Heard", (), {"note": lambda _, __, seconds, **___: told.append(seconds)})()
    clock = itertools.count(step=0.002)  # seconds of a step, in which the host never waited
    drafting._clock = lambda: next(clock)
    deepest = len(drafting._ladder.rungs)
    for drafting._rung in (0, deepest):
        for _ in range(16):
            drafting.note(
                FED, Chosen(ONE, ONE, rounds=Rounds(np.zeros((6, 1), np.int64), np.ones((6, 1), np.int64), True))
            )
    assert (drafting._paces[0].steps, drafting._paces[deepest].steps) == (8, 4)
    assert told[1:] == pytest.approx([0.002 / 6] * 31)


def test_rounds_of_all_depths_are_captured_before_requests_come() -> None:
    """Whole drafts, half ones, and none: what a switch may ask for."""
    wanted = requests([Sampling()] * 2, LENGTHS[:2])
    session = opened(base_program(), record=Recordings())
    engine = rounds(session, drafter(), adaptive=True, warm_up=True, max_running=2)
    runner = engine._runner
    assert isinstance(runner, RoundRunner)
    assert {depth for _, _, depth, _ in runner._rounds} == {0, 2, DEPTH}
    warmed = set(runner._rounds)
    assert engine._drafting is not None
    rungs = iter([0, 2, 1] * 40)
    engine._drafting._switch = type(
        "Turns", (), {"depth": lambda _, rows: next(rungs), "note": lambda *_, **__: None}
    )()
    run(engine, wanted)
    assert set(runner._rounds) == warmed


def test_heads_of_a_program(tmp_path: Path) -> None:
    write_heads(tmp_path, 64)
    wanted = requests(MIXED)
    plain = plainly(wanted)
    record = Recordings()
    session = opened(lowered(captured("llama"), medusa=tmp_path), record=record)
    engine = rounds(session, None)
    for _ in range(2):
        assert tokens(run(engine, wanted)) == tokens(plain)
    figures = engine.metrics().speculation
    assert figures is not None
    assert figures.verified > 20
    assert len(figures.drafted_at) == 2
    assert "a round of drafts" in record.names


def test_what_is_refused() -> None:
    """States of selected tokens, as earlier versions gave them, and a draft model that the target's passes did not make."""
    inputs = StepInputs(*torch.zeros((3, 4), dtype=torch.int64), *torch.zeros((3, 1, 1), dtype=torch.int32))
    with pytest.raises(TargetError, match="the hidden states of some tokens only"):
        drafter().follow(inputs, {"aux_hidden": torch.zeros(1, 192)})
    with pytest.raises(TargetError, match="compile the draft model again"):
        draft_graphs(apply(PageKVCache(block_size=64), captured_draft()).program)
