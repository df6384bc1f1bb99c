"""Session over an ONNX graph in ONNX Runtime's CUDA provider: caches stay on the GPU, logits come to the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import onnxruntime as ort

from optc.runtime.sessions.ort import Array, OrtSession


class OrtCudaSession(OrtSession):
    """As `OrtSession`, on the first GPU.

    Raises:
        TargetError: this ONNX Runtime has no CUDA provider, there is no GPU, or it cannot run the graph.
    """

    device: ClassVar[Literal["cpu", "cuda"]] = "cuda"

    @property
    def device_name(self) -> str:
        return "the first GPU, by ONNX Runtime's CUDA provider"

    def _placed(self, cache: Array) -> Any:
        return ort.OrtValue.ortvalue_from_numpy(cache, self.device, 0)

    def _on_host(self, cache: Any) -> Array:
        array: Array = cache.numpy()
        return array

    def _address(self, cache: Any, rows: slice) -> tuple[Sequence[int], int]:
        count, *shape = cache.shape()
        start, end, _ = rows.indices(count)
        row = cache.tensor_size_in_bytes() // count
        return [end - start, *shape], cache.data_ptr() + start * row
