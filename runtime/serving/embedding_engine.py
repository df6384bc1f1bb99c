"""The engine of an artifact that gives embeddings: rows of all requests in ragged batches, request by request in turn."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from optc.compiler.diagnostics import BusyError, InputError, TargetError, UsageError
from optc.runtime.serving.answers import Answers
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.host_time import HostTime
from optc.runtime.serving.plan import Counts
from optc.runtime.serving.request import Answer, Embed, EngineInfo, EngineMetrics, Finish
from optc.runtime.sessions.embedding_model import EmbeddingModel
from optc.runtime.sessions.load import load_tensors

NOT_FINITE = "the model computed an embedding that is not finite: a value overflowed, most likely in half precision"
"""`Answer.error` of such a request."""


@dataclass(slots=True)
class _Job:
    """A request, of whose rows so many have had their place in a step."""

    request: Embed
    taken: int = 0
    new: list[bytes] = field(default_factory=list)


class EmbeddingEngine:
    """One row of each request in turn joins a step, until its tokens with their padding reach the budget.

    So a request of thousands of texts does not hold up one of a single text, and none starves: the row that does not fit
    is the first of the next step.
    """

    def __init__(self, model: EmbeddingModel, options: EngineOptions) -> None:
        self._model, self._most_waiting = model, options.max_waiting
        self._most, self._budget = options.batch(on_device=False)
        self._jobs: dict[str, _Job] = {}
        self._turn: deque[_Job] = deque()
        self._ended: list[Answer] = []
        self._counts, self._host = Counts(), HostTime()
        facts = model.manifest.contract.model
        self.info = EngineInfo(
            vocab_size=facts.vocab_size,
            context_length=facts.context_length,
            serves="rows",
            max_running=self._most,
            max_waiting=options.max_waiting,
            device=model.manifest.device,
            task="embed",
            embedding_size=model.facts.size,
        )

    def submit(self, request: Embed) -> None:
        """See `Runs`."""
        if request.id in self._jobs:
            raise InputError(
                "a request of this name has not ended",
                where=f"request {request.id[:80]!r}",
                remedy="give the request another id, or wait",
            )
        if len(self._jobs) >= self._most_waiting:
            raise BusyError(
                "too many requests wait", why=f"{len(self._jobs)}, as many as may", remedy="send it again later"
            )
        self._model.check_rows(request.rows)
        job = self._jobs[request.id] = _Job(request)
        self._turn.append(job)

    def cancel(self, identity: str) -> None:
        """See `Runs`."""
        job = self._jobs.get(identity)
        if job is not None:
            self._turn.remove(job)
            self._ended.append(self._answer(job, "cancelled"))

    def step(self) -> Answers:
        """See `Runs`."""
        answers, self._ended = self._ended, []
        begin = time.perf_counter()
        taken = self._take()
        if not taken:
            return Answers.of(answers)
        at = time.perf_counter()
        found = self._model.embed_batch([row for _, row in taken])
        computed = time.perf_counter() - at
        finite: list[bool] = [bool(np.isfinite(vector).all()) for vector in found]
        jobs = {job.request.id: job for job, _ in taken}
        bad = {job.request.id for (job, _), good in zip(taken, finite, strict=True) if not good}
        for (job, row), vector in zip(taken, found, strict=True):
            job.new.append(vector.tobytes())
            self._counts.prompt_tokens += len(row)
        for identity, job in jobs.items():
            if identity in bad and job.taken < len(job.request.rows):
                self._turn.remove(job)
            done: Finish | None = "stop" if job.taken == len(job.request.rows) else None
            answers.append(self._answer(job, "error" if identity in bad else done))
        self._counts.steps += 1
        self._host.note(time.perf_counter() - begin - computed)
        return Answers.of(answers)

    def _take(self) -> list[tuple[_Job, list[int]]]:
        """The rows of the next step."""
        taken: list[tuple[_Job, list[int]]] = []
        longest = 0
        while self._turn and len(taken) < self._most:
            job = self._turn[0]
            row = job.request.rows[job.taken]
            longest = max(longest, len(row))
            if taken and (len(taken) + 1) * longest > self._budget:
                break
            self._turn.popleft()
            taken.append((job, row))
            job.taken += 1
            if job.taken < len(job.request.rows):
                self._turn.append(job)
        return taken

    def _answer(self, job: _Job, finish: Finish | None) -> Answer:
        embeddings, job.new = b"".join(job.new), []
        if finish is not None:
            del self._jobs[job.request.id]
            self._counts.finished[finish] = self._counts.finished.get(finish, 0) + 1
        failed = finish == "error"
        return Answer(
            id=job.request.id,
            finish=finish,
            embeddings=b"" if failed else embeddings,
            error=NOT_FINITE if failed else "",
        )

    @property
    def idle(self) -> bool:
        """See `Runs`."""
        return not (self._jobs or self._ended)

    def metrics(self) -> EngineMetrics:
        """See `Runs`."""
        running = sum(job.taken > 0 for job in self._jobs.values())
        return self._counts.metrics(running=running, waiting=len(self._jobs) - running, host_us=self._host.mean_us)

    def close(self) -> None:
        """See `Runs`."""
        self._model.close()


def open_embedding_engine(folder: Path, options: EngineOptions) -> EmbeddingEngine:
    """The engine of an artifact that gives embeddings.

    Raises:
        UsageError: an option that has no effect on it.
        ArtifactError, TargetError: as `load_tensors`.
    """
    for name, given in (("kv-blocks", options.num_blocks), ("speculative", options.speculation)):
        if given is not None:
            raise UsageError(f"{name} has no effect on a model that gives embeddings", remedy="leave it out")
    model = load_tensors(folder, threads=options.threads, trust=options.trust)
    if not isinstance(model, EmbeddingModel):
        raise TargetError(
            "the artifact gives no embeddings",
            where=str(folder),
            remedy="compile its model with --pooling mean, cls or lasttoken",
        )
    return EmbeddingEngine(model, options)
