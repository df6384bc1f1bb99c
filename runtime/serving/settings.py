"""What a server is started with: `optc serve` makes flags of it, and the processes of a server get it whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from optc.runtime.bounds import Count, Threads, Trust
from optc.runtime.speculative.settings import DraftFlag, DraftTokens, MethodFlag, ShapeFlag

API_KEY_VARIABLE = "OPTC_API_KEY"
"""It is read where the server starts, and not handed on to its processes."""

Seconds = Annotated[float, Meta(gt=0, le=86400 * 7)]
SecondsOrZero = Annotated[float, Meta(ge=0, le=86400)]


class ServeOptions(Struct, frozen=True, kw_only=True):
    """Where a server listens, what it runs, and what it refuses."""

    host: Annotated[str, Meta(description="Address to listen on; 0.0.0.0 is every one of this machine.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="Port; 0 takes a free one.")] = 8000
    workers: Annotated[int, Meta(ge=1, le=64, description="Processes that speak HTTP; the engine has its own.")] = 1
    model_name: (
        Annotated[str, Meta(description="What clients call the model.", extra={"default": "the folder's name"})] | None
    ) = None
    api_key_file: (
        Annotated[
            Path,
            Meta(
                description="File of keys, one a line; clients must send one of them.",
                extra={"default": "the environment variable OPTC_API_KEY, else none is asked for"},
            ),
        ]
        | None
    ) = None
    cors_origin: Annotated[
        tuple[str, ...],
        Meta(description="Origin whose pages may call the server, e.g. https://chat.example; repeat it for several."),
    ] = ()
    threads: (
        Annotated[Threads, Meta(description="Threads of the engine.", extra={"default": "one per physical core"})]
        | None
    ) = None
    kv_blocks: (
        Annotated[
            Count,
            Meta(description="Blocks in the KV pool of a paged artifact.", extra={"default": "8 full contexts"}),
        ]
        | None
    ) = None
    save_memory: Annotated[
        bool,
        Meta(
            description="On a GPU, keep no dequantized copies of quantized weights, which make steps of many requests "
            "shorter, where memory has room for them."
        ),
    ] = False
    trust: Trust = False
    max_running: (
        Annotated[Count, Meta(description="Requests that run together.", extra={"default": "32; on a GPU 256"})] | None
    ) = None
    token_budget: (
        Annotated[
            Count,
            Meta(
                description="Most tokens of a step, of answers and prompts together; above --max-running.",
                extra={"default": "512 or twice --max-running; on a GPU 4096"},
            ),
        ]
        | None
    ) = None
    max_waiting: Annotated[Count, Meta(description="Requests that wait besides; more get 429.")] = 1024
    speculative: MethodFlag | None = None
    draft: DraftFlag | None = None
    draft_tokens: DraftTokens | None = None
    draft_shape: ShapeFlag | None = None
    max_prompt_tokens: (
        Annotated[Count, Meta(description="Longest prompt.", extra={"default": "what the context holds"})] | None
    ) = None
    max_body_bytes: Annotated[Count, Meta(description="Largest body of a request; larger ones get 413.")] = 4 << 20
    max_choices: Annotated[
        Annotated[int, Meta(ge=1, le=4096)], Meta(description="Answers of one request: its prompts times its n.")
    ] = 128
    max_connections: Annotated[Count, Meta(description="Open connections of each worker; more get 503.")] = 4096
    request_seconds: Annotated[Seconds, Meta(description="Longest time of a request; then it ends with 504.")] = 600.0
    engine_seconds: (
        Annotated[
            Seconds,
            Meta(
                description="An engine that does not answer for so long is killed and started again.",
                extra={"default": "120; --request-seconds where a step is a whole prompt"},
            ),
        ]
        | None
    ) = None
    drain_seconds: Annotated[SecondsOrZero, Meta(description="After SIGTERM: how long running requests may go on.")] = (
        30.0
    )


class ServerConfig(Struct, frozen=True, kw_only=True):
    """What each process of a server is told when it starts.

    Attributes:
        folder: the artifact.
        name: what clients call the model.
        opener: "module:function" that opens the engine: called with the folder and `options`.
        engine_socket: path of the socket on which the engine's process listens.
        counters: path of the file of counters; see `counters`.
        worker: number of the process, from 0; its row of the counters.
    """

    folder: Path
    name: str
    options: ServeOptions
    opener: str
    engine_socket: str = ""
    counters: str = ""
    api_keys: tuple[str, ...] = ()
    worker: int = 0
