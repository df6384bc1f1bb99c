"""Calls of a paged program with prompts, padded to sizes that repeat: fixed inputs on the device, logits of last tokens.

On CUDA the second call of a size is captured in a graph, which later ones replay: a short prompt costs Python many times
what it costs the GPU. A size that comes once, as in a process that answers one prompt, is not captured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from optc.compiler.execution.block_manager import StepInputs
from optc.compiler.kernels.cuda.dispatch import kernels_only, whole_prompt
from optc.compiler.ops.dialect.paged import PADDING
from optc.runtime.sessions.cuda_graphs import Launch, Recorder

Run = Callable[..., Any]
"""A paged program: its inputs, flat and in the order of the contract -> its logits."""

_LEAST_TOKENS = 16
"""Rows of the smallest product of tensor cores."""
_WIDEST_STEP = 256
"""Between sizes: a tile or two of a product, where products take longer than their launches."""
_ALIGNED = 16
"""Bytes: where a tensor begins; kernels load as many at a time."""
_Size = tuple[int, int, int]
"""Tokens, requests, and columns of the block tables."""


def call_size(tokens: int, requests: int) -> tuple[int, int]:
    """The size of the call that takes so many tokens of so many requests: (tokens, requests), with padding.

    Tokens are powers of two with one size between each two of them, and from 1024 on multiples of 256. The requests are
    a power of two, with one to spare, which padding belongs to. There are fewer of them than tokens, always: as many
    of both mean one token for each of them, and other kernels (see `kernels/cuda/attention`).
    """
    most = 1 << requests.bit_length()
    size = token_size(tokens)
    while size <= most:
        size = token_size(size + 1)
    return size, most


def token_size(tokens: int) -> int:
    """The smallest size of a call that holds so many tokens."""
    step = max(_LEAST_TOKENS, 1 << max(0, (tokens - 1).bit_length() - 2))
    step = min(step, _WIDEST_STEP)
    return -(-tokens // step) * step


def token_sizes(most: int) -> list[int]:
    """All sizes of calls up to that of `most` tokens."""
    sizes = [token_size(1)]
    while sizes[-1] < most:
        sizes.append(token_size(sizes[-1] + 1))
    return sizes


class PromptCall:
    """A call of `tokens` tokens of `requests` requests with block tables of `width` columns, filled up with padding.

    Args:
        run: the program, which takes `logits_indices`.
        pools: its KV pools, which it writes in place.
        tokens, requests: see `call_size`.
        record: None where calls run as they are.
    """

    def __init__(
        self,
        run: Run,
        pools: Sequence[Tensor],
        *,
        tokens: int,
        requests: int,
        width: int,
        record: Recorder | None,
    ) -> None:
        device = pools[0].device
        self.tokens, self.requests = tokens, requests
        self._run, self._pools, self._record = run, pools, record
        size, pinned = (tokens, requests, width), device.type == "cuda"
        self._memory = torch.zeros(_place(size)[-1] // 8, dtype=torch.int64, device=device)
        self._staged_memory = torch.zeros_like(self._memory, device="cpu", pin_memory=pinned)
        self._inputs = _inputs_in(self._memory, size)
        staged, rows = _inputs_in(self._staged_memory, size)
        self._staged = [item.numpy() for item in (*staged, rows)]  # a write of numpy's takes a third of torch's
        self._copied = torch.cuda.Event() if pinned else None
        self._has_run, self._whole = False, 0
        self._replay: Launch | None = None
        self._logits = torch.empty(0)

    @property
    def recorded(self) -> bool:
        """Whether calls are replayed by now."""
        return self._replay is not None

    @torch.inference_mode()
    def __call__(self, inputs: StepInputs) -> Tensor:
        """Logits [R, V] of the last token of each of the R requests of a call; the next one may overwrite them."""
        self._load(inputs)
        if self._has_run and self._replay is None and self._record is not None:
            self._replay = self._record(f"a prompt of {self.tokens} tokens", self._compute)
        (self._replay or self._compute)()
        self._has_run = True
        return self._logits[: len(inputs.context_lens)]

    def _load(self, inputs: StepInputs) -> None:
        tokens, requests = len(inputs.input_ids), len(inputs.context_lens)
        assert tokens <= self.tokens
        assert requests < self.requests
        if self._copied is not None:
            self._copied.synchronize()
        ids, positions, slots, tables, lengths, starts, rows = self._staged
        given = [item.numpy() for item in inputs]
        for staged, values in zip((ids, positions, slots), given[:3], strict=True):
            staged[:tokens], staged[tokens:] = values, 0
        slots[tokens:] = PADDING
        tables[:] = lengths[requests:] = rows[requests:] = 0
        tables[:requests, : given[3].shape[1]] = given[3]
        lengths[:requests] = given[4]
        starts[: requests + 1] = given[5]
        starts[requests + 1 :] = self.tokens  # one more request, of padding; the others have no tokens
        rows[:requests] = given[5][1:] - 1
        alone = requests == 1 and tokens == lengths[0] and (slots[:tokens] != PADDING).all()
        self._whole = tokens if alone else 0
        self._memory.copy_(self._staged_memory, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def _compute(self) -> None:
        with kernels_only(), whole_prompt(self._whole):
            step, rows = self._inputs
            output = self._run(*step, rows, *self._pools)
        self._logits = output[0] if isinstance(output, tuple | list) else output


def _layout(size: _Size) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """Types and shapes of `StepInputs` and of `logits_indices`."""
    tokens, requests, width = size
    long, int32 = torch.int64, torch.int32
    per_request = [(int32, (requests, width)), (int32, (requests,)), (int32, (requests + 1,)), (long, (requests,))]
    return [(long, (tokens,))] * 3 + per_request


def _place(size: _Size) -> list[int]:
    """Where in one piece of memory each tensor of `_layout` begins, and its bytes: one copy brings all of them."""
    places = [0]
    for dtype, shape in _layout(size):
        used = math.prod(shape) * dtype.itemsize
        places.append(places[-1] + -(-used // _ALIGNED) * _ALIGNED)
    return places


def _inputs_in(memory: Tensor, size: _Size) -> tuple[StepInputs, Tensor]:
    parts = [
        memory.view(torch.uint8)[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        for begin, (dtype, shape) in zip(_place(size), _layout(size), strict=False)
    ]
    return StepInputs(*parts[:-1]), parts[-1]
