"""Triton kernels in tests: on the GPU where there is one, else in Triton's interpreter, in float32.

The interpreter's products of 16-bit numbers multiply their bits, so that real types are left to the GPU. `conftest`
chooses the interpreter before triton is imported, which cannot be changed later.
"""

from __future__ import annotations

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


_take_single_items()
