"""An engine that computes nothing: what it answers follows from the prompt, so each answer can be told beforehand.

It holds blocks as a paged engine does, and can be told by environment variables and by tokens of a prompt to be slow, to
fail, or to die.
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from optc.compiler.artifact.folder import read_manifest
from optc.compiler.diagnostics import BusyError, InputError, ResourceError
from optc.runtime.serving.answers import Answers
from optc.runtime.serving.request import Answer, EngineInfo, EngineMetrics, Generate, TokenLogprobs
from optc.runtime.serving.settings import ServeOptions

FAIL, DIE, BREAK = 8000, 8001, 8002
"""Last tokens of prompts of two: this request fails; the process is killed; the whole engine cannot go on."""

ECHO = 77
"""Priority of a request whose answer is its prompt."""

_BLOCK = 16


def next_token(prompt: Sequence[int], index: int) -> int:
    """The token that follows: one of the vocabulary's plain ones."""
    return 300 + (sum(prompt) * 31 + index * 17) % 4000


class FakeEngine:
    """See `interface.Engine`."""

    def __init__(self, options: ServeOptions, vocab_size: int, context: int) -> None:
        self._seconds = float(os.environ.get("OPTC_FAKE_STEP", "0"))
        self.info = EngineInfo(
            vocab_size=vocab_size,
            context_length=context,
            serves="continuous",
            max_running=options.max_running or 16,
            max_waiting=options.max_waiting,
            block_size=_BLOCK,
            num_blocks=options.kv_blocks or 512,
            device="fake",
        )
        self._waiting: deque[Generate] = deque()
        self._running: dict[str, tuple[Generate, int]] = {}
        self._ended: list[Answer] = []
        self._finished: dict[str, int] = {}
        self._steps = self._generated = self._prompts = 0

    def submit(self, request: Generate) -> None:
        if len(self._waiting) >= self.info.max_waiting:
            raise BusyError("too many requests wait")
        if self._needs(request) > self.info.num_blocks:
            raise InputError("the request does not fit the pool")
        if request.grammar is not None:
            raise InputError("this engine has no grammars")
        self._waiting.append(request)

    @staticmethod
    def _needs(request: Generate) -> int:
        return -(-(len(request.prompt) + request.max_new_tokens) // _BLOCK)

    def cancel(self, identity: str) -> None:
        if self._running.pop(identity, None) or any(item.id == identity for item in self._waiting):
            self._waiting = deque(item for item in self._waiting if item.id != identity)
            self._end(Answer(id=identity, finish="cancelled"))

    def _end(self, answer: Answer) -> None:
        self._ended.append(answer)
        assert answer.finish is not None
        self._finished[answer.finish] = self._finished.get(answer.finish, 0) + 1

    def step(self) -> Answers:
        time.sleep(self._seconds)
        self._admit()
        answers = []
        for identity, (request, count) in list(self._running.items()):
            special = request.prompt[1] if len(request.prompt) == 2 else 0
            if special == DIE:
                os.kill(os.getpid(), signal.SIGKILL)
            if special == BREAK:
                raise ResourceError("out of memory on the device")
            if special == FAIL:
                del self._running[identity]
                self._end(Answer(id=identity, finish="error", error="the logits are not finite"))
                continue
            answers.append(self._advance(request, count))
        self._steps += 1
        ended, self._ended = self._ended, []
        return Answers.of(answers + ended)

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.info.max_running:
            if self._used() + self._needs(self._waiting[0]) > self.info.num_blocks:
                return
            request = self._waiting.popleft()
            self._running[request.id] = (request, 0)
            self._prompts += len(request.prompt)

    def _advance(self, request: Generate, count: int) -> Answer:
        echo = request.priority == ECHO
        token = request.prompt[count % len(request.prompt)] if echo else next_token(request.prompt, count)
        self._generated += 1
        finish = "stop" if token in request.stop_ids else "length" if count + 1 == request.max_new_tokens else None
        if finish is None:
            self._running[request.id] = (request, count + 1)
        else:
            del self._running[request.id]
            self._finished[finish] = self._finished.get(finish, 0) + 1
        rows = None
        if request.logprobs is not None:
            rows = [TokenLogprobs(-0.5, [(token + i, -0.5 - i) for i in range(request.logprobs)])]
        return Answer(
            id=request.id, tokens=[token], logprobs=rows, finish=finish, cached_tokens=0 if count == 0 else None
        )

    def _used(self) -> int:
        return sum(self._needs(request) for request, _ in self._running.values())

    @property
    def idle(self) -> bool:
        return not (self._waiting or self._running or self._ended)

    def metrics(self) -> EngineMetrics:
        return EngineMetrics(
            running=len(self._running),
            waiting=len(self._waiting),
            used_blocks=self._used(),
            steps=self._steps,
            prompt_tokens=self._prompts,
            generated_tokens=self._generated,
            finished=dict(self._finished),
            host_us_per_step=12.5,
        )

    def close(self) -> None:
        return


def open_fake(folder: Path, options: ServeOptions) -> FakeEngine:
    """Opens nothing; the artifact's manifest says the vocabulary."""
    if os.environ.get("OPTC_FAKE_REFUSES"):
        raise ResourceError("no memory for the pool", remedy="give fewer --kv-blocks")
    if os.environ.get("OPTC_FAKE_CRASHES"):
        os.kill(os.getpid(), signal.SIGKILL)
    contract = read_manifest(folder).contract
    return FakeEngine(options, contract.model.vocab_size, 2048)
