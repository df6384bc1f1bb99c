"""Files of the source model that travel with an artifact: tokenizer, config, chat template."""

from __future__ import annotations

import shutil
from pathlib import Path

from optc.compiler.diagnostics import os_errors

_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "config.json",
)


def copy_companions(source: Path | None, directory: Path) -> list[str]:
    """Copy what exists as a plain file (links are left out); returns the names copied.

    Raises:
        InputError, ResourceError: a file cannot be read or written.
    """
    if source is None:
        return []
    copied = []
    for name in _NAMES:
        path = source / name
        if path.is_file() and not path.is_symlink():
            with os_errors("copying the tokenizer and config", str(path)):
                shutil.copyfile(path, directory / name)
            copied.append(name)
    return copied
