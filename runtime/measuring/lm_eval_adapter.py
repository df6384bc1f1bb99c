"""An artifact as a model of the Language Model Evaluation Harness (lm-eval), for its zero-shot and few-shot tasks.

Conventions are those of the harness's own models (Gao et al., https://github.com/EleutherAI/lm-evaluation-harness),
so that figures compare: a text is encoded with the begin-of-text token that its tokenizer adds, a prompt too long
for the context loses its beginning, trailing spaces of a prompt belong to the continuation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from optc.compiler.diagnostics import GateError, InputError, UsageError
from optc.runtime.generation.sampling import chooser
from optc.runtime.generation.tokenizer import Tokenizer
from optc.runtime.sampling import Sampling
from optc.runtime.sessions.session import Logits
from optc.runtime.sessions.text_model import Model

DEFAULT_NEW_TOKENS = 256
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_KNOWN = ("until", "do_sample", "temperature", "top_k", "top_p", "min_p", *_PENALTIES, "max_gen_toks")

Scored = tuple[float, bool]
"""Log-likelihood of a continuation in nats, and whether greedy decoding would give it."""
Encoded = tuple[tuple[str, str], list[int], list[int]]
"""(prompt and continuation as text), tokens of the prompt, tokens of the continuation."""


class ArtifactLM(TemplateLM):
    """The three questions of the harness, answered by a session.

    Args:
        model: an open artifact with a tokenizer; it stays the caller's to close.
        seed: of tasks that sample.
        on_request: called with (done, total) as requests of one kind are answered.

    Raises:
        InputError: the artifact has no tokenizer.
    """

    def __init__(
        self,
        model: Model,
        *,
        seed: int = 0,
        on_request: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        super().__init__()
        model.encode("")  # says so when there is no tokenizer
        tokenizer = model.tokenizer
        assert tokenizer is not None
        self._model, self._tokenizer, self._seed, self._on_request = model, tokenizer, seed, on_request
        self._begin = _begin_token(tokenizer)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text.

        Raises:
            InputError: the model has none.
        """
        if not self._model.stop_ids:
            raise InputError(
                "the model has no end-of-text token",
                why="the task needs one before a text without a prompt",
                remedy="add eos_token_id to generation_config.json and compile again",
            )
        return self._model.stop_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a prompt: begin-of-text, else end-of-text."""
        if self._begin is not None:
            return self._begin
        begin = self._model.manifest.contract.model.bos_token_id
        return self.eot_token_id if begin is None else begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, after begin-of-text where the tokenizer adds it; what it adds behind a text is left out."""
        assert not kwargs, kwargs
        tokens = self._tokenizer.encode(string, special=False)
        if add_special_tokens is False or self._begin is None or tokens[:1] == [self._begin]:
            return tokens
        return [self._begin, *tokens]

    def _loglikelihood_tokens(self, requests: list[Encoded], disable_tqdm: bool = False, **kwargs: Any) -> list[Scored]:
        """Score continuations; requests that feed the model the same tokens share one run of it.

        Raises:
            InputError: a continuation longer than the context, or a prompt without any token.
            GateError: logits that are not finite.
        """
        assert not kwargs, kwargs
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, (text, prompt, continuation) in enumerate(requests):
            groups.setdefault(tuple(self._inputs(text, prompt, continuation)), []).append(number)
        found: list[Scored] = [(0.0, True)] * len(requests)
        done = 0
        for inputs, numbers in groups.items():
            # A continuation of n tokens is predicted by the last n inputs.
            longest = max(len(requests[number][2]) for number in numbers)
            logits = self._last_logits(inputs, longest) if longest else None
            for number in numbers:
                text, _, continuation = requests[number]
                if continuation:
                    assert logits is not None
                    found[number] = _score(logits[-len(continuation) :], continuation)
                self.cache_hook.add_partial("loglikelihood", text, found[number])
            done += len(numbers)
            self._on_request(done, len(requests))
        return found

    def _inputs(self, text: tuple[str, str], prompt: list[int], continuation: list[int]) -> list[int]:
        """What the model is fed: all but the last token, as many as fit."""
        limit = self._model.session.context_length
        if len(continuation) > limit or not prompt:
            why = f"it has {len(continuation)} tokens, the context {limit}" if prompt else "its prompt is empty"
            raise InputError(
                "a continuation cannot be scored",
                where=repr(text[1][:60]),
                why=why,
                remedy="leave the task out, or limit its examples with --limit",
            )
        return [*prompt, *continuation][-(limit + 1) : -1]

    def _last_logits(self, inputs: Sequence[int], count: int) -> Logits:
        """Logits [count, V] of the last `count` tokens."""
        kept = np.empty((0, self._model.session.vocab_size), np.float32)
        for part in self._model.session.score(inputs):
            kept = np.concatenate([kept[max(0, len(kept) + len(part) - count) :], part[-count:]])
        return kept[-count:]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each token predicted once with as much context as its window has.

        As in the harness, a begin-of-text token that the tokenizer adds is itself predicted, after another one.

        Raises: as `_loglikelihood_tokens`.
        """
        results = []
        for done, request in enumerate(requests, start=1):
            (text,) = request.args
            tokens = self.tok_encode(text)
            windows = get_rolling_token_windows(
                tokens, self.prefix_token_id, max_seq_len=self._model.session.context_length, context_len=1
            )
            total = 0.0
            for window in windows:
                prompt, continuation = make_disjoint_window(window)
                logits = self._last_logits([*prompt, *continuation[:-1]], len(continuation))
                total += _score(logits, continuation)[0]
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            results.append(total)
            self._on_request(done, len(requests))
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each prompt to a stop string, an end-of-text token, or the limit; without the stop string.

        Raises:
            UsageError: a generation option of the task that sessions do not have.
        """
        results = []
        for done, request in enumerate(requests, start=1):
            prompt, options = request.args
            results.append(self._generate(prompt, dict(options)))
            self.cache_hook.add_partial("generate_until", request.args, results[-1])
            self._on_request(done, len(requests))
        return results

    def _generate(self, prompt: str, options: dict[str, Any]) -> str:
        sampling, stops, limit = _generation_options(options, self._seed)
        session = self._model.session
        limit = min(limit, session.context_length - 1)
        tokens = self.tok_encode(prompt)[-(session.context_length - limit) :]
        choose = chooser(session, [sampling], [tokens])
        out, text = [], ""
        logits = session.prefill([tokens])
        while True:
            (token,) = choose(logits)
            if token in self._model.stop_ids:
                break
            out.append(token)
            text = self._tokenizer.decode(out)
            if len(out) == limit or any(stop in text for stop in stops):
                break
            logits = session.decode([token])
        return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def _begin_token(tokenizer: Tokenizer) -> int | None:
    """The token that the tokenizer puts before a text, or None."""
    plain, special = tokenizer.encode("a", special=False), tokenizer.encode("a")
    return special[0] if special[1 : 1 + len(plain)] == plain and len(special) > len(plain) else None


def _score(logits: Logits, tokens: Sequence[int]) -> Scored:
    """Logits [n, V] of the positions that predict `tokens` [n]."""
    log_p = torch.log_softmax(torch.from_numpy(logits).double(), -1)
    index = torch.tensor(tokens)
    value = float(log_p.gather(1, index[:, None]).sum())
    if not np.isfinite(value):
        raise GateError(
            f"the log-likelihood of a continuation is {value}",
            why="logits are not finite",
            remedy="compile with --dtype fp32 or bf16",
        )
    return value, bool((log_p.argmax(-1) == index).all())


def _generation_options(options: dict[str, Any], seed: int) -> tuple[Sampling, list[str], int]:
    """Sampling, stop strings and the most tokens, from a task's `generation_kwargs`."""
    for name in options:
        if name not in _KNOWN:
            raise UsageError(
                f"the task asks for generation option '{name}'",
                why=f"sessions take {', '.join(_KNOWN)}",
                remedy="leave the option out of the task",
            )
    until = options.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    warmth, sampled = options.get("temperature"), options.get("do_sample")
    temperature = 1.0 if warmth is None else float(warmth)
    asked: dict[str, Any] = {name: float(options[name]) for name in _PENALTIES if options.get(name) is not None}
    if temperature and (warmth is not None if sampled is None else sampled):
        asked |= {
            "temperature": temperature,
            "top_k": int(options.get("top_k") or 0),
            "top_p": float(options.get("top_p") or 1.0),
            "min_p": float(options.get("min_p") or 0.0),
        }
    return (
        Sampling(seed=seed, **asked),
        [stop for stop in stops if stop],
        int(options.get("max_gen_toks") or DEFAULT_NEW_TOKENS),
    )


def figures(results: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(task, {metric: {"value", "stderr"}}) of the harness's results; metrics with a filter are `metric[filter]`."""
    for task, row in results.items():
        found: dict[str, Any] = {}
        for key, value in row.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            stderr = row.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else f"{metric}[{kind}]"
            found[name] = {"value": value, "stderr": stderr if isinstance(stderr, int | float) else None}
        yield task, found
