"""A whole ONNX graph as a function of torch's tensors; apart from the session, which runs without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from optc.runtime.sessions.ort import BFLOAT16, copied, open_engine
from optc.runtime.sessions.session import default_threads


class GraphRunner:
    """A graph as a function of its inputs in order, whatever they mean, those with a default last; tensors in, tensors out.

    Args:
        device: of the engine, "cpu" or "cuda"; tensors may be anywhere, results are on the host.

    Attributes:
        opens_instead: what this is where it is not what users run.

    Raises:
        TargetError: this ONNX Runtime cannot load the graph.
    """

    def __init__(self, path: Path, *, device: str = "cpu", opens_instead: str = "") -> None:
        self.opens_instead = opens_instead
        self._session = open_engine(path, default_threads(), device)
        self._inputs = [*self._session.get_inputs(), *self._session.get_overridable_initializers()]
        self._outputs = [item.name for item in self._session.get_outputs()]

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """Run on tensors in the order of the graph's inputs."""
        feed = {item.name: _value(tensor.detach().cpu()) for item, tensor in zip(self._inputs, inputs, strict=True)}
        return [_tensor(value) for value in self._session.run_with_ort_values(self._outputs, feed)]


def _value(tensor: torch.Tensor) -> Any:
    """A tensor as ONNX Runtime takes it; NumPy has no bfloat16."""
    if tensor.dtype is torch.bfloat16:
        bits = tensor.contiguous().view(torch.uint16).numpy()
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(tensor.numpy())


def _tensor(value: Any) -> torch.Tensor:
    if value.element_type() == BFLOAT16:
        return torch.from_numpy(copied(value, np.dtype(np.uint16))).view(torch.bfloat16)
    return torch.from_numpy(value.numpy())
