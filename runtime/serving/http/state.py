"""What an API process knows: the model's text side, the engine's connection, whether it is ending."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optc.compiler.artifact.folder import read_manifest
from optc.compiler.diagnostics import InputError
from optc.runtime.generation.chat_template import ChatTemplate, load_chat_template
from optc.runtime.generation.tokenizer import Tokenizer, eos_token_ids, load_tokenizer
from optc.runtime.serving.client import EngineClient
from optc.runtime.serving.counters import Counters
from optc.runtime.serving.http.errors import HttpError, no_engine, stopping
from optc.runtime.serving.request import EngineInfo
from optc.runtime.serving.settings import ServerConfig

_SLACK = 2  # for tokenizers that leave characters out
_LONG_TEXT = 1 << 14  # characters; beyond, encoding leaves the event loop to others


class TextSide:
    """What turns text into tokens and back, as the artifact brings it.

    Raises:
        InputError: there is no tokenizer, or a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        contract = read_manifest(folder).contract
        self.embedding = contract.embedding
        tokenizer = load_tokenizer(folder, lower_case=contract.embedding is not None and contract.embedding.lower_case)
        if tokenizer is None:
            raise InputError(
                "the artifact has no tokenizer",
                where=str(folder),
                why="its source model had none",
                remedy="put tokenizer.json into the model's folder and compile it again",
            )
        self.tokenizer: Tokenizer = tokenizer
        self.stop_ids = eos_token_ids(folder, contract.model.eos_token_ids)
        self.template: ChatTemplate | None = load_chat_template(folder)


class ServerState:
    """One API process."""

    def __init__(self, config: ServerConfig) -> None:
        self.config, self.options = config, config.options
        self.counters = Counters(Path(config.counters), config.worker)
        self.client = EngineClient(config.engine_socket, self._on_opened)
        self.draining = False
        self.body_bytes = 0  # of bodies that are being read
        self._text: TextSide | None = None
        self.fault: InputError | None = None
        self.opened = asyncio.Event()

    def _on_opened(self, info: EngineInfo) -> None:
        """The engine has verified the folder before it was opened, so its files may be read now."""
        if self._text is None:
            try:
                self._text = TextSide(self.config.folder)
            except InputError as error:
                self.fault = error
        self.opened.set()

    @property
    def text(self) -> TextSide:
        """Raises:
        HttpError: 503, no engine has been there yet.
        """
        if self._text is None:
            raise no_engine()
        return self._text

    @property
    def info(self) -> EngineInfo:
        """Raises:
        HttpError: 503, there is no engine now, or the server ends.
        """
        if self.draining:
            raise stopping()
        if self.client.info is None:
            raise no_engine()
        return self.client.info

    async def encode(self, text: str, *, special: bool) -> list[int]:
        """Tokens of a text.

        Raises:
            HttpError: 400, no prompt of so many characters fits; it is not encoded to find out.
        """
        return (await self.encode_all([text], special=special))[0]

    async def encode_all(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        """Tokens of each text.

        Raises:
            HttpError: as `encode`.
        """
        most, tokenizer = self.options.max_prompt_tokens or self.info.context_length, self.text.tokenizer
        longest = max(map(len, texts))
        if longest > _SLACK * most * tokenizer.longest_token:
            raise HttpError(
                400, f"a text of {longest} characters does not fit {most} tokens", code="context_length_exceeded"
            )

        def encode() -> list[list[int]]:
            return [tokenizer.encode(text, special=special) for text in texts]

        return encode() if sum(map(len, texts)) < _LONG_TEXT else await asyncio.to_thread(encode)

    async def chat_prompt(
        self, messages: Sequence[dict[str, Any]], *, tools: Sequence[Any] | None = None, **extra: Any
    ) -> list[int]:
        """Tokens of a chat, by the model's template.

        Raises:
            HttpError: 400, there is no template, or it refuses the messages.
        """
        template = self.text.template
        if template is None:
            raise HttpError(
                400,
                "the model has no chat template, so it was not made to chat; use /v1/completions",
                code="no_chat_template",
            )
        try:
            text = template.render(messages, tools=tools, **extra)
        except InputError as error:
            raise HttpError(400, f"{error.what}: {error.why or error.where}", param="messages") from error
        return await self.encode(text, special=False)
