"""Run a TensorRT artifact: `model.plan`, described by `engine.json` beside it.

This file needs Python 3.8, numpy, NVIDIA's driver and the TensorRT Python package (tensorrt 8.5 or later, or
tensorrt_rtx), and tokenizers for text. It travels inside artifacts, so it imports nothing else:

    python run_trt.py --prompt "The old man" --max-new-tokens 64
    python run_trt.py --prompt-tokens 5,17,33 --prompt-tokens 8,9 --json
    python run_trt.py --perplexity windows.json
    python run_trt.py --bench

The graph takes `input_ids` [B, S], `positions` [B] (tokens in the cache of each row) and caches
[B, heads, capacity, head_dim] that this program owns: `in_place` graphs write into them, `ping_pong` graphs read one
set and write another. Rows are padded on the right; later tokens overwrite what padding left in a cache.

Exit codes are optc's: 2 usage, 3 bad input, 4 this machine cannot run the plan, 5 logits that are no numbers,
7 damaged artifact, 8 out of memory.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # its own folder comes first: a file of an artifact would be taken for a module of Python's
    _HERE = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [item for item in sys.path if os.path.realpath(item) != _HERE]

import argparse
import collections
import ctypes
import hashlib
import importlib
import json
import re
import statistics
import time
from typing import Any, NamedTuple, Sequence

import numpy as np

FORMAT = 1
_MOST_DESCRIPTION = 1 << 20  # bytes of engine.json
PORTABLE = (80, 86, 89, 120, 121)
"""Compute capabilities, times ten, that a portable plan of TensorRT for RTX runs on."""
_BYTES = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT32": 4, "INT64": 8, "INT8": 1, "FP8": 1}
_CACHE = re.compile(r"past_key_values\.(\d+)\.(key|value)\Z")
Rows = Sequence[Sequence[int]]


class RunnerError(RuntimeError):
    """What stops a run; `exit_code` as in this file's head."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Profile(NamedTuple):
    """Shapes that the plan was built for: least and most rows, and tokens per row."""

    batch: tuple[int, int]
    tokens: tuple[int, int]


# -- token logic: any engine ------------------------------------------------------------------


class Decoder:
    """Rows of tokens on an engine, each with its own cache.

    Args:
        engine: `vocab_size`, `capacity`, `profiles`, `start(batch)`, and `run(profile, ids, positions, last)`,
            which gives the logits of token `last[b]` of each row [B, V], or of all tokens [B, S, V] for None.

    Attributes:
        rows: the tokens in the cache of each row.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.rows: list[list[int]] = []
        self._profiles: list[int] = []

    def start(self, batch: int) -> None:
        """Empty caches for `batch` rows."""
        profiles = self.engine.profiles
        fits = [i for i, item in enumerate(profiles) if item.batch[0] <= batch <= item.batch[1]]
        if not fits:
            most = max(item.batch[1] for item in profiles)
            raise RunnerError(f"a batch of {batch} does not fit the plan, which takes 1 to {most} rows", 3)
        self._profiles = sorted(fits, key=lambda i: (profiles[i].tokens[1], i))
        self.rows = [[] for _ in range(batch)]
        self.engine.start(batch)

    def prefill(self, prompts: Rows) -> Any:
        """Start over with prompts of any lengths; logits [B, V] after the last token of each."""
        if not prompts or not all(len(row) for row in prompts):
            raise RunnerError("give at least one prompt, each of at least one token", 3)
        self._check(prompts, [0] * len(prompts))
        self.start(len(prompts))
        return self.advance(prompts)

    def advance(self, rows: Rows) -> Any:
        """Append tokens to the rows; logits [B, V] after the last. A row without new ones stays as it is."""
        self._check(rows, [len(row) for row in self.rows])
        logits = np.zeros((len(rows), self.engine.vocab_size), np.float32)
        pending = [list(row) for row in rows]
        while any(pending):
            width = min(self._widest(), max(map(len, pending)))
            last = [bool(row) and len(row) <= width for row in pending]
            logits[last] = self._run([row[:width] for row in pending], width, every=False)[last]
            pending = [row[width:] for row in pending]
        return logits

    def score(self, tokens: Sequence[int]) -> Any:
        """Append tokens to the only row; the logits [n, V] after each."""
        assert len(self.rows) == 1
        self._check([tokens], [len(self.rows[0])])
        width = self._widest()
        parts = [list(tokens[start : start + width]) for start in range(0, len(tokens), width)]
        return np.concatenate([self._run([part], len(part), every=True) for part in parts])

    def rewind(self, lengths: Sequence[int]) -> None:
        """Keep the first `lengths[b]` tokens of each row."""
        assert all(0 <= n <= len(row) for n, row in zip(lengths, self.rows))
        for row, length in zip(self.rows, lengths):
            del row[length:]

    def _widest(self) -> int:
        return min(self.engine.capacity, self.engine.profiles[self._profiles[-1]].tokens[1])

    def _run(self, new: list[list[int]], width: int, every: bool) -> Any:
        """One run over at most `width` new tokens of each row.

        A row whose padding would pass the end of its cache starts earlier and reads its last tokens again: the
        same token at the same position writes the same keys and values.
        """
        index, least = self._pick(width)
        width = max(width, least)
        ids = np.zeros((len(new), width), np.int32)
        positions, last = np.zeros(len(new), np.int32), np.zeros(len(new), np.int64)
        for b, (held, row) in enumerate(zip(self.rows, new)):
            positions[b] = min(len(held), self.engine.capacity - width)
            text = held[positions[b] :] + row
            ids[b, : len(text)] = text
            last[b] = max(len(text) - 1, 0)
        logits = self.engine.run(index, ids, positions, None if every else last)
        if every:
            logits = logits[0, last[0] + 1 - len(new[0]) : last[0] + 1]
        for held, row in zip(self.rows, new):
            held.extend(row)
        return logits

    def _pick(self, width: int) -> tuple[int, int]:
        """The narrowest profile that takes `width` tokens, and the fewest tokens that it takes."""
        for index in self._profiles:
            least, most = self.engine.profiles[index].tokens
            if width <= most:
                return index, least
        raise AssertionError("a chunk is wider than every profile")

    def _check(self, rows: Rows, held: Sequence[int]) -> None:
        if len(rows) != len(held):
            raise RunnerError(f"{len(rows)} row(s) given to a batch of {len(held)}", 2)
        for b, (row, length) in enumerate(zip(rows, held)):
            if len(row) and not 0 <= min(row) <= max(row) < self.engine.vocab_size:
                limit = self.engine.vocab_size - 1
                raise RunnerError(f"row {b}: token ids must be from 0 to {limit}", 3)
            if length + len(row) > self.engine.capacity:
                found = f"row {b}: {length + len(row)} tokens do not fit"
                raise RunnerError(f"{found} the plan's cache of {self.engine.capacity} tokens", 3)


class Sampler:
    """One token per row: greedy at temperature 0, else temperature, top-k, top-p and a draw, in that order.

    Draws are optc's own (runtime/generation/sampling.py): the same seed and prompt give the same tokens.
    """

    def __init__(self, prompts: Rows, temperature: float, top_k: int, top_p: float, seed: int) -> None:
        if temperature < 0 or top_k < 0 or not 0 < top_p <= 1 or seed < 0:
            raise RunnerError("temperature, top-k and seed must be 0 or more, top-p above 0 and at most 1", 2)
        if temperature == 0 and (top_k or top_p < 1):
            raise RunnerError("top-k and top-p have no effect at temperature 0", 2)
        self._options = (temperature, top_k, top_p)
        self._streams: list[Any] = []
        seen: dict[tuple[int, ...], int] = collections.Counter()
        for prompt in map(tuple, prompts):
            entropy = np.random.SeedSequence([seed, seen[prompt], *list(prompt)])
            self._streams.append(np.random.Generator(np.random.PCG64(entropy)))
            seen[prompt] += 1

    def __call__(self, logits: Any, running: Sequence[bool]) -> list[int]:
        """A token for every row; rows that do not run get -1 and draw nothing."""
        chosen = [-1] * len(logits)
        for b in range(len(logits)):
            if not running[b]:
                continue
            best = int(logits[b].argmax())  # NaN counts as the largest
            if not np.isfinite(logits[b, best]):
                raise RunnerError(f"row {b}: the plan computes logits that are not finite", 5)
            chosen[b] = best if self._options[0] == 0 else self._draw(logits[b], self._streams[b])
        return chosen

    def _draw(self, scores: Any, stream: Any) -> int:
        temperature, top_k, top_p = self._options
        scores = scores.astype(np.float32) / np.float32(temperature)
        ids = np.arange(len(scores))
        if 0 < top_k < len(scores):
            ids = np.flatnonzero(scores >= np.partition(scores, len(scores) - top_k)[len(scores) - top_k])
            scores = scores[ids]
        weights = np.exp(scores - scores.max())
        if top_p < 1:
            descending = np.sort(weights)[::-1].astype(np.float64)
            before = np.cumsum(descending) - descending
            smallest = descending[np.count_nonzero(before < top_p * weights.sum(dtype=np.float64)) - 1]
            kept = np.flatnonzero(weights >= smallest)
            ids, weights = ids[kept], weights[kept]
        cumulative = np.cumsum(weights, dtype=np.float64)
        point = min(stream.random() * cumulative[-1], np.nextafter(cumulative[-1], 0))
        return int(ids[np.searchsorted(cumulative, point, side="right")])


class Generated(NamedTuple):
    """Tokens and stop reason of each row; milliseconds to the first token, and of each step after it."""

    tokens: list[list[int]]
    stop: list[str | None]
    prefill_ms: float
    step_ms: list[float]


def generate(decoder: Decoder, prompts: Rows, limit: int, stop_ids: Sequence[int], sampler: Sampler) -> Generated:
    """Continue every prompt by at most `limit` tokens; a row ends with its first stop token, which is included."""
    if limit < 1:
        raise RunnerError("max-new-tokens must be 1 or more", 2)
    tokens: list[list[int]] = [[] for _ in prompts]
    stop: list[str | None] = [None for _ in prompts]
    times, begin = [], time.perf_counter()
    logits = decoder.prefill(prompts)
    while True:
        running = [reason is None for reason in stop]
        for b, token in enumerate(sampler(logits, running)):
            if not running[b]:
                continue
            tokens[b].append(token)
            if token in stop_ids:
                stop[b] = "stop-token"
            elif len(tokens[b]) >= limit:
                stop[b] = "length"
            elif len(decoder.rows[b]) >= decoder.engine.capacity:
                stop[b] = "context"
        times.append(time.perf_counter() - begin)
        if None not in stop:
            return Generated(tokens, stop, times[0] * 1e3, [second * 1e3 for second in times[1:]])
        begin = time.perf_counter()
        logits = decoder.advance([row[-1:] if reason is None else [] for row, reason in zip(tokens, stop)])


def perplexity(decoder: Decoder, windows: Rows) -> dict[str, Any]:
    """exp of the mean negative log likelihood, in nats, of every token but the first of each window."""
    total, count = 0.0, 0
    for window in windows:
        if len(window) < 2:
            raise RunnerError("a window of fewer than 2 tokens has no perplexity", 3)
        decoder.start(1)
        logits = decoder.score(window[:-1]).astype(np.float64)
        top = logits.max(axis=1)
        norm = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        total += float((norm - logits[np.arange(len(logits)), np.asarray(window[1:])]).sum())
        count += len(logits)
    if not np.isfinite(total):
        raise RunnerError("the plan computes logits that are not finite", 5)
    return {"perplexity": float(np.exp(total / count)), "tokens": count, "windows": len(windows)}


def bench(decoder: Decoder, batch: int, prompt: int, steps: int, rounds: int) -> dict[str, Any]:
    """Median milliseconds of prefill and of a decode step, by the host's clock and by the GPU's.

    The host's figures hold the copies of ids and of one row of logits; the GPU's only the graph.
    """
    prefill, decode = [], []
    random = np.random.RandomState(0)
    for turn in range(rounds + 1):  # the first round warms up
        prompts = random.randint(0, decoder.engine.vocab_size, (batch, prompt)).tolist()
        begin = time.perf_counter()
        decoder.prefill(prompts)
        first = (time.perf_counter() - begin, decoder.engine.gpu_ms)
        each = []
        for _ in range(steps):
            begin = time.perf_counter()
            decoder.advance([[7 % decoder.engine.vocab_size]] * batch)
            each.append((time.perf_counter() - begin, decoder.engine.gpu_ms))
        if turn:
            prefill.append(first)
            decode.extend(each)
    result: dict[str, Any] = {"batch": batch, "prompt": prompt, "steps": steps, "rounds": rounds}
    for name, figures in (("prefill", prefill), ("decode", decode)):
        result[name + "_host_ms"] = statistics.median(host * 1e3 for host, _ in figures)
        result[name + "_gpu_ms"] = statistics.median(gpu for _, gpu in figures)
    return result


# -- CUDA and TensorRT ------------------------------------------------------------------------


class Cuda:
    """The few calls of the CUDA driver that a run needs, on device 0."""

    def __init__(self) -> None:
        name = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
        try:
            self._lib = ctypes.CDLL(name)
        except OSError as error:
            raise RunnerError(f"there is no NVIDIA driver on this machine: {error}", 4) from error
        code, count = self._lib.cuInit(0), ctypes.c_int()
        code = code or self._lib.cuDeviceGetCount(ctypes.byref(count))
        if code or not count.value:
            raise RunnerError(f"NVIDIA's driver finds no GPU that it can use (CUDA error {code})", 4)
        self._device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuDeviceGet", ctypes.byref(self._device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self.call("cuCtxSetCurrent", context)
        self.stream = self._handle("cuStreamCreate")
        self._events = [self._handle("cuEventCreate") for _ in range(2)]

    def call(self, function: str, *arguments: Any) -> None:
        """Call the driver; an error code becomes an exception."""
        code = getattr(self._lib, function)(*arguments)
        if code == 2:
            raise RunnerError(f"out of GPU memory in {function}", 8)
        if code:
            text = ctypes.c_char_p()
            self._lib.cuGetErrorString(code, ctypes.byref(text))
            raise RunnerError("{} failed: {}".format(function, (text.value or b"unknown").decode()), 4)

    def _handle(self, function: str) -> Any:
        handle = ctypes.c_void_p()
        self.call(function, ctypes.byref(handle), 0)
        return handle

    def attribute(self, index: int) -> int:
        """cuDeviceGetAttribute; 75 and 76 are the compute capability."""
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), index, self._device)
        return value.value

    @property
    def capability(self) -> int:
        """Compute capability times ten: 89 for 8.9."""
        return 10 * self.attribute(75) + self.attribute(76)

    def allocate(self, size: int) -> int:
        """Zeroed device memory."""
        pointer = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
        self.zero(pointer.value, size)
        return pointer.value

    def zero(self, pointer: int, size: int) -> None:
        self.call("cuMemsetD8Async", ctypes.c_uint64(pointer), ctypes.c_ubyte(0), ctypes.c_size_t(size), self.stream)

    def free(self, pointer: int) -> None:
        self.call("cuMemFree_v2", ctypes.c_uint64(pointer))

    def upload(self, pointer: int, array: Any) -> None:
        """The array must live until `synchronize`."""
        self.call(
            "cuMemcpyHtoDAsync_v2",
            ctypes.c_uint64(pointer),
            ctypes.c_void_p(array.ctypes.data),
            ctypes.c_size_t(array.nbytes),
            self.stream,
        )

    def download(self, array: Any, pointer: int) -> None:
        self.call(
            "cuMemcpyDtoHAsync_v2",
            ctypes.c_void_p(array.ctypes.data),
            ctypes.c_uint64(pointer),
            ctypes.c_size_t(array.nbytes),
            self.stream,
        )

    def mark(self, index: int) -> None:
        """Record event 0 or 1."""
        self.call("cuEventRecord", self._events[index], self.stream)

    def elapsed_ms(self) -> float:
        """From event 0 to event 1, after `synchronize`."""
        value = ctypes.c_float()
        self.call("cuEventElapsedTime", ctypes.byref(value), self._events[0], self._events[1])
        return value.value

    def synchronize(self) -> None:
        self.call("cuStreamSynchronize", self.stream)


class TrtEngine:
    """A plan with the caches and buffers of one batch; see `Decoder` for its interface.

    Raises:
        RunnerError: this machine or this TensorRT cannot run the plan, or a file is damaged.
    """

    def __init__(self, folder: str, info: dict[str, Any]) -> None:
        plan = _plan_path(folder, info)
        self.cuda = Cuda()
        check_capability(self.cuda.capability, info["compute_capabilities"])
        trt = import_tensorrt(info["runtime"], info["runtime_version"])
        with open(plan, "rb") as file:
            data = file.read()
        if hashlib.sha256(data).hexdigest() != info["plan_sha256"]:
            raise RunnerError(f"{plan}: the plan was changed after engine.json was written", 7)
        self._log = _logger(trt)
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(data)
        # A context per profile: changing the profile of one took 1.1 s (TensorRT 8.6, H100).
        self._contexts: dict[int, Any] = {}
        self._context: Any = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._shapes_of: dict[int, dict[str, tuple[int, ...]]] = {}
        if not self._engine:
            raise RunnerError(f"{plan}: TensorRT refuses the plan: {self._log.last()}", 4)
        self._select(0)
        self._ping_pong = info["cache"]["update"] == "ping_pong"
        self._read_bindings(info)
        self.gpu_ms, self._batch = 0.0, 0
        self._caches: list[list[int]] = []
        self._buffers: dict[str, tuple[int, int]] = {}

    def _read_bindings(self, info: dict[str, Any]) -> None:
        """Names, shapes and profiles as the plan has them, held against engine.json."""
        engine = self._engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        found = [match for match in map(_CACHE.match, names) if match]
        self._past = [m.group(0) for m in sorted(found, key=lambda m: (int(m.group(1)), m.group(2)))]
        self._present = [name.replace("past_key_values.", "present.") for name in self._past]
        wanted = {"input_ids", "positions", "logits"}.union(self._past, self._present)
        if set(names) != wanted or len(self._past) != 2 * info["cache"]["layers"]:
            raise RunnerError("the plan's inputs and outputs are not those of engine.json", 7)
        self._shape = {name: tuple(engine.get_tensor_shape(name)) for name in names}
        self._size = {name: _BYTES[engine.get_tensor_dtype(name).name] for name in names}
        pairs = list(zip(self._past, self._present))
        if any((self._shape[a], self._size[a]) != (self._shape[b], self._size[b]) for a, b in pairs):
            raise RunnerError("the plan's cache inputs and outputs differ in shape or type", 7)
        self.vocab_size, self.capacity = self._shape["logits"][-1], self._shape[self._past[0]][2]
        if (self.vocab_size, self.capacity) != (info["vocab_size"], info["cache"]["capacity"]):
            raise RunnerError("the plan's vocabulary or capacity is not that of engine.json", 7)
        if self._size["input_ids"] != 4 or self._size["positions"] != 4:
            raise RunnerError("the plan's ids and positions are not int32", 7)
        self.profiles = []
        for i in range(engine.num_optimization_profiles):
            least, _, most = engine.get_tensor_profile_shape("input_ids", i)
            self.profiles.append(Profile((least[0], most[0]), (least[1], most[1])))

    def start(self, batch: int) -> None:
        """Zeroed caches: even a masked position must hold a number."""
        sizes = [batch * int(np.prod(self._shape[name][1:])) * self._size[name] for name in self._past]
        if batch != self._batch:
            self._free_caches()
            sets = 2 if self._ping_pong else 1
            self._caches = [[self.cuda.allocate(size) for size in sizes] for _ in range(sets)]
            self._batch = batch
        for pointers in self._caches:
            for pointer, size in zip(pointers, sizes):
                self.cuda.zero(pointer, size)

    def run(self, profile: int, ids: Any, positions: Any, last: Any) -> Any:
        """Run the plan; logits as float32. Caches are swapped afterwards where the graph needs two sets."""
        batch, width = ids.shape
        half = self._size["logits"] == 2
        row = self.vocab_size * self._size["logits"]
        self._select(profile)
        self._set_shape("input_ids", (batch, width))
        self._set_shape("positions", (batch,))
        for name in self._past:
            self._set_shape(name, (batch, *self._shape[name][1:]))
        past, present = self._caches[0], self._caches[-1]
        for names, pointers in ((self._past, past), (self._present, present)):
            for name, pointer in zip(names, pointers):
                self._context.set_tensor_address(name, pointer)
        self.cuda.upload(self._buffer("input_ids", ids.nbytes), ids)
        self.cuda.upload(self._buffer("positions", positions.nbytes), positions)
        logits = self._buffer("logits", batch * width * row)
        self.cuda.mark(0)
        if not self._context.execute_async_v3(self.cuda.stream.value):
            raise RunnerError(f"TensorRT could not run the plan: {self._log.last()}", 4)
        self.cuda.mark(1)
        kind = np.float16 if half else np.float32
        if last is None or width == 1:
            out = np.empty((batch, width, self.vocab_size), kind)
            self.cuda.download(out, logits)
        else:
            out = np.empty((batch, 1, self.vocab_size), kind)
            for b in range(batch):
                self.cuda.download(out[b], logits + (b * width + int(last[b])) * row)
        self.cuda.synchronize()
        self.gpu_ms = self.cuda.elapsed_ms()
        self._caches.reverse()
        out = out.astype(np.float32, copy=False)
        return out if last is None else out[:, 0]

    def close(self) -> None:
        """Give the GPU's memory back."""
        self._free_caches()
        for pointer, _ in self._buffers.values():
            self.cuda.free(pointer)
        self._buffers = {}
        self._contexts.clear()
        self._context = self._engine = self._runtime = None

    def _free_caches(self) -> None:
        for pointers in self._caches:
            for pointer in pointers:
                self.cuda.free(pointer)
        self._caches, self._batch = [], 0

    def _select(self, profile: int) -> None:
        """Go on with the context of a profile; it is made when it is first needed."""
        if profile not in self._contexts:
            made = self._engine.create_execution_context()
            if not made or not made.set_optimization_profile_async(profile, self.cuda.stream.value):
                raise RunnerError(f"TensorRT refuses profile {profile}: {self._log.last()}", 4)
            self._contexts[profile], self._shapes_of[profile] = made, {}
        self._context, self._shapes = self._contexts[profile], self._shapes_of[profile]

    def _set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if self._shapes.get(name) != shape:
            if not self._context.set_input_shape(name, shape):
                raise RunnerError(f"TensorRT refuses {name} {shape}: {self._log.last()}", 4)
            self._shapes[name] = shape

    def _buffer(self, name: str, size: int) -> int:
        """A device buffer that grows, bound to the tensor."""
        pointer, held = self._buffers.get(name, (0, 0))
        if size > held:
            if pointer:
                self.cuda.free(pointer)
                del self._buffers[name]
            pointer = self.cuda.allocate(size)
            self._buffers[name] = (pointer, size)
        self._context.set_tensor_address(name, pointer)
        return pointer


def import_tensorrt(runtime: str, version: str | None) -> Any:
    """The TensorRT package; with a version, of exactly the major, minor and patch that made the plan.

    Raises:
        RunnerError: not installed, or another version: plans load only where they were made.
    """
    for name in (runtime, runtime + "_bindings"):
        try:
            trt = importlib.import_module(name)
            break
        except ImportError as error:
            cause = error
    else:
        raise RunnerError(f"the Python package {runtime} is not installed: {cause}", 4)
    if version is not None and trt.__version__.split(".")[:3] != version.split(".")[:3]:
        made = f"the plan was made by {runtime} {version}, this is {trt.__version__}"
        raise RunnerError(made + ": run build_plan.py here", 4)
    return trt


def check_capability(found: int, allowed: Any) -> None:
    """Refuse a GPU that the plan was not built for.

    Args:
        found: compute capability times ten.
        allowed: a list of them ("sm89", "8.9" or 89), "portable", or None: TensorRT's own check is left.
    """
    if allowed is None:
        return
    known = PORTABLE if allowed == "portable" else [int(re.sub(r"\D", "", str(item))) for item in allowed]
    if found not in known:
        names = ", ".join(_dotted(item) for item in known)
        text = f"the GPU has compute capability {_dotted(found)}, the plan was built for {names}"
        raise RunnerError(text + ": build it here with build_plan.py, or compile for this GPU", 4)


def _dotted(capability: int) -> str:
    return f"{capability // 10}.{capability % 10}"


def _logger(trt: Any) -> Any:
    """A logger that keeps TensorRT's errors for our own."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

        def last(self) -> str:
            return self.errors[-1] if self.errors else "no reason given"

    return Log()


# -- artifact and command line ------------------------------------------------------------------


def read_description(folder: str) -> dict[str, Any]:
    """engine.json, with the fields that this program needs.

    Raises:
        RunnerError: no such file, or not of this format.
    """
    path = os.path.join(folder, "engine.json")
    try:
        if os.path.getsize(path) > _MOST_DESCRIPTION:
            raise ValueError(f"it has {os.path.getsize(path)} bytes, more than {_MOST_DESCRIPTION}")
        with open(path, encoding="utf-8") as file:
            info = json.load(file)
        cache = info["cache"]
        numbers = [info["vocab_size"], cache["layers"], cache["capacity"]]
        fits = info["format"] == FORMAT and cache["update"] in ("in_place", "ping_pong")
        fits = fits and info["runtime"] in (None, "tensorrt", "tensorrt_rtx")
        if not fits or not all(isinstance(n, int) and n > 0 for n in numbers):
            raise ValueError(f"not format {FORMAT}")
        for key in ("plan", "plan_sha256", "runtime_version", "compute_capabilities", "eos_token_ids"):
            info[key]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunnerError(f"{path}: no readable engine.json: {error}", 7) from error
    return info


def _plan_path(folder: str, info: dict[str, Any]) -> str:
    name = info["plan"]
    if name is None:
        raise RunnerError(f"{folder}: there is no plan yet: run build_plan.py on this machine", 4)
    path = os.path.join(folder, str(name))
    if os.path.basename(str(name)) != name or os.path.islink(path) or not os.path.isfile(path):
        raise RunnerError(f"{folder}: {name!r} is not a plain file of the artifact", 7)
    return path


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run a TensorRT artifact.")
    add = parser.add_argument
    add("--artifact", default=os.path.dirname(os.path.abspath(__file__)), help="the folder")
    add("--prompt", action="append", default=[], help="text (needs tokenizers); repeat for a batch")
    add("--prompt-tokens", action="append", default=[], help="token ids, 5,17,33; repeat for a batch")
    add("--prompts", metavar="FILE", help="JSON list of lists of token ids")
    add("--max-new-tokens", type=int, default=64)
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-k", type=int, default=0)
    add("--top-p", type=float, default=1.0)
    add("--seed", type=int, default=0)
    add("--ignore-eos", action="store_true", help="continue after end-of-text tokens")
    add("--perplexity", metavar="FILE", help="JSON list of windows of token ids: print their perplexity")
    add("--bench", action="store_true", help="median latency of prefill and decode on random tokens")
    add("--batch", type=int, default=1, help="rows of --bench")
    add("--bench-prompt", type=int, default=128, help="prompt tokens of --bench")
    add("--bench-steps", type=int, default=64, help="decode steps of --bench")
    add("--rounds", type=int, default=10, help="rounds of --bench")
    add("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(arguments)


def read_token_lists(path: str) -> list[list[int]]:
    """A JSON list of lists of token ids."""
    try:
        with open(path, encoding="utf-8") as file:
            rows = json.load(file)
        if not all(type(token) is int for row in rows for token in row):
            raise ValueError("an id is no whole number")
        return [list(row) for row in rows]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RunnerError(f"{path}: not a JSON list of lists of token ids: {error}", 3) from error


def _prompts(options: argparse.Namespace, tokenizer: Any) -> list[list[int]]:
    given = [bool(options.prompt), bool(options.prompt_tokens), options.prompts is not None]
    if sum(given) != 1:
        raise RunnerError("give one of --prompt, --prompt-tokens, --prompts, --perplexity, --bench", 2)
    if options.prompts is not None:
        return read_token_lists(options.prompts)
    if options.prompt:
        if tokenizer is None:
            raise RunnerError("text needs tokenizer.json and the package tokenizers: use --prompt-tokens", 4)
        return [list(tokenizer.encode(text).ids) for text in options.prompt]
    try:
        return [[int(item) for item in text.split(",")] for text in options.prompt_tokens]
    except ValueError as error:
        raise RunnerError("--prompt-tokens takes integers and commas: 5,17,33", 2) from error


def _tokenizer(folder: str) -> Any:
    """The artifact's tokenizer, or None without its file or the package."""
    path = os.path.join(folder, "tokenizer.json")
    try:
        tokenizers = importlib.import_module("tokenizers")
    except ImportError:
        return None
    return tokenizers.Tokenizer.from_file(path) if os.path.isfile(path) else None


def execute(options: argparse.Namespace, decoder: Decoder, info: dict[str, Any]) -> dict[str, Any]:
    """What the options ask for, as a JSON-able object."""
    if options.perplexity is not None:
        return perplexity(decoder, read_token_lists(options.perplexity))
    if options.bench:
        return bench(decoder, options.batch, options.bench_prompt, options.bench_steps, options.rounds)
    tokenizer = _tokenizer(options.artifact)
    prompts = _prompts(options, tokenizer)
    sampler = Sampler(prompts, options.temperature, options.top_k, options.top_p, options.seed)
    stop = () if options.ignore_eos else info["eos_token_ids"]
    found = generate(decoder, prompts, options.max_new_tokens, stop, sampler)
    rows = [
        {"prompt_tokens": prompt, "tokens": row, "stop": reason, "text": tokenizer and tokenizer.decode(row)}
        for prompt, row, reason in zip(prompts, found.tokens, found.stop)
    ]
    middle = statistics.median(found.step_ms) if found.step_ms else None
    return {"results": rows, "prefill_ms": found.prefill_ms, "decode_ms_median": middle}


def show(result: dict[str, Any]) -> None:
    """For people: one text (or list of ids) per prompt, or the figures."""
    for row in result.get("results", []):
        print(row["text"] if row["text"] is not None else ",".join(map(str, row["tokens"])))
    if "results" not in result:
        print("\n".join("{}: {}".format(*item) for item in result.items()))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code, with a message on stderr where it is not 0."""
    options = _parse(arguments)
    try:
        info = read_description(options.artifact)
        engine = TrtEngine(options.artifact, info)
        result = execute(options, Decoder(engine), info)
        engine.close()
    except RunnerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if options.json:
        print(json.dumps(result))
    else:
        show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
