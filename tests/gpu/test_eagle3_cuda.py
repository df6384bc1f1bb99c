"""Rounds of EAGLE-3 drafts on a GPU, against the captured steps of plain decoding: fiction-26m in float32."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
import torch
from conftest import ROOT, shared_path
from cuda_sessions import lowered
from medusa_heads import write_heads
from serving import Got, run
from stages import captured, sequences

import optc
from optc.compiler.capture.eagle3 import capture_eagle3
from optc.compiler.ir.devices import to_device
from optc.compiler.ir.program import Program
from optc.runtime.generation.tokenizer import load_tokenizer
from optc.runtime.measuring.speculation import cut_prompts
from optc.runtime.sampling import Sampling
from optc.runtime.serving.engine import engine_for
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.paged_engine import PagedEngine
from optc.runtime.serving.request import Generate
from optc.runtime.serving.round_runner import RoundRunner
from optc.runtime.sessions.cuda import CudaSession
from optc.runtime.sessions.cuda_memory import plan_for
from optc.runtime.speculative.opening import eagle3_on_device
from optc.runtime.speculative.settings import Speculation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DRAFT = ROOT / "examples" / "fiction-26m-eagle3"
LAYERS = (2, 4, 5)
COUNT = 96


@functools.cache
def programs() -> tuple[Program, Program]:
    """The base and its draft model, on the device."""
    model = shared_path("models", "fiction-26m")
    device = torch.device("cuda", 0)
    base = lowered(optc.capture(model), expose_hidden=LAYERS)
    draft, _ = capture_eagle3(DRAFT, model)
    return to_device(base, device), to_device(lowered(draft), device)


def opened(program: Program, blocks: int) -> CudaSession:
    return CudaSession(program, plan_for(program, torch.device("cuda", 0), num_blocks=blocks, loaded=True))


def engine(blocks: int = 64, **options: int) -> PagedEngine:
    base, draft = programs()
    speculation = Speculation(method="eagle3", draft_tokens=4, adaptive=False)
    chosen = EngineOptions(speculation=speculation, **{"max_running": 8, "token_budget": 256, **options})  # type: ignore[arg-type]
    made = engine_for(opened(base, blocks), chosen, drafter=eagle3_on_device(opened(draft, blocks)))
    assert isinstance(made, PagedEngine)
    return made


@functools.cache
def prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    """Pieces of a book."""
    tokenizer = load_tokenizer(shared_path("models", "fiction-26m"))
    assert tokenizer is not None
    text = tokenizer.encode((ROOT / "examples" / "book.txt").read_text())
    cut = cut_prompts(text, len(lengths), max(lengths))
    return [prompt[:length] for prompt, length in zip(cut, lengths, strict=True)]


def requests(samplings: Sequence[Sampling], lengths: tuple[int, ...], **others: object) -> list[Generate]:
    return [
        Generate(id=str(place), prompt=prompt, max_new_tokens=COUNT, sampling=sampling, **others)  # type: ignore[arg-type]
        for place, (prompt, sampling) in enumerate(zip(prompts(lengths), samplings, strict=True))
    ]


def plainly(wanted: list[Generate]) -> dict[str, list[int]]:
    base, _ = programs()
    return tokens(run(engine_for(opened(base, 64), EngineOptions(max_running=8, token_budget=256)), wanted))


def tokens(got: dict[str, Got]) -> dict[str, list[int]]:
    return {name: item.tokens for name, item in got.items()}


RAGGED = (130, 9, 64, 63, 31)
DRAWN = [Sampling(temperature=0.7, top_k=40, seed=3), Sampling(), Sampling(temperature=0.8, top_p=0.9, seed=9)]


def test_a_ragged_batch_and_what_the_pool_holds() -> None:
    """Twice: the second time prompts begin in the pool, and all calls are replayed."""
    wanted = requests([Sampling()] * len(RAGGED), RAGGED)
    expected, ours = plainly(wanted), engine()
    for _ in range(2):
        assert tokens(run(ours, wanted)) == expected
    figures = ours.metrics().speculation
    assert figures is not None
    assert figures.acceptance_length is not None
    assert figures.acceptance_length > 2
    assert ours.metrics().cached_tokens >= 64 * 2
    assert ours.metrics().used_blocks == 0
    runner = ours._runner
    assert isinstance(runner, RoundRunner)
    assert runner.captured > 0.8 * runner.launched


def test_one_request_at_a_time() -> None:
    wanted = requests([Sampling()] * 3, RAGGED[:3])
    expected, ours = plainly(wanted), engine(max_running=1)
    for item in wanted:
        assert tokens(run(ours, [item])) == {item.id: expected[item.id]}


def test_a_pool_too_small_for_all() -> None:
    """Requests give way in the middle, and are computed again."""
    wanted = requests([Sampling()] * 4, (130, 100, 64, 63))
    ours = engine(blocks=6)
    assert tokens(run(ours, wanted)) == plainly(wanted)
    assert ours.metrics().preemptions > 0


@pytest.mark.parametrize(
    ("samplings", "others"),
    [
        (DRAWN, {}),
        ([Sampling(repetition_penalty=1.3), Sampling(), *DRAWN[:1]], {}),
        ([Sampling()] * 3, {"logprobs": 1}),
    ],
    ids=["drawn", "penalized", "open"],
)
def test_tokens_that_are_not_the_likeliest(samplings: list[Sampling], others: dict[str, object]) -> None:
    wanted = requests(samplings, RAGGED[:3], **others)
    expected, ours = plainly(wanted), engine()
    for _ in range(2):
        assert tokens(run(ours, wanted)) == expected


def test_after_warming_up() -> None:
    """As a server opens it."""
    wanted = requests([Sampling()] * 3, RAGGED[:3])
    base, draft = programs()
    options = EngineOptions(
        max_running=4, token_budget=128, warm_up=True, speculation=Speculation(method="eagle3", draft_tokens=4)
    )
    ours = engine_for(opened(base, 64), options, drafter=eagle3_on_device(opened(draft, 64)))
    assert tokens(run(ours, wanted)) == plainly(wanted)


def test_heads_of_a_program(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Medusa's, random ones of a tiny model."""
    folder = tmp_path_factory.mktemp("heads")
    write_heads(folder, 64)
    device = torch.device("cuda", 0)
    plain = to_device(lowered(captured("llama")), device)
    with_heads = to_device(lowered(captured("llama"), medusa=folder), device)
    wanted = [
        Generate(id=str(place), prompt=prompt, max_new_tokens=40) for place, prompt in enumerate(sequences(21, 9, 62))
    ]
    expected = tokens(run(engine_for(opened(plain, 64), EngineOptions(max_running=4, token_budget=64)), wanted))
    speculation = Speculation(method="medusa", draft_tokens=0, adaptive=False)
    ours = engine_for(opened(with_heads, 64), EngineOptions(max_running=4, token_budget=64, speculation=speculation))
    for _ in range(2):
        assert tokens(run(ours, wanted)) == expected
