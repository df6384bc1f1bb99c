"""A whole ONNX graph as a function of torch's tensors; apart from the session, which runs without torch."""

from __future__ import annotations

from pathlib import Path

import torch

from optc.compiler.diagnostics import TargetError
from optc.runtime.sessions.ort import open_engine
from optc.runtime.sessions.session import default_threads


class GraphRunner:
    """A graph as a function of its inputs in order, whatever they mean, those with a default last; tensors in, tensors out.

    Raises:
        TargetError: this ONNX Runtime cannot load the graph, or it has bfloat16 inputs, which NumPy has not.
    """

    def __init__(self, path: Path) -> None:
        self._session = open_engine(path, default_threads())
        self._inputs = [*self._session.get_inputs(), *self._session.get_overridable_initializers()]
        ends = [*self._inputs, *self._session.get_outputs()]
        odd = [item.name for item in ends if item.type == "tensor(bfloat16)"]
        if odd:
            raise TargetError(
                "the graph has bfloat16 inputs or outputs",
                where=f"{path}: {odd[0]}",
                why="NumPy has no such type, through which ONNX Runtime takes them",
                remedy="use --dtype fp16 or fp32",
            )

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """Run on tensors in the order of the graph's inputs."""
        feed = {item.name: tensor.detach().cpu().numpy() for item, tensor in zip(self._inputs, inputs, strict=True)}
        return [torch.from_numpy(array) for array in self._session.run(None, feed)]
