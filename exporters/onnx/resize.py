"""Lowerings of interpolation and sampling of images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from optc.exporters.onnx.walker import Lowering, Walker, argument

_aten = torch.ops.aten

_NEAREST = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
_NEAREST_EXACT = {
    "mode": "nearest",
    "coordinate_transformation_mode": "half_pixel",
    "nearest_mode": "round_prefer_ceil",  # ATen floors dst + 0.5
}


def _smooth(mode: str) -> Callable[[Node], dict[str, Any]]:
    """linear and cubic, whose corners may be aligned."""

    def attributes(node: Node) -> dict[str, Any]:
        aligned = bool(argument(node, 2, "align_corners", False))
        # "pytorch_half_pixel" differs from half_pixel only in an output of one pixel, where ATen is half_pixel now
        found: dict[str, Any] = {"coordinate_transformation_mode": "align_corners" if aligned else "half_pixel"}
        return {"mode": mode, **found, **({"cubic_coeff_a": -0.75} if mode == "cubic" else {})}

    return attributes


def _resize(attributes: Callable[[Node], dict[str, Any]], factors: int) -> Lowering:
    """upsample_*.vec(x, output_size or None, ..., scale_factors or None); `factors` is the place of the last."""

    def lower(walker: Walker, node: Node) -> ir.Value:
        x = walker.value(node.args[0])
        size, scales = node.args[1], argument(node, factors, "scale_factors")
        if size is None:
            how = [None, walker.constant([1.0, 1.0, *map(float, scales)], torch.float32)]
        else:
            rows = walker.op("Shape", [x], {"end": 2})
            how = [None, None, walker.op("Concat", [rows, walker.sizes(size)], {"axis": 0})]
        return walker.op("Resize", [x, *how], attributes(node))

    return lower


def _grid_sample(walker: Walker, node: Node) -> ir.Value:
    """grid_sampler(x, grid, interpolation, padding, align_corners)."""
    x, grid, mode, padding, aligned = node.args[:5]
    attributes = {
        "mode": ("linear", "nearest", "cubic")[int(mode)],
        "padding_mode": ("zeros", "border", "reflection")[int(padding)],
        "align_corners": int(bool(aligned)),
    }
    return walker.op("GridSample", [walker.value(x), walker.value(grid)], attributes)


def _table() -> dict[Any, Lowering]:
    table: dict[Any, Lowering] = {}
    for kind, ranks, attributes, factors in (
        ("nearest", (1, 2, 3), lambda _: dict(_NEAREST), 2),
        ("_nearest_exact", (1, 2, 3), lambda _: dict(_NEAREST_EXACT), 2),
        ("linear", (1,), _smooth("linear"), 3),
        ("bilinear", (2,), _smooth("linear"), 3),
        ("trilinear", (3,), _smooth("linear"), 3),
        ("bicubic", (2,), _smooth("cubic"), 3),
    ):
        for rank in ranks:
            prefix = "_upsample" if kind.startswith("_") else "upsample_"
            table[getattr(_aten, f"{prefix}{kind}{rank}d").vec] = _resize(attributes, factors)
    table[_aten.grid_sampler.default] = table[_aten.grid_sampler_2d.default] = _grid_sample
    return table


TABLE = _table()
