"""`optc bench --speculative`: drafts against plain decoding."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from optc.cli.common import emit, read_text, say, stderr
from optc.cli.own_process import leave_to_own_process
from optc.cli.session_options import sampling_of
from optc.compiler.diagnostics import UsageError
from optc.progress import part, progress
from optc.runtime.speculative.settings import DraftShape, Speculation

if TYPE_CHECKING:
    from optc.cli.bench import BenchOptions
    from optc.runtime.measuring.speculation import SpeculationSpeed
    from optc.runtime.sessions.paged import PagedModel

_PROMPT = 128


def bench_speculative(artifact: Path, as_json: bool, options: BenchOptions, speculation: Speculation) -> None:
    """Measure, print, and warn where plain decoding is faster."""
    text = _text(options)
    leave_to_own_process([artifact, *([speculation.draft] if speculation.draft else [])])
    with progress("measuring"):
        found, result = _measured(artifact, text, options, speculation)
    emit(result, as_json, _show)
    if found.speedup.median < 1:
        stderr().print(
            f"plain decoding is faster here ({found.speedup.median:.2f}x): leave --speculative out, or draft fewer tokens",
            style="yellow",
        )


def _measured(
    artifact: Path, text: str, options: BenchOptions, speculation: Speculation
) -> tuple[SpeculationSpeed, dict[str, Any]]:
    """What was measured of prompts from a text, and what the command prints of it."""
    from optc.runtime.measuring.benchmark import environment
    from optc.runtime.measuring.speculation import cut_prompts, measure_speculation
    from optc.runtime.sampling import Sampling
    from optc.runtime.serving.engine import drafter_for
    from optc.runtime.sessions.load import load
    from optc.runtime.sessions.paged import PagedSession
    from optc.runtime.sessions.session import default_threads

    model = load(
        artifact, threads=options.threads, num_blocks=options.kv_blocks, device=options.device, trust=options.trust
    )
    drafter = drafter_for(
        model.session, speculation, artifact, running=options.batch, threads=options.threads, trust=options.trust
    )
    session = model.session
    assert isinstance(session, PagedSession)
    length = next(iter(options.prompt_length), _PROMPT)
    warmup = 1 if options.warmup is None else options.warmup
    rounds = options.samples + warmup
    prompts = cut_prompts(model.encode(text), options.batch * rounds, length)
    sampling = Sampling(**sampling_of(options))
    measured: dict[str, SpeculationSpeed] = {}
    for shape in _shapes(speculation, session.model):
        with part(f"samples, {shape}") as update:
            measured[shape] = measure_speculation(
                session,
                drafter,
                msgspec.structs.replace(speculation, shape=shape),
                [prompts[place::rounds] for place in range(rounds)],
                new_tokens=options.new_tokens,
                sampling=sampling,
                warmup=warmup,
                on_sample=lambda done, total, update=update: update(done, f"{done} of {total}"),  # type: ignore[misc]
            )
    drafter.close()
    model.close()
    best = max(measured, key=lambda shape: measured[shape].speedup.median)
    found = measured[best]
    return found, {
        **found.to_dict(),
        "shape": best,
        "shapes": {shape: item.to_dict() for shape, item in measured.items()},
        "draft_tokens": len(found.figures.drafted_at),
        "batch": options.batch,
        "samples": options.samples,
        "prompt_tokens": length,
        "new_tokens": options.new_tokens,
        "environment": environment(options.threads or default_threads()),
    }


def _shapes(speculation: Speculation, model: PagedModel) -> list[DraftShape]:
    """The shapes of drafts to measure: a chain and a tree where the artifact has both, and neither was asked for."""
    if speculation.method != "medusa" or model.tree is None:
        return ["chain"]
    return ["chain", "tree"] if speculation.shape == "auto" else [speculation.shape]


def _text(options: BenchOptions) -> str:
    """What prompts are cut from.

    Raises:
        UsageError: none is given, or flags that have no effect here.
    """
    if options.text is None:
        raise UsageError(
            "--speculative needs a text", why="what is accepted depends on what is written", remedy="give --text FILE"
        )
    if options.save:
        raise UsageError("--save has no effect with --speculative", remedy="leave it out")
    if len(options.prompt_length) > 1:
        raise UsageError("--speculative takes one --prompt-length", remedy="give it once")
    return read_text(options.text)


def _show(result: dict[str, Any]) -> None:
    say(
        f"{result['method']}, up to {result['draft_tokens']} drafted tokens, batch {result['batch']}, "
        f"{result['samples']} samples of {result['prompt_tokens']} + {result['new_tokens']} tokens"
    )
    shapes = result["shapes"]
    for shape, figures in shapes.items():
        if len(shapes) > 1 or shape == "tree":
            say(f"{shape}, {figures['tree']} guesses" if figures["tree"] else f"{shape} of the likeliest guesses")
        _show_shape(figures)
    if len(shapes) > 1:
        say(f"the {result['shape']} is faster here; without --draft-shape an engine finds out while it runs")


def _show_shape(result: dict[str, Any]) -> None:
    length = result["acceptance_length"]
    say(f"  acceptance length  {'no drafts' if length is None else f'{length:.2f} tokens a step'}")
    places = " ".join(f"{share:.2f}" for share in result["acceptance_by_position"])
    say(f"  by position        {places or '-'}")
    for name, label, unit in (
        ("step_cost", "cost of a step", "x a plain one"),
        ("tokens_per_s", "decode", "tokens/s"),
        ("plain_tokens_per_s", "plain", "tokens/s"),
        ("speedup", "speed-up", "x"),
    ):
        row = result[name]
        say(f"  {label:17}  {row['median']:.2f} {unit}  [{row['ci95'][0]:.2f}, {row['ci95'][1]:.2f}]")
    say(f"  equal answers      {result['equal']:.0%}")
