"""A folder's plan as TensorRT-LLM's loader of ModelOpt folders takes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from optc.compiler.formats.layouts.modelopt import AWQ
from optc.compiler.formats.layouts.modelopt.writer import algorithm_of, refusal
from optc.exporters.hf.collect import FolderPlan
from optc.exporters.hf.places import Quantized


def fit_for_loading(plan: FolderPlan) -> FolderPlan:
    """The plan as TensorRT-LLM loads it: a W4A16_AWQ linear with an input of its own has a factor for that input.

    Its loader asks for `pre_quant_scale` there (o_proj, down_proj), and never looks for one on linears that share an
    input (q, k, v; gate, up): it fuses them, so they must also be quantized alike.

    Raises:
        TargetError: linears of one input differ, or have factors; names one.
    """
    table = {item.module: item for item in plan.quantized}
    return dataclasses.replace(plan, quantized=tuple(_fitted(item, table) for item in plan.quantized))


def _fitted(item: Quantized, table: Mapping[str, Quantized]) -> Quantized:
    weight = item.weight
    for name in item.beside:
        other = table.get(name)
        if other is None or other.weight.scheme != weight.scheme:
            raise refusal(item.module, f"{name} has the same input, and is quantized differently or not at all")
        if not _alike(other.weight.global_scale, weight.global_scale):
            raise refusal(item.module, f"{name} has the same input, and another weight_scale_2")
    if item.beside and weight.input_factor is not None:
        raise refusal(item.module, f"its input has a factor, and {item.beside[0]} reads that input too")
    if item.beside or weight.input_factor is not None or algorithm_of(weight.scheme) != AWQ:
        return item
    ones = torch.ones(weight.shape[1], dtype=weight.scale.dtype)
    return dataclasses.replace(item, weight=dataclasses.replace(weight, input_factor=ones))


def _alike(left: Tensor | None, right: Tensor | None) -> bool:
    return left is right or (left is not None and right is not None and torch.equal(left, right))
