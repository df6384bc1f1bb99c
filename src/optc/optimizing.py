"""`optc.optimize`: compile a model and run it in this process, without an artifact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optc.api import capture_resolved, run_passes
from optc.capturing import Model
from optc.compiler.artifact.manifest import PassRecord
from optc.compiler.diagnostics import UsageError
from optc.compiler.ir.program import Program
from optc.compiler.settings.fields import check_type
from optc.exporters.inductor.cuda import check_paged
from optc.request import from_python
from optc.resolving import resolve
from optc.runtime.generation.tokenizer import Tokenizer, eos_token_ids, load_tokenizer
from optc.runtime.sessions.cuda import CudaSession, check_gpu
from optc.runtime.sessions.cuda_memory import plan_for
from optc.runtime.sessions.text_model import TextModel

TARGET = "inductor-cuda"


class Optimized(TextModel):
    """A compiled model on the GPU: `generate`, `generate_batch`, `forward`.

    Attributes:
        program: the last stage. passes: what each pass did.
        seconds: of capture, moving, and passes.
    """

    session: CudaSession

    def __init__(
        self,
        session: CudaSession,
        tokenizer: Tokenizer | None,
        stop_ids: tuple[int, ...],
        *,
        program: Program,
        passes: tuple[PassRecord, ...],
        seconds: Mapping[str, float],
    ) -> None:
        super().__init__(session, tokenizer, stop_ids)
        self.program, self.passes, self.seconds = program, passes, dict(seconds)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits float32 [B, S, V] of token ids [B, S], on the CPU; the session's cache starts over.

        Raises:
            InputError: unknown token ids, or rows that are longer than the context.
        """
        if input_ids.dim() != 2:
            raise UsageError(f"input_ids has {input_ids.dim()} axes, not [B, S]", remedy="input_ids[None]")
        rows = [np.concatenate(list(self.session.score(row))) for row in input_ids.tolist()]
        return torch.from_numpy(np.stack(rows))

    __call__ = forward


def optimize(model: Model, *, quant: str | None = None, kv_blocks: int | None = None, **options: Any) -> Optimized:
    """Compile a model for the GPU of this machine and open it, without writing an artifact.

    Args:
        model: model folder, transformers model or Program.
        quant: quantization method, or None.
        kv_blocks: blocks of the KV pool; None takes 8 full contexts, as far as memory goes.
        options: keys of a request, as `optc.compile` takes them (dtype=, bits=, group_size=, max_kl=, ...).

    Raises:
        TargetError: no GPU that can run it. OptcError: as `optc.compile`.
    """
    device = check_gpu("optc.optimize")
    resolved = resolve(from_python(TARGET, quant=quant, **{"device": str(device), **options}))
    check_type("model", model, Model, "a model folder, a transformers model or a Program")
    path = Path(model) if isinstance(model, str | Path) else None
    captured = capture_resolved(model, None, resolved)
    seconds: dict[str, float] = {}
    result = run_passes(captured, resolved, None, seconds)
    check_paged(result.program)
    del captured  # its weights may be many
    session = CudaSession(result.program, plan_for(result.program, device, num_blocks=kv_blocks, loaded=True))
    ids = result.program.contract.model.eos_token_ids
    return Optimized(
        session,
        None if path is None else load_tokenizer(path),
        ids if path is None else eos_token_ids(path, ids),
        program=result.program,
        passes=result.records,
        seconds=seconds,
    )
