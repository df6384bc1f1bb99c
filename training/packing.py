"""Whether a model keeps the documents of a packed row apart: measured, not known of any model by name."""

from __future__ import annotations

from typing import Any

import torch

from optc.training.data import Batch, Reader
from optc.training.distill import logits_of

_LENGTH = 8
_APART = 1e-4  # of the largest logit; other sums of float32 differ by 1e-6


@torch.no_grad()
def keeps_apart(model: Any) -> bool:
    """Whether the documents of a packed row do not see each other: whether the forward cuts where positions restart.

    The logits of a document are compared behind two others: recurrent layers carry a state over, and some
    attentions take their mask, or their positions, from elsewhere than `position_ids`.

    Args:
        model: on its device, before it is compiled or sharded. Its mode is left as it is.
    """
    device = next(model.parameters()).device
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    draw = torch.Generator().manual_seed(0)
    first, second, behind = torch.randint(0, vocabulary, (3, _LENGTH), generator=draw)
    ids = torch.stack([torch.cat([first, behind]), torch.cat([second, behind])])
    positions = torch.arange(_LENGTH).repeat(2).expand_as(ids)
    training = model.training
    model.eval()
    logits = logits_of(model, Batch(ids, positions, ids, packed=True, padded=False).to(device)).float()
    model.train(training)
    left, right = logits[:, _LENGTH:]
    return float((left - right).abs().max()) <= _APART * float(logits.abs().max())


def unpacked(model: Any, reader: Reader) -> tuple[Reader, tuple[str, ...]]:
    """The reader, or one of documents side by side where a model does not keep those of a packed row apart; and a note then."""
    if not reader.packs or keeps_apart(model):
        return reader, ()
    return reader.side_by_side(), (
        f"rows are not packed: documents of a packed row see each other in {type(model).__name__}, whose forward does not "
        "cut where positions restart; they stand side by side, as with data.batching=tokens",
    )
