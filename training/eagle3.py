"""Training of an EAGLE-3 draft model by self-distillation, as it will be used: "training-time test".

Li et al. 2025 (https://arxiv.org/abs/2503.01840): from each position of a text the draft model drafts several tokens, reading
its own states from the second on, and each is held to the distribution of the frozen base at that place. Tokens are
those of the text. All positions draft at once: at the k-th token a position sees the states that `fc` made up to itself,
and its own ones behind it, which are compared one by one, so that no mask over branches is needed.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from optc.compiler.analysis.module_linears import output_head
from optc.compiler.capture.eagle3_model import Attending, Eagle3
from optc.compiler.capture.facts import stated_context, text_config
from optc.compiler.diagnostics import UsageError, os_errors
from optc.compiler.model_folder.checkpoint import check_folder
from optc.compiler.model_folder.draft_origin import Origin
from optc.compiler.model_folder.eagle3 import Eagle3Config, write_eagle3
from optc.training.blocks import transformer_blocks
from optc.training.config import TrainConfig
from optc.training.data import Batch
from optc.training.distill import LossSums
from optc.training.frozen_base import FrozenBase, behind, check_boundaries, shares, within


class Eagle3Training(FrozenBase):
    """A frozen base and the draft model that learns from it.

    Args:
        counts: int64 [V], how often each token stands in the text; the most frequent ones can be drafted.

    Raises:
        UsageError: boundaries that the base has not, or a base without the sizes of a decoder.
    """

    targets: Tensor

    def __init__(self, base: Any, config: TrainConfig, counts: Tensor) -> None:
        super().__init__(base)
        self._settings, self._folder = config.eagle3, config.model
        size = min(config.eagle3.draft_vocab_size, len(counts))
        # Ascending, so that the draft vocabulary has the order of the base's; the lower one of equals.
        targets = (-counts).argsort(stable=True)[:size].sort().values
        shape = _shape(base, config, size)
        self.draft = Eagle3(shape)
        self.register_buffer("targets", targets)
        _start(self.draft, base, targets)

    def forward(self, batch: Batch) -> LossSums:
        """Cross-entropy with the base's distribution over the draft vocabulary, of each drafted token in turn.

        `LossSums.cross_entropy` is that of the first one. Places whose likeliest token cannot be drafted do not count.
        """
        logits, states = self.run_base(batch, self.draft.config.boundaries)
        draftable, wanted = (
            torch.isin(logits.argmax(-1), self.targets),
            logits[..., self.targets].float().log_softmax(-1),
        )
        state = self.draft.fc(torch.cat(states, -1))
        drafting, weights = _Drafting(self.draft, batch), shares(self._settings.decay, self._settings.draft_tokens)
        losses = []
        for place, weight in enumerate(weights):
            found, state = drafting.step(behind(batch.labels, place), state)
            counted = within(batch, place + 1) & behind(draftable, place + 1)
            target = behind(wanted, place + 1)[counted]
            losses.append(weight * -(target.exp() * found[counted].float().log_softmax(-1)).sum())
        return LossSums(torch.stack(losses).sum(), losses[0].detach() / weights[0], None)

    def write(self, source: Path, directory: Path) -> None:
        """See `FrozenBase`: the folder of `compiler/model_folder/eagle3`, in the type of the base's weights."""
        info = check_folder(source)
        dtype = info.dtype if info.dtype in (torch.bfloat16, torch.float16) else torch.float32
        tensors = {name: tensor.to(dtype) for name, tensor in self.draft.tensors().items()}
        tokenizer = source / "tokenizer.json"
        write_eagle3(directory, self.draft.config, tensors, self.targets, Origin.of(info))
        with os_errors("writing the draft model", str(directory)):
            if tokenizer.is_file():
                shutil.copyfile(tokenizer, directory / tokenizer.name)


class _Drafting:
    """All positions of a batch draft at once, token by token."""

    def __init__(self, draft: Eagle3, batch: Batch) -> None:
        self._draft, self._positions = draft, batch.position_ids
        document = (batch.position_ids == 0).cumsum(1)
        place = torch.arange(document.shape[1], device=document.device)
        same = document[:, :, None] == document[:, None, :]
        self._seen = (same & (place[:, None] >= place))[:, None]
        self._steps: list[Attending] = []

    def step(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, S, D] and states [B, S, H] behind the next token of each position.

        Args:
            tokens: int64 [B, S]. state: [B, S, H], of `fc`, then what the step before gave.
        """
        embedded = self._draft.embed_tokens(tokens)
        with_, residual = self._draft.before(embedded, state, self._positions + len(self._steps))
        groups = with_.query.shape[1] // with_.key.shape[1]
        self._steps.append(Attending(with_.query, *(part.repeat_interleave(groups, 1) for part in with_[1:])))
        return self._draft.behind(self._attend(), residual)

    def _attend(self) -> Tensor:
        """softmax over the positions up to each one in the first step, and over its own later steps."""
        first, query = self._steps[0], self._steps[-1].query
        scale = query.shape[-1] ** -0.5
        if len(self._steps) == 1:
            return functional.scaled_dot_product_attention(
                query, first.key, first.value, attn_mask=self._seen, scale=scale
            )
        later = self._steps[1:]
        scores = (query @ first.key.transpose(-1, -2)).masked_fill(~self._seen, -torch.inf)
        own = torch.stack([(query * step.key).sum(-1) for step in later], -1)
        shares = (torch.cat((scores, own), -1).float() * scale).softmax(-1).to(query.dtype)
        past, rest = shares.split([scores.shape[-1], len(later)], -1)
        return past @ first.value + sum(
            share[..., None] * step.value for share, step in zip(rest.unbind(-1), later, strict=True)
        )


def _shape(base: Any, config: TrainConfig, size: int) -> Eagle3Config:
    """The draft model for a base: a layer of its sizes."""
    facts, layers = text_config(base.config), len(transformer_blocks(base))
    boundaries = config.eagle3.boundaries or default_boundaries(layers)
    if len(boundaries) != 3 or len(set(boundaries)) < 3:
        raise UsageError("eagle3.boundaries names three different hidden states", remedy="for example [2, 4, 7]")
    check_boundaries(boundaries, layers - 1)
    hidden = int(base.get_input_embeddings().weight.shape[1])
    heads = getattr(facts, "num_attention_heads", None)
    if not heads:
        raise UsageError(
            "the base does not say how many attention heads it has",
            where=type(base).__name__,
            remedy="give a decoder whose config.json has num_attention_heads, such as LlamaForCausalLM",
        )
    rope = getattr(facts, "rope_parameters", None)
    theta = rope.get("rope_theta") if isinstance(rope, dict) else None
    return Eagle3Config(
        hidden_size=hidden,
        intermediate_size=config.eagle3.intermediate_size or getattr(facts, "intermediate_size", 0) or 4 * hidden,
        num_attention_heads=heads,
        num_key_value_heads=getattr(facts, "num_key_value_heads", None) or heads,
        head_dim=getattr(facts, "head_dim", None) or hidden // heads,
        vocab_size=int(base.get_input_embeddings().weight.shape[0]),
        draft_vocab_size=size,
        boundaries=tuple(boundaries),
        norm_before_residual=config.eagle3.norm_before_residual,
        context_length=stated_context(facts) or 2048,
        rms_norm_eps=getattr(facts, "rms_norm_eps", 1e-5),
        rope_theta=float(theta or 10000.0),
        max_draft_tokens=config.eagle3.draft_tokens,
        base=config.model,
        base_architecture=type(base).__name__,
    )


def default_boundaries(layers: int) -> tuple[int, int, int]:
    """An early, a middle and a late hidden state of a base with so many layers: as vLLM 0.24 takes them where these are
    three, and nearer to the ends where they are not."""
    usual = (2, layers // 2, layers - 3)
    if usual[0] < usual[1] < usual[2]:
        return usual
    return (1, layers // 2, layers - 1) if layers > 3 else (0, 1, 2)


@torch.no_grad()
def _start(draft: Eagle3, base: Any, targets: Tensor) -> None:
    """The base's embedding, which is shared, its final norm and head; `fc` passes on the last state; the rest is drawn."""
    size = draft.config.hidden_size
    for parameter in draft.parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=0.02)
    draft.fc.weight[:, -size:] += torch.eye(size)
    draft.embed_tokens.weight = base.get_input_embeddings().weight
    head = output_head(base)
    rows = None if head is None else head.weight
    if isinstance(rows, Tensor) and rows.shape == (draft.config.vocab_size, size):
        draft.lm_head.weight.copy_(rows[targets.to(rows.device)])
    inside = {id(module) for block in transformer_blocks(base) for module in block.modules()}
    outside = (module for module in base.modules() if id(module) not in inside)
    norms = [module.weight for module in outside if getattr(module, "weight", None) is not None]
    norms = [weight for weight in norms if weight.shape == (size,)]
    if norms:
        draft.norm.weight.copy_(norms[-1])


def token_counts(documents: Sequence[Tensor], vocabulary: int) -> Tensor:
    """int64 [V]: how often each token stands in some documents."""
    counts = torch.zeros(vocabulary, dtype=torch.int64)
    for document in documents:
        counts += document.bincount(minlength=vocabulary)
    return counts
