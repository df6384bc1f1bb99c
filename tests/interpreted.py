"""Triton kernels in tests: on the GPU where there is one, else in Triton's interpreter, in float32.

The interpreter's products of 16-bit numbers multiply their bits, so that real types are left to the GPU. `conftest`
chooses the interpreter before triton is imported, which cannot be changed later.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs triton")
from triton.runtime.interpreter import InterpretedFunction, ReduceOps, TensorHandle, tl

from optc.compiler.kernels.cuda import primitives

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", torch.cuda.current_device()) if HAS_GPU else torch.device("cpu")
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")]
FLOATS = [
    torch.float32,
    pytest.param(torch.bfloat16, marks=ON_GPU),
    pytest.param(torch.float16, marks=ON_GPU),
]


def _take_single_items() -> None:
    """Triton 3.6's interpreter keeps scalars in arrays of one item, which numpy 2.4 no longer takes for numbers."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


def _leave_out_what_changes_nothing() -> None:
    """Half of the interpreter's time is for things that say the same each time, or nothing.

    Each launch looks through the language for functions to replace; each array asks a new table for its type; sums and
    products of integers are made once more in 64 bits, to be asserted in range, where asserts are left out (`debug`).
    """
    from triton.runtime import interpreter

    builder, patch, type_of = interpreter.interpreter_builder, interpreter._patch_builtin, interpreter._get_np_dtype
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    @functools.cache
    def replacements(package: Any) -> list[tuple[str, Any]]:
        found: list[tuple[str, Any]] = []
        patch(package, builder, SimpleNamespace(set_attr=lambda _, name, value: found.append((name, value))))
        return found

    def patched(package: Any, _: Any, scope: Any) -> None:
        for name, value in replacements(package):
            scope.set_attr(package, name, value)

    types: dict[str, Any] = {}

    def numpy_type(kind: Any) -> Any:
        kind = kind.element_ty if isinstance(kind, interpreter.tl.block_type) else kind
        if kind.name not in types:  # a pointer's name says what it points to
            types[kind.name] = type_of(kind)
        return types[kind.name]

    interpreter._patch_builtin, interpreter._get_np_dtype = patched, numpy_type


def _replace_functions_once_a_launch() -> None:
    """Each call of a function from a kernel looks through the language again; what the launch has replaced stays."""
    from triton.runtime import interpreter

    launch, language = interpreter.GridExecutor.__call__, interpreter.tl
    replaced: set[Any] = set()

    def seen_by(fn: Any) -> set[Any]:
        return {module for module in (language, language.core) if module in _modules(fn.__globals__)}

    def launched(self: Any, *args: Any, **keywords: Any) -> None:
        replaced.clear()
        replaced.update(seen_by(self.fn))
        try:
            launch(self, *args, **keywords)
        finally:
            replaced.clear()

    def called(self: Any, *args: Any, **keywords: Any) -> Any:
        if not (seen := seen_by(self.fn)) <= replaced:
            interpreter._patch_lang(self.fn)
            replaced.update(seen)
        try:
            return self.rewrite()(*args, **keywords)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.GridExecutor.__call__, interpreter.InterpretedFunction.__call__ = launched, called


_SEEN: dict[int, tuple[dict[str, Any], list[Any]]] = {}


def _modules(names: dict[str, Any]) -> list[Any]:
    """The modules among the globals of a file of kernels, looked up once."""
    if id(names) not in _SEEN:
        _SEEN[id(names)] = names, [value for value in names.values() if inspect.ismodule(value)]
    return _SEEN[id(names)][1]


def _keep_shapes() -> None:
    """A third of the interpreter's time makes the same few shapes again, for each tensor and for its type."""
    make_block, constant = tl.block_type.__init__, tl.constexpr
    blocks: dict[tuple[int, ...], tuple[Any, int, str]] = {}
    tensors: dict[tuple[int, ...], tuple[Any, Any]] = {(): (constant(1), tl.tuple([]))}

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(size.value if isinstance(size, constant) else size for size in shape)
        if sizes not in blocks:
            make_block(self, element_ty, shape)  # which refuses sizes that are no powers of two
            blocks[sizes] = self.shape, self.numel, str(self.shape)
        self.shape, self.numel, text = blocks[sizes]
        self.element_ty, self.name = element_ty, f"<{text}, {element_ty}>"

    def tensor(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape) if type.is_block() else ()
        if sizes not in tensors:
            tensors[sizes] = constant(math.prod(sizes)), tl.tuple([constant(size) for size in sizes])
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = tensors[sizes]

    tl.block_type.__init__, tl.tensor.__init__ = block, tensor


def dot_bytes(a: Any, b: Any, c: Any, native: Any) -> Any:
    """`primitives.dot_bytes` of blocks of one shape, without an array for each byte and shift."""
    if not all(_is_words(block, a) for block in (a, b, c)):
        return _written("dot_bytes")(a, b, c, native)
    products = _bytes(a).astype(np.int32) * _bytes(b)
    return tl.tensor(TensorHandle(c.handle.data + products.sum(-1, dtype=np.int32), tl.int32), c.type)


def permute_bytes(a: Any, b: Any, selector: Any, native: Any) -> Any:
    """`primitives.permute_bytes` of blocks of one shape, in one step."""
    if not all(_is_words(block, a) for block in (a, b)):
        return _written("permute_bytes")(a, b, selector, native)
    places = [(int(getattr(selector, "value", selector)) >> (4 * i)) & 7 for i in range(4)]
    chosen = np.ascontiguousarray(np.concatenate([_bytes(a), _bytes(b)], -1)[..., places])
    return tl.tensor(TensorHandle(chosen.view(np.int32)[..., 0], tl.int32), a.type)


def _is_words(block: Any, other: Any) -> bool:
    """Whether both are blocks of one shape, of int32."""
    blocks = isinstance(block, tl.tensor) and isinstance(other, tl.tensor) and block.type == other.type
    return blocks and block.type.is_block() and block.dtype == tl.int32


def _bytes(block: Any) -> Any:
    """int8 [..., 4] of int32 [...]."""
    return np.ascontiguousarray(block.handle.data)[..., None].view(np.int8)


@functools.cache
def _written(name: str) -> Any:
    """A function of `primitives` as it stands there, for the interpreter."""
    return getattr(primitives, name).rewriter.rewrite_ast()


def _emulate_instructions() -> None:
    """One instruction of a GPU is twenty operations in the interpreter; `kernels/cuda/test_interpreted.py` compares."""
    for function, emulated in ((primitives.dot_bytes, dot_bytes), (primitives.permute_bytes, permute_bytes)):
        if isinstance(function, InterpretedFunction):
            InterpretedFunction.rewritten_fn[function.fn] = emulated


def halved(self: Any, given: tuple[Any, ...]) -> list[Any]:
    """`ReduceOps.generic_reduce` by neighbours, all pairs at once, as a GPU does: the interpreter takes single numbers."""
    blocks, axis = self.unravel(given, self.axis)
    data = [np.moveaxis(block.handle.data, axis, 0) for block in blocks]
    while len(data[0]) > 1:
        sides = [
            self.to_tensor(part[side::2], block.dtype)
            for side in (0, 1)
            for part, block in zip(data, blocks, strict=True)
        ]
        found = self.combine_fn.fn(*sides)
        data = [item.handle.data for item in (found if isinstance(found, tuple) else (found,))]
    results = [part[0] for part in data]
    if self.keep_dims:
        kept = tuple(range(given[0].handle.data.ndim)) if self.axis is None else axis
        results = [np.expand_dims(result, kept) for result in results]
    return [self.to_tensor(result, block.dtype) for result, block in zip(results, blocks, strict=True)]


_take_single_items()
_leave_out_what_changes_nothing()
_replace_functions_once_a_launch()
_emulate_instructions()
if not HAS_GPU:  # there, the compiler makes tensors and types too
    _keep_shapes()
GENERIC_REDUCE, ReduceOps.generic_reduce = ReduceOps.generic_reduce, halved
