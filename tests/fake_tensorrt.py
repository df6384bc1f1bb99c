"""A stand-in for the packages tensorrt and the CUDA driver: host memory, and ONNX Runtime behind the same calls.

A "plan" is the path of an ONNX graph and its profiles, as JSON. The context reads its inputs from the addresses that
it was given and writes its outputs to theirs, so a wrong address, shape or swap of caches gives wrong logits.
"""

from __future__ import annotations

import ctypes
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

_TYPES = {
    "tensor(int32)": ("INT32", np.int32),
    "tensor(float)": ("FLOAT", np.float32),
    "tensor(float16)": ("HALF", np.float16),
}


class FakeCuda:
    """`run_trt.Cuda` over host memory."""

    capability = 90

    def __init__(self) -> None:
        self.stream = SimpleNamespace(value=1)
        self.memory: dict[int, Any] = {}

    def allocate(self, size: int) -> int:
        buffer = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    def zero(self, pointer: int, size: int) -> None:
        assert size <= len(self.memory[pointer])
        ctypes.memset(pointer, 0, size)

    def free(self, pointer: int) -> None:
        del self.memory[pointer]

    def upload(self, pointer: int, array: Any) -> None:
        assert array.nbytes <= len(self.memory[pointer])
        ctypes.memmove(pointer, array.ctypes.data, array.nbytes)

    def download(self, array: Any, pointer: int) -> None:
        ctypes.memmove(array.ctypes.data, pointer, array.nbytes)

    def mark(self, index: int) -> None:
        pass

    def elapsed_ms(self) -> float:
        return 0.25

    def synchronize(self) -> None:
        pass


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self.engine, self.profile = engine, 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile, self.shapes = index, {}
        return index < len(self.engine.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        row = self.engine.profiles[self.profile]
        good = row["batch"][0] <= shape[0] <= row["batch"][2]
        return good and (name != "input_ids" or row["tokens"][0] <= shape[1] <= row["tokens"][2])

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self.addresses[name] = pointer
        return True

    def execute_async_v3(self, stream: int) -> bool:
        session, feeds = self.engine.session, {}
        for item in session.get_inputs():
            feeds[item.name] = self._view(item, self.shapes[item.name]).copy()
        outputs = session.get_outputs()
        for item, value in zip(outputs, session.run(None, feeds), strict=True):
            self._view(item, value.shape)[...] = value
        return True

    def _view(self, item: Any, shape: tuple[int, ...]) -> Any:
        kind = np.dtype(_TYPES[item.type][1])
        size = int(np.prod(shape)) * kind.itemsize
        raw = (ctypes.c_char * size).from_address(self.addresses[item.name])
        return np.frombuffer(raw, kind).reshape(shape)


class _Engine:
    def __init__(self, plan: bytes) -> None:
        facts = json.loads(plan)
        self.profiles = facts["profiles"]
        self.session = ort.InferenceSession(facts["graph"], providers=["CPUExecutionProvider"])
        tensors = [*self.session.get_inputs(), *self.session.get_outputs()]
        self._tensors = {item.name: item for item in tensors}
        self.num_io_tensors, self.num_optimization_profiles = len(tensors), len(self.profiles)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self._tensors[name].shape)

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=_TYPES[self._tensors[name].type][0])

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, int]]:
        row = self.profiles[index]
        return list(zip(row["batch"], row["tokens"], strict=True))

    def create_execution_context(self) -> _Context:
        return _Context(self)


class _Logger:
    ERROR, INTERNAL_ERROR, WARNING, INFO = "error", "internal error", "warning", "info"


class _Runtime:
    def __init__(self, log: Any) -> None:
        self.log = log

    def deserialize_cuda_engine(self, data: bytes) -> _Engine | None:
        if not data.startswith(b"{"):
            self.log.log(_Logger.ERROR, "Serialization assertion magicTagRead == kPLAN_SERIALIZATION failed")
            return None
        return _Engine(data)


def fake_tensorrt(version: str = "8.6.0") -> Any:
    """The module `tensorrt`."""
    return SimpleNamespace(__version__=version, ILogger=_Logger, Runtime=_Runtime)
