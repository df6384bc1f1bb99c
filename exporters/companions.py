"""Files of the source model that travel with an artifact: tokenizer, config, chat template, processor of pictures or sounds."""

from __future__ import annotations

import shutil
from pathlib import Path

from optc.compiler.diagnostics import InputError, os_errors

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
    "preprocessor_config.json",
    "processor_config.json",
)


def copy_companions(source: Path | None, directory: Path, *, code: bool = False) -> list[str]:
    """Copy what exists; returns the names copied.

    Args:
        code: copy the model's Python files too; readers of the folder run them where they are told to.

    A link is followed within the model's folder, and from a snapshot of the Hugging Face cache into its blobs. Any
    other might bring a file that has nothing to do with the model into an artifact that is passed on.

    Raises:
        InputError, ResourceError: a link leads elsewhere, or a file cannot be read or written.
    """
    if source is None:
        return []
    copied = []
    for name in (*_NAMES, *(sorted(path.name for path in source.glob("*.py")) if code else ())):
        path = source / name
        if path.is_file() or path.is_symlink():
            _check_link(source, path)
            with os_errors("copying the tokenizer and config", str(path)):
                shutil.copyfile(path, directory / name)
            copied.append(name)
    return copied


def _check_link(source: Path, path: Path) -> None:
    folder, target = source.resolve(), path.resolve()
    homes = [folder, folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else [folder]
    if not any(target.is_relative_to(home) for home in homes):
        raise InputError(
            "a file of the model is a link that leads out of the model's folder",
            where=str(path),
            why=f"it leads to {target}",
            remedy="put the file itself into the folder, or give the folder that holds it",
        )
    if not target.is_file():
        raise InputError(
            "a file of the model is a link to nothing",
            where=str(path),
            why=f"it leads to {target}",
            remedy="download it again",
        )
