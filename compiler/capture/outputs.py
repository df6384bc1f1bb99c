"""What the outputs of a captured language model are."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from optc.compiler.capture.facts import text_config
from optc.compiler.capture.shells import EMBEDDING, HIDDEN, DecoderShell, EncoderShell
from optc.compiler.diagnostics import CaptureError
from optc.compiler.ir.contract import Output


def named_outputs(exported: ExportedProgram, config: Any, shell: DecoderShell | EncoderShell) -> tuple[Output, ...]:
    """Logits over the vocabulary, logits over classes, hidden states, or what a head calls its answers.

    Raises:
        CaptureError: one that is neither for each token nor for each sequence.
    """
    if isinstance(shell, DecoderShell):
        return (Output(name="logits", role="logits"),)
    found = [node.meta["val"] for node in exported.graph.output_node().args[0]]
    if shell.names == (EMBEDDING,):
        return (Output(name=EMBEDDING, role="embedding"),)
    if shell.names == (HIDDEN,):
        return (Output(name=HIDDEN, role="hidden"),)
    if shell.names != ("logits",):
        return tuple(_answer(name, value) for name, value in zip(shell.names, found, strict=True))
    vocabulary = found[0].shape[-1] == getattr(text_config(config), "vocab_size", None)
    return (Output(name="logits", role="logits" if vocabulary else "classes"),)


def _answer(name: str, value: Tensor) -> Output:
    """An answer of a head: a number or numbers for each token, or classes or a vector of the sequence."""
    by_token = value.dim() > 1 and not isinstance(value.shape[1], int)
    if value.dim() not in (2, 3) or (value.dim() == 3 and not by_token):
        raise CaptureError(
            f"the output '{name}' of the model is neither for each token nor for each sequence",
            why=f"its shape is {list(value.shape)}",
            remedy="optc.capture(module, (tensor, ...)) with a module around the model takes any outputs",
        )
    return Output(name=name, role="output" if by_token else "classes" if "logits" in name else "embedding")
