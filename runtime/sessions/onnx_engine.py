"""The graph of a TensorRT artifact on ONNX Runtime, behind the interface that `run_trt.Decoder` drives.

It serves to check an artifact where there is no GPU: same graph, same token logic, another engine. Slow: caches are
copied with every run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from optc.runtime.carried.run_trt import Profile
from optc.runtime.sessions.ort import EXACT_PRODUCTS
from optc.runtime.sessions.session import Logits, default_threads

_TYPES: dict[str, type[np.generic]] = {"tensor(float16)": np.float16, "tensor(float)": np.float32}


class OnnxEngine:
    """`model.onnx` of a TensorRT artifact.

    Args:
        path: the graph; the caller has verified it and its external data.
        profiles: as in engine.json: rows with "batch" and "tokens", each [min, opt, max].
        threads: of one operator; None takes one per physical core that this process may use.
    """

    def __init__(self, path: Path, profiles: Sequence[dict[str, Any]], threads: int | None = None) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or default_threads()
        options.add_session_config_entry(*EXACT_PRODUCTS)
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._past = {
            item.name: item for item in self._session.get_inputs() if item.name.startswith("past_key_values.")
        }
        shapes = {item.name: item.shape for item in self._session.get_outputs()}
        self._outputs = ["logits", *(name.replace("past_key_values.", "present.") for name in self._past)]
        self.vocab_size = int(shapes["logits"][-1])
        self.capacity = int(next(iter(self._past.values())).shape[2])
        self.profiles = [
            Profile((row["batch"][0], row["batch"][2]), (row["tokens"][0], row["tokens"][2])) for row in profiles
        ]
        self.gpu_ms = 0.0
        self._caches: dict[str, npt.NDArray[Any]] = {}

    def start(self, batch: int) -> None:
        """Zeroed caches for `batch` rows."""
        self._caches = {
            name: np.zeros((batch, *item.shape[1:]), _TYPES[item.type]) for name, item in self._past.items()
        }

    def run(
        self,
        profile: int,
        ids: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        last: npt.NDArray[np.int64] | None,
    ) -> Logits:
        """One run of the graph; as `run_trt.TrtEngine.run`. `gpu_ms` is the time of the run on the CPU."""
        allowed, (batch, width) = self.profiles[profile], ids.shape
        assert allowed.batch[0] <= batch <= allowed.batch[1]
        assert allowed.tokens[0] <= width <= allowed.tokens[1]
        assert int(positions.max()) + width <= self.capacity
        begin = time.perf_counter()
        logits, *caches = self._session.run(self._outputs, {"input_ids": ids, "positions": positions, **self._caches})
        self.gpu_ms = (time.perf_counter() - begin) * 1e3
        self._caches = dict(zip(self._past, caches, strict=True))
        result: Logits = logits.astype(np.float32, copy=False)
        return result if last is None else result[np.arange(batch), last]

    def close(self) -> None:
        """Drop the caches and the session."""
        self._caches = {}
        self._session = None
