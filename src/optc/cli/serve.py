"""`optc serve`."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import click
import msgspec

from optc.cli.common import say, stderr
from optc.cli.options import struct_flags
from optc.cli.session_options import artifact_argument
from optc.compiler.diagnostics import InputError, TargetError, UsageError, printable
from optc.compiler.files import read_plain
from optc.runtime.serving.settings import API_KEY_VARIABLE, ServeOptions
from optc.runtime.speculative.settings import speculation_of

_SERVES = {
    "continuous": "continuous batching: up to {max_running} requests in each step",
    "rows": "rows of one batch: up to {max_running} requests together",
    "one-at-a-time": "one request at a time, as the artifact's KV cache holds one",
}
_EMBEDS = "embeddings of {embedding_size} numbers: up to {max_running} texts in each step"
_LONGEST_KEY = 4096


@click.command()
@artifact_argument
@struct_flags(ServeOptions)
@click.option("--json", "as_json", is_flag=True, help="Print what happens as JSON, an object a line.")
def serve(artifact: Path, as_json: bool, options: ServeOptions) -> None:
    """Serve ARTIFACT over HTTP, for clients of OpenAI's API.

    The engine runs in a process of its own and is started again when it dies. SIGTERM and Ctrl-C let
    running requests finish. Listens on this machine only, unless --host says otherwise.

    \b
    optc serve out/fiction-onnx
    optc serve out/fiction-onnx --port 9000 --api-key-file keys.txt --max-running 32
    optc serve out/fiction-paged --speculative suffix
    """
    _check_installed()
    from optc.runtime.serving.settings import ServerConfig
    from optc.runtime.serving.supervisor import Event, Supervisor

    def tell(event: Event, more: dict[str, object]) -> None:
        if as_json:
            say(json.dumps({"event": event, **more}))
            sys.stdout.flush()
        else:
            _show(event, more)

    config = ServerConfig(
        folder=artifact.resolve(),
        name=options.model_name or Path(os.path.abspath(artifact)).name,
        options=msgspec.structs.replace(options, draft=options.draft and options.draft.resolve()),
        opener="optc.runtime.serving.engine_process:open_artifact",
        api_keys=_keys(options),
    )
    speculation_of(
        options.speculative, options.draft, options.draft_tokens, options.draft_shape
    )  # refused here, not in the engine's process
    if not artifact.is_dir():
        raise InputError("the artifact does not exist", where=str(artifact), remedy="give the folder of optc compile")

    async def run() -> None:
        await Supervisor(config, tell).run()

    asyncio.run(run())


def _check_installed() -> None:
    try:
        import httptools  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
        import uvloop  # noqa: F401
    except ImportError as error:
        raise TargetError(
            "the HTTP server's libraries are not installed", why=str(error), remedy='pip install "optc[serve]"'
        ) from error


def _keys(options: ServeOptions) -> tuple[str, ...]:
    """API keys of the file or the environment.

    Raises:
        InputError, UsageError: a file that cannot be read or holds none, a key that no header can carry.
    """
    path = options.api_key_file
    if path is None:
        text, where = os.environ.get(API_KEY_VARIABLE, ""), f"the environment variable {API_KEY_VARIABLE}"
        if not text.strip():
            return ()
    else:
        where = str(path)
        try:
            text = read_plain(path, "reading the API keys", most=1 << 20).decode()
        except UnicodeDecodeError as error:
            raise InputError(
                "the file of API keys cannot be read",
                where=where,
                why=str(error),
                remedy="give a text file with one key a line",
            ) from error
    keys = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not keys:
        raise UsageError("the file of API keys is empty", where=where, remedy="write one key a line")
    if any(len(key) > _LONGEST_KEY or not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise UsageError(
            "an API key is not one word of printable ASCII",
            where=where,
            remedy="write keys of letters, digits and signs, one a line",
        )
    return keys


def _show(event: str, more: dict[str, object]) -> None:
    console = stderr()
    if event == "ready":
        serves = (_EMBEDS if more["task"] == "embed" else _SERVES[str(more["serves"])]).format_map(more)
        say(f"{more['model']} is ready at {more['url']} after {more['seconds']} s")
        say(f"{serves}, on {more['device'] or 'cpu'}; contexts of {more['context_length']} tokens")
        console.print(f"OpenAI clients: base_url {more['url']}/v1; a page to try it: {more['url']}/", style="dim")
        sys.stdout.flush()
    elif event == "died":
        console.print(
            printable(f"the {more['process']} process ended: {more['why']}; it is started again"),
            style="yellow",
            markup=False,
        )
    elif event == "restarted":
        console.print(f"the {more['process']} process is back", style="yellow")
    elif event == "draining":
        console.print(f"{more['signal']}: finishing what runs, at most {more['seconds']:g} s", style="dim")
    else:
        console.print("stopped", style="dim")
