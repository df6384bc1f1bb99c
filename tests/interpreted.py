"""Triton kernels in tests: on the GPU where there is one, else in Triton's interpreter, in float32.

The interpreter's products of 16-bit numbers multiply their bits, so that real types are left to the GPU. `conftest`
chooses the interpreter before triton is imported, which cannot be changed later.
"""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")
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


_take_single_items()
_leave_out_what_changes_nothing()
