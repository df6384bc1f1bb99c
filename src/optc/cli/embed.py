"""`optc run --embed`: embeddings of texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from optc.cli.common import emit, say
from optc.cli.tensors import load_for, refuse_others, takes_tensors, text_lines
from optc.compiler.diagnostics import UsageError, os_errors

if TYPE_CHECKING:
    from optc.cli.run import RunOptions
    from optc.runtime.sessions.tensor_model import Array

_OWN = ("text", "prompt_name", "truncate")
_TAKEN = ("embed", "prompt", "save_outputs", "threads", "trust", *_OWN)
_SHOWN = 6
"""Numbers of an embedding that are printed."""


def refuse_embedding(options: RunOptions) -> None:
    """Refuse flags of --embed where it is not there.

    Raises:
        UsageError: names the first.
    """
    for name in _OWN:
        if getattr(options, name):
            raise UsageError(
                f"--{name.replace('_', '-')} has no effect without --embed", remedy="add --embed, or leave it out"
            )


def run_embed(artifact: Path, as_json: bool, options: RunOptions) -> None:
    """Print embeddings of texts, and write them where that was asked for."""
    refuse_others(options, _TAKEN, "with --embed")
    if bool(options.prompt) == (options.text is not None):
        raise UsageError(
            "give either --prompt or --text" + (", not both" if options.prompt else ""),
            remedy='optc run ARTIFACT --embed --prompt "The old man", or --text FILE with a text a line',
        )
    path = options.save_outputs
    if path is not None and path.suffix not in (".npy", ".npz"):
        raise UsageError(f"--save-outputs {path} is no .npy or .npz", remedy="name a file that ends in one of them")
    if not takes_tensors(artifact):
        raise UsageError(
            "--embed has no effect on a model that generates text",
            where=str(artifact),
            remedy="compile the folder with --pooling lasttoken or mean",
        )
    texts = list(options.prompt) if options.text is None else text_lines(options.text)
    model = load_for(artifact, options)
    found = model.embed(texts, prompt_name=options.prompt_name, truncate=options.truncate)
    if path is not None:
        _write(path, found)
    rows = [{"text": text, "embedding": row.tolist()} for text, row in zip(texts, found, strict=True)]
    emit({"embeddings": rows, "size": int(found.shape[1])}, as_json, _show)


def _write(path: Path, embeddings: Array) -> None:
    import numpy as np

    with os_errors("writing embeddings", str(path)):
        if path.suffix == ".npy":
            np.save(path, embeddings)
        else:
            np.savez(path, embedding=embeddings)


def _show(result: dict[str, Any]) -> None:
    for row in result["embeddings"]:
        more = ", ..." if len(row["embedding"]) > _SHOWN else ""
        say(f"{row['text']}: {', '.join(f'{value:.5g}' for value in row['embedding'][:_SHOWN])}{more}")
