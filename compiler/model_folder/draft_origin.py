"""Which model a draft model, or heads that draft, were made for: `draft.json` in their folder, a file of optc's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

import msgspec
from msgspec import Meta

from optc.compiler.diagnostics import InputError
from optc.compiler.files import sha256_of
from optc.compiler.model_folder.checkpoint import CheckpointInfo, config_digest, weights_digest
from optc.compiler.model_folder.config_file import read_json

ORIGIN, FORMAT = "draft.json", 1
_Hash = Annotated[str, Meta(pattern="^([0-9a-f]{64})?$")]


class Origin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a draft model was made for: hashes, hex sha256; "" where there was no such file.

    Attributes:
        config, weights: of the base's folder; see `config_digest` and `weights_digest`.
        tokenizer: of its tokenizer.json.
    """

    config: _Hash
    weights: _Hash
    tokenizer: _Hash
    format: int = FORMAT

    @classmethod
    def of(cls, base: CheckpointInfo) -> Self:
        """Of a draft model for this base."""
        tokenizer = base.path / "tokenizer.json"
        return cls(
            config=config_digest(base),
            weights=weights_digest(base),
            tokenizer=sha256_of(tokenizer) if tokenizer.is_file() else "",
        )

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """That of a folder; None where it says nothing.

        Raises:
            InputError: malformed, or of another format.
        """
        path = folder / ORIGIN
        if not path.is_file():
            return None
        try:
            found = msgspec.convert(read_json(path), cls)
        except msgspec.ValidationError as error:
            raise _unusable(path, str(error)) from error
        if found.format != FORMAT:
            raise _unusable(path, f"it has format {found.format}, this optc reads {FORMAT}")
        return found

    def write(self, folder: Path) -> None:
        """Into a folder that is there.

        Raises:
            OSError: it cannot be written.
        """
        (folder / ORIGIN).write_bytes(msgspec.json.format(msgspec.json.encode(self)))


def _unusable(path: Path, why: str) -> InputError:
    return InputError(
        "the draft model cannot be used",
        where=str(path),
        why=why,
        remedy="check that config.json and the weights belong together, or use another copy",
    )
