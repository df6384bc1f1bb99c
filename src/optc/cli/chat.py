"""`optc run --chat`: a chat at the terminal."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optc.cli.common import say, stderr
from optc.compiler.diagnostics import InputError, TargetError, printable
from optc.runtime.generation.chat_template import load_chat_template
from optc.runtime.generation.conversation import Conversation, StoppedError
from optc.runtime.sampling import Sampling

_HELP = "/reset begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer"


def talk(
    artifact: Path,
    *,
    system: str,
    max_new_tokens: int,
    sampling: dict[str, Any],
    threads: int | None,
    num_blocks: int | None,
    trust: bool,
) -> None:
    """Read messages from stdin, a line each, and print the answers as they come.

    Raises:
        TargetError: the model has no chat template, or no tokenizer.
    """
    from optc.runtime.sessions.encoder_decoder_model import EncoderDecoderModel
    from optc.runtime.sessions.load import load

    model = load(artifact, threads=threads, num_blocks=num_blocks, trust=trust)
    if isinstance(model, EncoderDecoderModel):
        raise TargetError(
            "an encoder-decoder model does not chat: it answers one text",
            where=str(artifact),
            remedy="give the text with --prompt",
        )
    with contextlib.closing(model):
        template = load_chat_template(artifact)
        if template is None or model.tokenizer is None:
            raise TargetError(
                "the model was not made to chat: it has no " + ("tokenizer" if template else "chat template"),
                where=str(artifact),
                remedy="continue texts with --prompt; for a chat compile a model with a chat_template, as instruct "
                "models have it",
            )
        chat = Conversation(model.session, model.tokenizer, template, model.stop_ids, system)
        chosen = Sampling(**sampling)
        if sys.stdin.isatty():
            import readline  # noqa: F401 - gives input() its line editing

            stderr().print(_HELP, style="dim")
        for line in _lines():
            if line == "/exit":
                return
            if line == "/reset":
                chat.reset()
            elif line.startswith("/"):
                stderr().print(printable(f"unknown command {line.split()[0]}; {_HELP}"), style="yellow", markup=False)
            else:
                _answer(chat, line, max_new_tokens, chosen)


def _lines() -> Iterator[str]:
    """Messages without empty ones, until the input ends."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line:
            yield line


def _answer(chat: Conversation, line: str, max_new_tokens: int, sampling: Sampling) -> None:
    with _interrupts() as interrupted:

        def show(piece: str) -> None:
            say(piece, nl=False)
            if interrupted:
                raise StoppedError

        try:
            reason = chat.say(line, max_new_tokens=max_new_tokens, sampling=sampling, on_text=show)
        except InputError as error:
            stderr().print(str(error), style="yellow", markup=False)
            return
    say()
    notes = {
        "length": f"cut after {max_new_tokens} tokens (--max-new-tokens)",
        "context": "the context is full",
        None: "stopped",
    }
    if reason in notes:
        stderr().print(notes[reason], style="dim")


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Ctrl-C is noted in the list, and acts between two tokens: never in the middle of a step."""
    noted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
