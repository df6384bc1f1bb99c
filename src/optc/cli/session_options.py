"""What run, eval and bench share: options of the session and of sampling, and figures kept in the artifact."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import click
import msgspec
from msgspec import Meta

from optc.compiler.artifact.manifest import Manifest
from optc.runtime.bounds import (
    Count,
    CountOrZero,
    MinP,
    Penalty,
    RepetitionPenalty,
    Seed,
    Temperature,
    Threads,
    TopP,
    Trust,
)
from optc.runtime.sessions.session import Session
from optc.runtime.speculative.settings import (
    DraftFlag,
    DraftTokens,
    MethodFlag,
    ShapeFlag,
    Speculation,
    speculation_of,
)

artifact_argument = click.argument("artifact", type=click.Path(path_type=Path))


class SessionOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a session."""

    threads: (
        Annotated[
            Threads,
            Meta(description="Threads of the engine.", extra={"default": "one per physical core"}),
        ]
        | None
    ) = None
    kv_blocks: (
        Annotated[
            Count,
            Meta(
                description="Blocks in the KV pool of a paged artifact.",
                extra={"default": "8 full contexts"},
            ),
        ]
        | None
    ) = None
    trust: Trust = False


class SamplingOptions(SessionOptions, frozen=True, kw_only=True):
    """Options of a session, and how tokens are chosen."""

    temperature: (
        Annotated[Temperature, Meta(description="Sample at this temperature; 0 is greedy.", extra={"default": "0"})]
        | None
    ) = None
    top_k: Annotated[CountOrZero, Meta(description="Sample among the k most likely tokens.")] | None = None
    top_p: (
        Annotated[
            TopP,
            Meta(
                description="Sample among the most likely tokens that together reach this probability, e.g. 0.9.",
            ),
        ]
        | None
    ) = None
    min_p: (
        Annotated[
            MinP,
            Meta(
                description="Sample among tokens that are at least this share as likely as the likeliest, e.g. 0.05.",
            ),
        ]
        | None
    ) = None
    repetition_penalty: Annotated[
        RepetitionPenalty,
        Meta(description="Make tokens of prompt and text less likely: divides their logits above 0."),
    ] = 1.0
    presence_penalty: Annotated[
        Penalty, Meta(description="Taken from the logits of tokens that were generated before.")
    ] = 0.0
    frequency_penalty: Annotated[Penalty, Meta(description="The same, for each time that they were generated.")] = 0.0
    seed: Annotated[Seed, Meta(description="Seed of the sampling; greedy decoding needs none.")] = 0


class GeneratingOptions(SamplingOptions, frozen=True, kw_only=True):
    """Options of a session, how tokens are chosen, and whether they are drafted."""

    speculative: MethodFlag | None = None
    draft: DraftFlag | None = None
    draft_tokens: DraftTokens | None = None
    draft_shape: ShapeFlag | None = None

    def speculation(self, *, adaptive: bool = True) -> Speculation | None:
        """See `speculation_of`."""
        return speculation_of(self.speculative, self.draft, self.draft_tokens, self.draft_shape, adaptive=adaptive)


def sampling_of(options: SamplingOptions) -> dict[str, Any]:
    """Arguments of `Sampling`; asking for a cut means to sample."""
    given = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    chosen = {name: value for name, value in given.items() if value is not None}
    always = ("repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
    return {
        **{name: getattr(options, name) for name in always},
        **({"temperature": 1.0, **chosen} if chosen else {}),
    }


Save = Annotated[bool, Meta(description="Also store the figures in the artifact's manifest and report.html.")]
"""The type of a field that keeps figures; see `save_figures`."""


def kv_pool(session: Session) -> dict[str, Any]:
    """How well a paged session used its pool, under `kv_pool`; nothing for other sessions."""
    use = getattr(session, "pool_use", None)
    return {} if use is None else {"kv_pool": asdict(use)}


def save_figures(folder: Path, **figures: dict[str, Any]) -> None:
    """Put `quality` or `speed` figures into the manifest and the report, in one atomic step."""
    from optc.compiler.artifact.folder import rewrite
    from optc.exporters.reports.report import write_report

    def edit(directory: Path, manifest: Manifest) -> Manifest:
        edited = msgspec.structs.replace(manifest, **figures)
        write_report(directory, edited)
        return edited

    rewrite(folder, edit)
