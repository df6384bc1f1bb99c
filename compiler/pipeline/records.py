"""What a run of the pipeline writes down about each pass."""

from __future__ import annotations

from optc.compiler.artifact.manifest import AllowedRecord, DriftRecord, PassRecord
from optc.compiler.execution.drift import Drift
from optc.compiler.ir.program import Program
from optc.compiler.pipeline.gate import Verdict, activation_roundings
from optc.compiler.pipeline.quantization_summary import finite
from optc.compiler.rewriting.passes import Pass, PassResult


def pass_record(
    rewrite: Pass,
    result: PassResult,
    verdict: Verdict | None,
    seconds: float,
    before: Program,
    after: Program,
    allowed: AllowedRecord | None,
) -> PassRecord:
    """The record of a pass that ran; `verdict` is None where it matched nothing.

    Args:
        allowed: what its stage was held to; see `allowed_total`.
    """
    return PassRecord(
        name=rewrite.name,
        options={key: list(value) if isinstance(value, tuple) else value for key, value in rewrite.options().items()},
        matched=result.matched,
        candidates=result.candidates,
        seconds=round(seconds, 4),
        lossy=rewrite.lossy,
        rounds_activations=rewrite.lossy and activation_roundings(after) > activation_roundings(before),
        drift=_drift_record(verdict.drift) if verdict else None,
        since_capture=_drift_record(verdict.since_capture) if verdict else None,
        allowed=allowed if verdict else None,
        layer_drift=verdict.drift.layers if verdict else (),
        nodes=len(after.graph.nodes),
        notes=result.notes,
        misses=tuple(f"{miss.node}: {miss.reason}" for miss in result.misses[:64]),
        linears=result.linears,
    )


def _drift_record(drift: Drift) -> DriftRecord:
    return DriftRecord(
        max_abs_diff=drift.max_abs_diff,
        relative_error=finite(drift.relative),
        cosine=finite(drift.cosine),
        kl=drift.kl,
        top1_agreement=drift.top1,
        perplexity_increase=drift.perplexity,
    )
