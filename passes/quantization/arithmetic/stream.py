"""Running a graph over many sequences from cut to cut, holding only what crosses the cut.

Calibration needs the inputs of every linear over some hundred sequences. Running the whole model once per
question, or keeping every activation, costs too much; so all sequences move through the graph together: up
to a cut, where statistics are taken and weights may be replaced, then on to the next. What is held is what
crosses the cut: in a transformer the residual stream and the input of the linears at the cut. Later cuts see
the weights that earlier ones replaced, and the whole model is computed once.

The idea of processing layer by layer with the outputs of quantized layers as inputs of the next is that of
Frantar et al. 2022 (GPTQ, https://arxiv.org/abs/2210.17323); cutting by liveness needs no notion of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.dataflow import readers
from optc.compiler.calibration.examples import Examples
from optc.compiler.diagnostics import InputError
from optc.compiler.ir.asserts import is_assert
from optc.compiler.ir.program import Program

BATCH_TOKENS = 4096
"""Tokens that run together: enough to keep a matrix product busy."""


class Stream:
    """All calibration sequences on their way through a program without a KV cache.

    Args:
        tokens: int64 [n, L], or the inputs of a module.
        weights: values in place of the program's, by placeholder; the caller may add to it while running, and
            what nothing reads any more is dropped.
        offload: keep what crosses a cut in host memory (for programs on a GPU).

    Raises:
        InputError: the program takes something that cannot be made from tokens.
    """

    def __init__(
        self,
        program: Program,
        tokens: Tensor | Examples,
        *,
        weights: dict[Node, Tensor] | None = None,
        offload: bool = False,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        self.program = program
        self.weights = {} if weights is None else weights
        self._nodes = [node for node in program.graph.nodes if node.op != "output" and not is_assert(node.target)]
        self._order = {node: index for index, node in enumerate(self._nodes)}
        self._last = {
            node: max((self._order.get(user, len(self._nodes)) for user in readers(node)), default=-1)
            for node in self._nodes
        }
        self._names = {node: program.weight_of(node) for node in self._nodes if node.op == "placeholder"}
        self._place = 0
        self._device = next((weight.device for _, weight in program.weights()), torch.device("cpu"))
        self._hold = torch.device("cpu") if offload else self._device
        self._batches: list[dict[Node, Any]]
        if isinstance(tokens, Examples):
            places = program.user_inputs()
            self._batches = [
                dict(zip(places, (item.to(self._device) for item in inputs), strict=True)) for inputs in tokens.batches
            ]
            return
        size = max(1, batch_tokens // tokens.shape[1])
        self._batches = [token_inputs(program, part.to(self._device)) for part in tokens.split(size)]

    def advance(self, node: Node) -> None:
        """Compute everything in front of `node` and `node` itself, for all sequences."""
        target = self._order[node] + 1
        if target <= self._place:
            return
        for index, held in enumerate(self._batches):
            self._batches[index] = self._run(held, target)
        self._place = target
        for replaced in [item for item in self.weights if self._last[item] < target]:
            del self.weights[replaced]  # nothing reads it any more

    def values(self, node: Node) -> Iterator[Tensor]:
        """The value of a node, batch by batch; it must cross the cut (be computed, and read further on)."""
        for held in self._batches:
            yield held[node].to(self._device)

    def edit(self, node: Node, change: Callable[[Tensor], Tensor]) -> None:
        """Replace a held value, batch by batch."""
        for held in self._batches:
            held[node] = change(held[node])

    def holds(self, node: Node) -> bool:
        """Whether the value of a node is held at this cut."""
        return all(node in held for held in self._batches)

    def _value(self, held: dict[Node, Any], node: Node) -> Any:
        if node in held:
            value = held[node]
            return value.to(self._device) if isinstance(value, Tensor) else value
        if node in self.weights:
            return self.weights[node]
        name = self._names.get(node)
        assert name is not None, f"{node.name} was dropped too early"
        return self.program.weight(name)

    def _run(self, held: dict[Node, Any], target: int) -> dict[Node, Any]:
        """Run one batch from the present cut to the one in front of node number `target`."""
        values = dict(held)
        for index in range(self._place, target):
            node = self._nodes[index]
            if node.op == "placeholder":
                continue
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: self._value(values, n))
            values[node] = compute(node.target, args, kwargs)
            for source in node.all_input_nodes:
                if self._last[source] <= index:
                    values.pop(source, None)
        kept = {node: value for node, value in values.items() if self._last[node] >= target}
        return {node: value.to(self._hold) if isinstance(value, Tensor) else value for node, value in kept.items()}


def token_inputs(program: Program, tokens: Tensor) -> dict[Node, Any]:
    """The user inputs of a program without a KV cache for tokens [B, S]: whole sequences from position 0.

    Raises:
        InputError: the program takes something that cannot be made from tokens.
    """
    rows, length = tokens.shape
    made = {
        "input_ids": lambda: tokens,
        "position_ids": lambda: torch.arange(length, device=tokens.device).expand(rows, length),
        "attention_mask": lambda: torch.ones_like(tokens),
        "token_type_ids": lambda: torch.zeros_like(tokens),
    }
    inputs: dict[Node, Any] = {}
    for node, spec in zip(program.user_inputs(), program.contract.inputs, strict=True):
        if spec.role not in made:
            raise InputError(
                "calibration feeds tokens, which this program does not take alone",
                where=f"input '{spec.name}' ({spec.role})",
                remedy="quantize before a KV cache is added; of a plain module give example inputs",
            )
        inputs[node] = made[spec.role]()
    return inputs


def compute(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """One call of a graph; plain causal attention by PyTorch's fused kernel instead of the reference."""
    fused = plain_attention(args, kwargs) if target is torch.ops.optc.attention.default else None
    return target(*args, **kwargs) if fused is None else fused


def plain_attention(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """optc.attention by the fused kernel, or None when it has padding, sinks, softcap or a window that hides something."""
    q, k, v = args[:3]
    window = int(kwargs.get("window", 0) or 0)
    if any(item is not None for item in args[3:]) or kwargs.get("softcap"):
        return None
    if q.shape[2] != k.shape[2] or 0 < window < k.shape[2]:
        return None
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=kwargs["causal"], scale=kwargs["scale"], enable_gqa=q.shape[1] != k.shape[1]
    )
