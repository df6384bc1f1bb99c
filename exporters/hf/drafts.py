"""Draft models of EAGLE-3 in the folders that vLLM and TensorRT-LLM serve: each in the layout that its loader reads.

vLLM reads that of speculators. TensorRT-LLM reads the layer's config at the top, takes hidden states behind layers where
others say in front of which, and adds the plain state to the layer's output (`Eagle3DecoderLayer` in its
tensorrt_llm/_torch/models/modeling_speculative.py).
"""

from __future__ import annotations

from pathlib import Path

from optc.compiler.capture.eagle3 import check_base
from optc.compiler.diagnostics import TargetError, UsageError, os_errors
from optc.compiler.model_folder.eagle3 import Eagle3Config, Eagle3Folder, write_eagle3
from optc.exporters.companions import copy_companions
from optc.exporters.options.hf import DraftingServer, ServeOptions

FOLDER = "draft"
"""Of its files in the artifact."""


def check_carried(options: DraftingServer, base: Path | None) -> None:
    """Hold the draft model that is to be carried to its base and to its server, before anything is captured.

    Args:
        base: the model's folder; None for a model in memory.

    Raises:
        InputError: it cannot be read, or was made for another base. UsageError: more draft tokens than it was made for.
        TargetError: the server's layer computes something else.
    """
    folder = options.carried
    if folder is None:
        return
    found = Eagle3Folder.read(folder)
    if base is not None:
        check_base(found, base)
    most = found.config.max_draft_tokens
    if (options.draft_tokens or 0) > most:
        raise UsageError(
            f"--draft-tokens {options.draft_tokens} is more than the {most} that the draft model was trained for",
            where=str(folder),
            remedy=f"give {most} or less",
        )
    if isinstance(options, ServeOptions):
        _check_layer(found.config, folder)


def _check_layer(config: Eagle3Config, folder: Path) -> None:
    for wrong, why, remedy in (
        (
            config.norm_before_residual,
            "it adds the normed state to what the layer gives, TensorRT-LLM the plain one",
            "train it with --set eagle3.norm_before_residual=false, or use --target vllm",
        ),
        (
            0 in config.boundaries,
            "it reads the embedding, and TensorRT-LLM gives states behind layers",
            "train it on others (--set eagle3.boundaries=...), or use --target vllm",
        ),
    ):
        if wrong:
            raise TargetError("TensorRT-LLM cannot run the draft model", where=str(folder), why=why, remedy=remedy)


def carry(options: DraftingServer, directory: Path) -> Eagle3Config | None:
    """Write the draft model into the artifact; None where there is none.

    Raises:
        InputError, ResourceError: it cannot be read or written.
    """
    folder = options.carried
    if folder is None:
        return None
    found, place = Eagle3Folder.read(folder), directory / FOLDER
    with os_errors("writing the draft model", str(place)):
        place.mkdir()
    copy_companions(folder, place)
    write_eagle3(
        place, found.config, found.tensors, found.targets, found.origin, flat=isinstance(options, ServeOptions)
    )
    return found.config
