"""One or more small programs for every operator that the ONNX exporter lowers.

A case is a function and its example inputs. Keys are operator names as torch prints them.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

import optc.compiler.ops  # noqa: F401  (registers the dialect)
from onnx_cases.images import CONVOLUTIONS, PADS, POOLS, RECURRENT, RESIZES, WRITES
from onnx_cases.layers import DIALECT, LAYERS, REDUCTIONS
from onnx_cases.pointwise import ARITHMETIC, LOGIC, UNARY
from onnx_cases.refused import REFUSED, SEVERAL_AXES
from onnx_cases.shapes import CONSTRUCTORS, SIZES, VIEWS
from onnx_cases.values import Case, Cases

CASES: Cases = {
    **UNARY,
    **ARITHMETIC,
    **LOGIC,
    **SIZES,
    **VIEWS,
    **CONSTRUCTORS,
    **REDUCTIONS,
    **LAYERS,
    **DIALECT,
    **CONVOLUTIONS,
    **POOLS,
    **PADS,
    **RESIZES,
    **RECURRENT,
    **WRITES,
}

__all__ = ["CASES", "REFUSED", "SEVERAL_AXES", "Case", "name_of"]


def name_of(target: Any) -> str:
    """The name of an FX target as it is written in `CASES`."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    module = "operator" if getattr(operator, target.__name__, None) is target else "torch"
    return f"{module}.{target.__name__}"
