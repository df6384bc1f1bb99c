"""Models that answer what their encoder reads."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from optc.compiler.artifact.manifest import Manifest
from optc.compiler.diagnostics import InputError
from optc.runtime.generation.beams import BeamSettings, beam_search
from optc.runtime.generation.tokenizer import Tokenizer
from optc.runtime.sessions.encoder_decoder import EncoderDecoderSession
from optc.runtime.sessions.tensor_model import TensorModel, as_array
from optc.runtime.sessions.text_model import Generation, Model


class EncoderDecoderModel(Model):
    """An open artifact whose decoder answers what its encoder reads: texts, or features of sounds."""

    session: EncoderDecoderSession

    def __init__(
        self,
        manifest: Manifest,
        session: EncoderDecoderSession,
        tokenizer: Tokenizer | None,
        stop_ids: tuple[int, ...],
        open_encoder: Callable[[], TensorModel],
    ) -> None:
        super().__init__(manifest, session, tokenizer, stop_ids)
        self._open_encoder = open_encoder

    @functools.cached_property
    def encoder(self) -> TensorModel:
        """The encoder alone: called with texts or tensors, it gives its states first."""
        return self._open_encoder()

    @contextlib.contextmanager
    def answers_from(self, ids: Sequence[int]) -> Iterator[None]:
        """Let answers begin with these tokens for a while, the start token included: a language, a task.

        Raises:
            InputError: no token, or one outside the vocabulary.
        """
        before = self.session.start_ids
        self.session.start_from(ids)
        try:
            yield
        finally:
            self.session.start_ids = before

    def search(
        self,
        prompts: Sequence[Any],
        *,
        beams: int = 4,
        length_penalty: float = 1.0,
        early_stopping: bool = False,
        max_new_tokens: int = 128,
        ignore_eos: bool = False,
    ) -> list[Generation]:
        """The likeliest answer to each prompt that beam search finds; see `BeamSettings`.

        Raises:
            UsageError: an option out of range. InputError: as `generate_batch`.
        """
        settings = BeamSettings(beams, length_penalty, early_stopping)
        rows = self._rows(prompts)
        stop_ids = () if ignore_eos else self.stop_ids
        result = beam_search(self.session, rows, settings, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
        return self._generations(rows, result)

    def _rows(self, prompts: Sequence[Any]) -> list[Any]:
        if self.session.reads_text:
            return super()._rows(prompts)
        if any(isinstance(item, str) for item in prompts) or isinstance(prompts, str):
            (spec,) = self.session.encoder.inputs
            raise InputError(
                "the model reads sounds, not text",
                why=f"it takes {spec.name} {list(spec.dims[1:])} of each sound",
                remedy="give features: optc run ARTIFACT --inputs features.npz; in Python, arrays. transformers' feature "
                "extractor of the model makes them of audio",
            )
        return [as_array(item) for item in prompts]
