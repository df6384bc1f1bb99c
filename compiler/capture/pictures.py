"""Capture of transformers models that read pictures: a module with a picture in, and by name whatever the model gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor

from optc.compiler.capture.eval_mode import in_eval_mode
from optc.compiler.capture.facts import PIXELS, model_facts, reads_both, stated_context
from optc.compiler.capture.module import capture_module
from optc.compiler.capture.proof.reference import own_implementations
from optc.compiler.capture.shells import AnsweringShell, tensors_of
from optc.compiler.ir.contract import Contract, Output
from optc.compiler.ir.program import Program

_UNSTATED = 64
"""Tokens of a text beside pictures where the config states no most."""


class PictureShell(AnsweringShell):
    """Pictures in float32 to the tensors that a model gives, under its own names for them."""

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return self._answered(pixel_values)

    def _answered(self, pixel_values: Tensor, **more: Tensor) -> tuple[Tensor, ...]:
        kind = next((weight.dtype for weight in self._inner.parameters()), torch.float32)
        out = self._inner(pixel_values=pixel_values.to(kind), return_dict=True, **more)
        return self._named(tensors_of(out))


class TextPictureShell(PictureShell):
    """The same beside token ids and mask of texts, of another number than the pictures."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor
    ) -> tuple[Tensor, ...]:
        return self._answered(pixel_values, input_ids=input_ids, attention_mask=attention_mask)


@in_eval_mode
def capture_pictures(model: Any, size: tuple[int, int], *, prove: bool = True) -> Program:
    """Capture a model of pictures, for any number of them, of one size; one that reads texts too (CLIP) with both.

    Args:
        size: height and width.

    Raises:
        CaptureError: the model cannot be exported. GateError: the program is not what it computes.
    """
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    pictures = torch.randn(2, channels(model.config), *size, generator=torch.Generator().manual_seed(0))
    if reads_both(type(model)):
        context = stated_context(model.config.get_text_config()) or _UNSTATED
        ids = torch.arange(3 * min(7, context)).view(3, -1) % int(model.config.get_text_config().vocab_size)
        shell: PictureShell = TextPictureShell(model)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), PIXELS: pictures}
        axes = {"input_ids": {0: "texts", 1: "seq"}, "attention_mask": {0: "texts", 1: "seq"}, PIXELS: {0: "pictures"}}
        largest = {"seq": context}
    else:
        shell, inputs, axes, largest = PictureShell(model), {PIXELS: pictures}, {PIXELS: {0: "batch"}}, {}
    examples = tuple(item.to(device) for item in inputs.values())
    with own_implementations(model) as attention:
        program = capture_module(shell, examples, input_names=list(inputs), dynamic=axes, largest=largest, prove=prove)
    program.contract = _named(program, shell.names, model)
    if program.proof is not None:
        reference = f"{type(model).__name__} ({attention})"
        program.proof = msgspec.structs.replace(program.proof, reference=reference)
    return program


def _named(program: Program, names: Sequence[str], model: Any) -> Contract:
    """The contract with the model's names for its outputs, and its facts."""
    given = program.exported.graph.output_node().args[0][-len(names) :]
    outputs = tuple(
        Output(name=name, role="classes" if name == "logits" and node.meta["val"].dim() in (2, 3) else "output")
        for name, node in zip(names, given, strict=True)
    )
    return msgspec.structs.replace(program.contract, outputs=outputs, model=model_facts(model.config))


def channels(config: Any) -> int:
    """Of the pictures that a config states; 3 where it states nothing."""
    for part in (config, getattr(config, "vision_config", None), getattr(config, "backbone_config", None)):
        if isinstance(found := getattr(part, "num_channels", None), int):
            return found
    return 3
