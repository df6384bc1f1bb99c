"""Session over an ONNX graph in ONNX Runtime, on the CPU; `ort_cuda` has the one on a GPU.

`past_key_values.{i}` and `present.{i}` are bound to the same buffers, of more capacity than is used
yet: GroupQueryAttention then writes new keys and values in place and copies nothing. All inputs and
outputs of a decode step stay bound; only the attention mask, which grows, is bound anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from optc.compiler.diagnostics import ArtifactError, OptcError, ResourceError, TargetError
from optc.compiler.ir.contract import HELD_ROLES, STATE_ROLE, Contract, Input
from optc.runtime.sessions.linear import Ids, LinearSession, held_shape, lazy_zeros
from optc.runtime.sessions.session import Logits, default_threads, other_graph

BFLOAT16 = 16
"""Its number among ONNX's element types."""
# contract dtype -> (array dtype, ONNX element type); NumPy has no bfloat16.
_ELEMENTS: dict[str, tuple[type[np.generic], Any]] = {
    "float32": (np.float32, np.float32),
    "float16": (np.float16, np.float16),
    "bfloat16": (np.uint16, BFLOAT16),
    "int8": (np.int8, np.int8),
}
_TYPES = {
    "int64": "tensor(int64)",
    "int32": "tensor(int32)",
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "bfloat16": "tensor(bfloat16)",
    "int8": "tensor(int8)",
}
_DTYPES = {theirs: ours for ours, theirs in _TYPES.items()}
_NO_MEMORY = ("bad_alloc", "Failed to allocate memory", "bad allocation")

Array = npt.NDArray[Any]


class OrtSession(LinearSession):
    """A decoder with a linear KV cache in ONNX Runtime.

    Args:
        path: the graph; the caller has verified it and its external data.
        contract: names and roles of its inputs and outputs.
        threads: of one operator; None takes one per physical core that this process may use.

    Raises:
        TargetError: this ONNX Runtime cannot run the graph.
    """

    device: ClassVar[Literal["cpu", "cuda"]] = "cpu"

    def __init__(self, path: Path, contract: Contract, *, threads: int | None = None) -> None:
        if contract.kv_cache.kind != "linear" or contract.model.vocab_size < 1:
            raise other_graph(path, f"a {contract.kv_cache.kind} KV cache, {contract.model.vocab_size} tokens")
        super().__init__(contract)
        self._session = open_engine(path, threads or default_threads(), self.device)
        self._ids, self._mask = (_named(contract, role) for role in ("input_ids", "attention_mask"))
        chosen = contract.input_index("logits_from_end")
        self._from_end = None if chosen is None else contract.inputs[chosen].name
        _check_contract(contract, self._session, path)
        self._logits = next(spec.name for spec in contract.outputs if spec.role == "logits")
        self._past = [spec for spec in contract.inputs if spec.role in HELD_ROLES]
        self._present = [spec.name for spec in contract.outputs if spec.role in HELD_ROLES]
        self._logits_type, self._logits_element = _ELEMENTS[_DTYPES[self._output_type(self._logits)]]
        self._caches: list[Any] = []
        self._ones: Array = np.empty(0, np.int64)
        self._ones_address = 0
        self._step: Any = None

    def close(self) -> None:
        self._caches = []
        self._session = self._step = None

    # -- LinearSession ----------------------------------------------------------------------

    def _allocate(self, batch: int, capacity: int, keep: int) -> None:
        old, self._caches = self._caches, []
        for index, spec in enumerate(self._past):
            cache = lazy_zeros(held_shape(spec, batch, capacity), _ELEMENTS[spec.dtype][0])
            if keep and spec.role == STATE_ROLE:
                cache[:] = self._on_host(old[index])
            elif keep:
                cache[:, :, :keep] = self._on_host(old[index])[:, :, :keep]
            self._caches.append(self._placed(cache))
        self._ones = np.ones(batch * capacity, np.int64)
        self._ones_address = self._ones.ctypes.data  # asked for once: making it takes as long as a small kernel
        self._step_ids = np.zeros((batch, 1), np.int64)
        self._step_logits = np.empty((batch, 1, self.vocab_size), self._logits_type)
        self._step = self._bind(self._step_ids, self._step_logits, slice(0, batch))

    def _run(self, ids: Ids, mask: Ids, rows: slice) -> Logits:
        logits = np.empty((len(ids), 1 if self._from_end else ids.shape[1], self.vocab_size), self._logits_type)
        binding = self._bind(ids, logits, rows)
        _bind_input(binding, self._mask, mask)
        self._execute(binding)
        return self._floats(logits)

    def _run_all(self, ids: Ids, mask: Ids, rows: slice) -> Logits:
        if self._from_end is None:
            return self._run(ids, mask, rows)
        binding = self._bind(ids, None, rows)
        _bind_input(binding, self._mask, mask)
        every = np.arange(ids.shape[1], 0, -1)[None]
        _bind_input(binding, self._from_end, every)
        self._execute(binding)
        return self._floats(copied(binding.get_outputs()[0], np.dtype(self._logits_type)))

    def _decode(self, tokens: Sequence[int]) -> Logits:
        totals = [length + 1 for length in self.lengths]
        width = max(totals)
        self._reserve(width)
        self._step_ids[:, 0] = tokens
        shape = (len(totals), width)
        if len(totals) > 1:
            mask = self._ones[: len(totals) * width].reshape(shape)
            mask[:] = np.arange(width) < np.array(totals)[:, None]
        self._step.bind_input(self._mask, "cpu", 0, np.int64, shape, self._ones_address)
        if self.device != "cpu":  # binding has copied the ids there, when they were others
            _bind_input(self._step, self._ids, self._step_ids)
        self._execute(self._step)
        self.lengths = totals
        return self._floats(self._step_logits[:, 0].copy())  # the buffer is the next step's

    # -- where caches are -------------------------------------------------------------------

    def _placed(self, cache: Array) -> Any:
        """Zeroed host memory as a cache of the device, whose numbers are the same."""
        return cache

    def _on_host(self, cache: Any) -> Array:
        """The numbers of a cache, [B, Hkv, capacity, D]."""
        array: Array = cache
        return array

    def _address(self, cache: Any, rows: slice) -> tuple[Sequence[int], int]:
        """Shape and address of these rows of a cache."""
        part = cache[rows]
        return part.shape, part.ctypes.data

    # -- ONNX Runtime -----------------------------------------------------------------------

    def _bind(self, ids: Array, logits: Array | None, rows: slice) -> Any:
        """A binding of everything but the mask, over these rows of the caches.

        Args:
            logits: where they go; None lets ONNX Runtime make them, of another shape than the graph says.
        """
        binding = self._session.io_binding()
        _bind_input(binding, self._ids, ids)
        if logits is None:
            binding.bind_output(self._logits, "cpu")
        else:
            binding.bind_output(self._logits, "cpu", 0, self._logits_element, logits.shape, logits.ctypes.data)
        for cache, spec, present in zip(self._caches, self._past, self._present, strict=True):
            place = (self.device, 0, _ELEMENTS[spec.dtype][1], *self._address(cache, rows))
            binding.bind_input(spec.name, *place)
            binding.bind_output(present, *place)
        return binding

    def _execute(self, binding: Any) -> None:
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # the binding raises classes of its own, without a common base
            if (failure := _failure(error)) is not None:
                raise failure from error
            raise

    def _floats(self, logits: Array) -> Logits:
        """Logits as float32; those of bfloat16 are the upper halves of such."""
        if self._logits_element == BFLOAT16:
            wide: Logits = (logits.astype(np.uint32) << 16).view(np.float32)
            return wide
        return logits.astype(np.float32, copy=False)

    def _output_type(self, name: str) -> str:
        return str(next(item.type for item in self._session.get_outputs() if item.name == name))


def copied(value: Any, dtype: np.dtype[Any]) -> Array:
    """The numbers of an OrtValue on the host, also of a type that NumPy has not, as those of another of its size."""
    raw = (ctypes.c_char * value.tensor_size_in_bytes()).from_address(value.data_ptr())
    return np.frombuffer(bytearray(raw), dtype).reshape(tuple(value.shape()))


EXACT_PRODUCTS = ("session.qdq_matmulnbits_accuracy_level", "0")
"""ONNX Runtime fuses DequantizeLinear and MatMul into a product that rounds activations to int8; with this it does not."""


def open_engine(path: Path, threads: int, device: str = "cpu") -> Any:
    """An `onnxruntime.InferenceSession`. Products round activations only where the graph says so.

    Args:
        device: "cpu", or "cuda" for the CUDA provider on the first GPU. What it has no kernel for runs on the CPU.

    Raises:
        TargetError: this ONNX Runtime cannot run the graph, or not on the GPU.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry(*EXACT_PRODUCTS)
    said = _preload(path) if device == "cuda" else ""
    try:
        session = ort.InferenceSession(str(path), options, providers=PROVIDERS[device])
    except Exception as error:  # the binding raises classes of its own, without a common base
        raise TargetError(
            f"ONNX Runtime {ort.__version__} cannot load the graph",
            where=str(path),
            why=str(error).splitlines()[0],
            remedy="use the version that the manifest names under needs, or a later one",
        ) from error
    if PROVIDERS[device][0] not in session.get_providers():  # it only warns
        raise _no_cuda(path, said or "ONNX Runtime did not say why; optc check names the driver and the package")
    return session


PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
"""Device -> execution providers of a session, in their order."""


def has_cuda() -> bool:
    """Whether this ONNX Runtime was built with the CUDA provider; a GPU may be missing all the same."""
    return PROVIDERS["cuda"][0] in ort.get_available_providers()


def _preload(path: Path) -> str:
    """Load CUDA's libraries from the packages that pip installed, where ONNX Runtime can; what it says of those that miss.

    Raises:
        TargetError: this ONNX Runtime has no CUDA provider.
    """
    if not has_cuda():
        raise _no_cuda(path, f"ONNX Runtime {ort.__version__} has {', '.join(ort.get_available_providers())}")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        ort.preload_dlls()
    return " ".join(said.getvalue().split())[:300]


def _no_cuda(path: Path, why: str) -> TargetError:
    return TargetError(
        "ONNX Runtime cannot use its CUDA provider here",
        where=str(path),
        why=why,
        remedy="run it where there is an NVIDIA GPU with its driver; pip uninstall onnxruntime, then pip install "
        "'onnxruntime-gpu[cuda,cudnn]'",
    )


def run_engine(engine: Any, outputs: Sequence[str], feed: Mapping[str, Array]) -> list[Array]:
    """Outputs by name of inputs by name.

    Raises:
        ResourceError, ArtifactError: see `_failure`.
    """
    try:
        return list(engine.run(list(outputs), dict(feed)))
    except Exception as error:  # the binding raises classes of its own, without a common base
        if (failure := _failure(error)) is not None:
            raise failure from error
        raise


def _failure(error: Exception) -> OptcError | None:
    """A failure of a running graph in words for users; None of what is none, such as a wrong argument.

    Returns:
        ResourceError: out of memory. ArtifactError: the graph does not run as its manifest describes it.
    """
    if any(text in str(error) for text in _NO_MEMORY):
        return ResourceError(
            "ONNX Runtime ran out of memory", why=str(error), remedy="use shorter prompts or a smaller batch"
        )
    if not isinstance(error, RuntimeError):
        return None
    return ArtifactError(  # a manifest may promise a longer context than the graph has tables for
        "ONNX Runtime cannot run the graph as the manifest describes it",
        why=str(error)[:500],
        remedy="copy the artifact again from where it was made, or compile it again",
    )


def _bind_input(binding: Any, name: str, array: Array) -> None:
    binding.bind_input(name, "cpu", 0, np.int64, array.shape, array.ctypes.data)


def _check_contract(contract: Contract, session: Any, path: Path) -> None:
    """Refuse a contract of another graph: the bindings trust its names, types and sizes.

    Raises:
        ArtifactError: names what the graph has otherwise.
    """
    taken = {item.name: item for item in (*session.get_inputs(), *session.get_overridable_initializers())}
    for spec in contract.inputs:
        item = taken.get(spec.name)
        sizes = None if item is None else [size if isinstance(size, int) else None for size in item.shape]
        said = [size if isinstance(size, int) else None for size in spec.dims]
        same = sizes == said or spec.role == "logits_from_end"  # whose default has a size
        if item is None or item.type != _TYPES.get(spec.dtype) or not same:
            found = "no such input" if item is None else f"{item.type} {item.shape}"
            raise other_graph(path, f"'{spec.name}' is {spec.dtype} {list(spec.dims)}, the graph has {found}")
    caches = [spec for spec in contract.inputs if spec.role in HELD_ROLES]
    present = [spec.name for spec in contract.outputs if spec.role in HELD_ROLES]
    given = {item.name: item.shape for item in session.get_outputs()}
    roles = [spec.role for spec in contract.outputs]
    wide = all(map(_is_wide, caches)) and [spec.role for spec in caches] == [
        role for role in roles if role in HELD_ROLES
    ]
    if len(caches) != len(present) or not wide or roles.count("logits") != 1:
        raise other_graph(path, f"{len(caches)} caches come in, {len(present)} go out, {roles.count('logits')} logits")
    for output in contract.outputs:
        if output.name not in given:
            raise other_graph(path, f"the graph has no output '{output.name}'")
        if output.role == "logits" and given[output.name][-1] != contract.model.vocab_size:
            raise other_graph(path, f"{contract.model.vocab_size} tokens, and logits {given[output.name]}")


def _is_wide(spec: Input) -> bool:
    """Whether a cache [B, heads, T, D] or a state [B, ...] says all sizes but those of rows and tokens."""
    if spec.role == STATE_ROLE:
        return isinstance(spec.dims[0], str) and all(isinstance(size, int) for size in spec.dims[1:])
    return len(spec.dims) == 4 and isinstance(spec.dims[1], int) and isinstance(spec.dims[3], int)


def _named(contract: Contract, role: Any) -> str:
    index = contract.input_index(role)
    if index is None:
        raise other_graph("manifest.json", f"a linear-cache contract without {role}")
    return contract.inputs[index].name
