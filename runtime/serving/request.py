"""What the engine is asked and what it answers: plain values that travel between processes as msgpack.

The engine knows token ids only. Text, chat templates and stop strings belong to those who ask: whoever sees a stop
string in the text ends the request by `Cancel`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from optc.runtime.bounds import Count
from optc.runtime.sampling import Sampling
from optc.runtime.speculative.figures import SpeculativeFigures

MOST_LOGPROBS = 20
"""Alternatives whose log-probabilities a request may ask for at each token."""

Finish = Literal["stop", "length", "context", "cancelled", "error"]
"""Why a request ended: a stop token, its own limit, a full context, `Cancel`, or what `Answer.error` says."""

Task = Literal["generate", "embed"]
"""What the requests of an engine are."""

Serves = Literal["continuous", "rows", "one-at-a-time"]
"""How an engine runs several requests: any mix of tokens in each step; one slot per row of a batch; one after another."""


class Grammar(Struct, frozen=True, kw_only=True):
    """What the text of an answer must be.

    Attributes:
        kind: what `source` is; "json" is any JSON value, and has no source.
    """

    kind: Literal["json", "json-schema", "regex", "grammar"]
    source: str = ""


class Generate(Struct, frozen=True, kw_only=True, tag="generate"):
    """A request to continue a prompt.

    Attributes:
        id: unique among the requests that have not ended.
        prompt: token ids, one at least.
        max_new_tokens: the answer ends there with "length".
        stop_ids: tokens that end the answer with "stop"; the token itself is part of it.
        logprobs: None, or how many of the likeliest tokens are told with each chosen one, which is told as well.
        logit_bias: added to the logits of these tokens, before everything else.
        priority: smaller goes first among those that wait; equal ones in the order of their arrival.
        grammar: None where the answer is free.
    """

    id: str
    prompt: list[int]
    max_new_tokens: Count
    sampling: Sampling = Sampling()
    stop_ids: list[int] = []
    logprobs: Annotated[int, Meta(ge=0, le=MOST_LOGPROBS)] | None = None
    logit_bias: dict[int, float] = {}
    priority: int = 0
    grammar: Grammar | None = None


class Embed(Struct, frozen=True, kw_only=True, tag="embed"):
    """A request for embeddings.

    Attributes:
        id: unique among the requests that have not ended.
        rows: token ids of each text, one text and one token at least.
    """

    id: str
    rows: list[list[int]]


class Cancel(Struct, frozen=True, kw_only=True, tag="cancel"):
    """End a request; one that has ended already is no error. Its last `Answer` is "cancelled", unless it had ended."""

    id: str


class TokenLogprobs(Struct, frozen=True, array_like=True):
    """Natural logarithms of the probabilities that a token was chosen by, before temperature and cuts.

    Attributes:
        chosen: of the token that was chosen.
        top: the likeliest tokens with theirs, best first.
    """

    chosen: float
    top: list[tuple[int, float]]


class Answer(Struct, frozen=True, kw_only=True, gc=False):
    """What a request got since its last `Answer`. None is ever part of a cycle.

    Attributes:
        tokens: new ones, in order; may be empty.
        logprobs: one for each token where the request asked for them.
        finish: None while it runs. After another value nothing follows.
        cached_tokens: of the prompt, those that were found in the KV pool; told with the first tokens.
        error: a sentence, where `finish` is "error".
        embeddings: float32 in the processor's order of bytes, those of the next rows of an `Embed`.
    """

    id: str
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    finish: Finish | None = None
    cached_tokens: int | None = None
    error: str = ""
    embeddings: bytes = b""


class EngineInfo(Struct, frozen=True, kw_only=True):
    """What an engine runs, and how.

    Attributes:
        max_running: requests that run together.
        max_waiting: requests that wait besides; more are refused.
        block_size, num_blocks: of the KV pool, 0 where the cache is not paged.
        dequantized_bytes: what copies of packed weights take.
        task: what it takes, `Generate` or `Embed`. embedding_size: numbers of an embedding, 0 where there are none.
    """

    vocab_size: int
    context_length: int
    serves: Serves
    max_running: int
    max_waiting: int
    block_size: int = 0
    num_blocks: int = 0
    device: str = ""
    dequantized_bytes: int = 0
    task: Task = "generate"
    embedding_size: int = 0


class EngineMetrics(Struct, frozen=True, kw_only=True):
    """Counters since the start, and gauges of now.

    Attributes:
        host_us_per_step: microseconds per step that the processor spent outside the model, a mean of the last steps.
        speculation: None where decoding is plain by its options.
    """

    running: int
    waiting: int
    used_blocks: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    finished: dict[str, int] = {}
    host_us_per_step: float = 0.0
    speculation: SpeculativeFigures | None = None
