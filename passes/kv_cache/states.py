"""linear_attention(q, k, v, ...)  ->  cached_linear_attention(q, k, v, ..., state), and its new state
causal_conv1d(x, weight)        ->  the convolution of the last inputs and x, and its new last inputs

States have one size whatever the number of tokens: `past_states.{i}`, [B, H, K, V] of linear attention, and of a convolution
over K tokens the K - 1 inputs before the first, [B, C, K - 1]. What a row without tokens holds is not read. A ragged prompt is
padded on the right, and padding leaves no trace in a state, which an attention cache need not see to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.dataflow import value_of
from optc.compiler.ir.contract import STATE_ROLE, Input, Output
from optc.compiler.ir.devices import program_device
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.retrace import Handler

_SCAN, _CONVOLUTION = torch.ops.optc.linear_attention.default, torch.ops.optc.causal_conv1d.default


def recurrent_calls(program: Program) -> list[Node]:
    """The calls that keep a state, in graph order."""
    return program.calls(_SCAN, _CONVOLUTION)


def row_states(program: Program) -> tuple[list[Input], list[Output]]:
    """The inputs `past_states.N` [batch, ...], and the outputs `present_states.N`, one of each per call."""
    inputs, outputs = [], []
    for index, (shape, dtype) in enumerate(map(_held, recurrent_calls(program))):
        name = str(dtype).removeprefix("torch.")
        inputs.append(Input(name=f"past_states.{index}", role=STATE_ROLE, dtype=name, dims=("batch", *shape)))
        outputs.append(Output(name=f"present_states.{index}", role=STATE_ROLE))
    return inputs, outputs


def example_states(program: Program, batch: int) -> list[Tensor]:
    """Zeros for the inputs of `row_states`, on the program's device."""
    return [
        torch.zeros((batch, *shape), dtype=dtype, device=program_device(program))
        for shape, dtype in map(_held, recurrent_calls(program))
    ]


def _held(node: Node) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape of a row's state and its type."""
    if node.target is _CONVOLUTION:
        x, weight = (value_of(item) for item in node.args[:2])
        return (int(x.shape[1]), int(weight.shape[1]) - 1), x.dtype
    key, value = (value_of(item) for item in node.args[1:3])
    return (int(key.shape[2]), int(key.shape[3]), int(value.shape[3])), torch.float32


class RowStates:
    """The recurrent calls of one run of a graph over rows that hold tokens already.

    Args:
        states: as `row_states` lists them.
        past: [B], tokens that each row holds. total: [B], with the new ones, of which there are at most `size`.
    """

    def __init__(self, states: tuple[Tensor, ...], past: Tensor, total: Tensor, size: Any) -> None:
        self._states, self._past, self._new_tokens = states, past, total - past
        self._size = size
        self.new: list[Tensor] = []
        """What the states become, in order."""

    @property
    def handlers(self) -> dict[Any, Handler]:
        return {_SCAN: self._scan, _CONVOLUTION: self._convolve}

    def write(self) -> None:
        """Put the new states in the place of the old ones."""
        for state, moved in zip(self._states, self.new, strict=True):
            state.copy_(moved)

    def _next(self) -> Tensor:
        """The state of the next call, zeros of rows without tokens."""
        state = self._states[len(self.new)]
        begun = (self._past > 0).reshape(-1, *[1] * (state.dim() - 1))
        return torch.where(begun, state, 0.0)

    def _scan(self, args: tuple[Any, ...], knobs: dict[str, Any]) -> Tensor:
        query, key, value, decay, beta = args
        real = torch.arange(self._size, device=key.device) < self._new_tokens[:, None]  # [B, S]
        key = torch.where(real[:, :, None, None], key, 0.0)
        decay = torch.where(real.reshape(*real.shape, *[1] * (decay.dim() - 2)), decay, 0.0)
        out, moved = torch.ops.optc.cached_linear_attention(query, key, value, decay, beta, self._next())
        self.new.append(moved)
        return out

    def _convolve(self, args: tuple[Any, ...], knobs: dict[str, Any]) -> Tensor:
        x, weight, bias = args
        inputs = torch.cat([self._next(), x], 2)
        width = weight.shape[1] - 1
        last = self._new_tokens[:, None] + torch.arange(width, device=x.device)  # [B, K - 1], of `inputs`
        self.new.append(inputs.gather(2, last[:, None].expand(-1, x.shape[1], -1)))
        out: Tensor = torch.nn.functional.conv1d(inputs, weight[:, None], bias, groups=weight.shape[0])
        return out
