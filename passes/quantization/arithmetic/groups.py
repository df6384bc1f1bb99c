"""Linears that read one input: they share its statistics, and a scale on it concerns all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.dataflow import value_of, value_readers
from optc.compiler.analysis.linears import Linear, linear_site
from optc.compiler.analysis.rows import same_rows
from optc.compiler.diagnostics import InputError
from optc.compiler.ir.devices import tensor_float_32
from optc.compiler.ir.lazy_weights import materialized
from optc.compiler.ir.program import Program
from optc.passes.quantization.arithmetic.ranges import check_finite
from optc.passes.quantization.arithmetic.stream import Stream

_GRAM_BLOCK = 512


@dataclass(frozen=True)
class Group:
    """Linears of one input.

    Attributes:
        root: the node whose rows they multiply, [..., K].
        sites: in graph order.
    """

    root: Node
    sites: tuple[Linear, ...]


def input_groups(sites: Sequence[Linear]) -> list[Group]:
    """Linears by their input, in the order in which the inputs are computed."""
    table: dict[Node, list[Linear]] = {}
    for site in sites:
        table.setdefault(same_rows(site.input), []).append(site)
    return [Group(root, tuple(found)) for root, found in sorted(table.items())]


def input_readers(program: Program, root: Node) -> tuple[list[Linear], list[Node]]:
    """(all linears that read the rows of `root`, everything else that does), looking through aliases and views."""
    linears, others, pending = [], [], [root]
    while pending:
        for user in value_readers(pending.pop()):
            site = linear_site(program, user)
            if site is not None and same_rows(site.input) is root and site.placeholder is not None:
                linears.append(site)
            elif site is None and user.op == "call_function" and _passes_on(user, root):
                pending.append(user)
            else:
                others.append(user)
    return linears, others


def _passes_on(user: Node, root: Node) -> bool:
    value = user.meta.get("val")
    return isinstance(value, Tensor) and same_rows(user) is root


def rows(stream: Stream, root: Node) -> Iterator[Tensor]:
    """The rows [n, K] of a group's input, batch by batch, in float32."""
    for value in stream.values(root):
        yield value.detach().reshape(-1, value.shape[-1]).float()


def gram_matrix(stream: Stream, group: Group) -> tuple[Tensor, int]:
    """(X X^T / n as [K, K] float32, n) of a group's input over the calibration rows.

    Raises:
        InputError: NaN or infinity among the activations; names the layer.
    """
    columns = int(value_of(group.root).shape[-1])
    gram: Tensor | None = None
    count = 0
    # Products of 16-bit inputs are exact in TF32; float32 inputs get the full product.
    narrow = value_of(group.root).dtype in (torch.bfloat16, torch.float16)
    with tensor_float_32() if narrow else nullcontext():
        for x in rows(stream, group.root):
            gram = torch.zeros(columns, columns, device=x.device) if gram is None else gram
            for start in range(0, columns, _GRAM_BLOCK):  # the matrix is symmetric: its upper half is enough
                end = start + _GRAM_BLOCK
                gram[start:end, start:].addmm_(x[:, start:end].t(), x[:, start:])
            count += len(x)
    assert gram is not None
    gram /= max(count, 1)
    for start in range(0, columns, _GRAM_BLOCK):
        end = start + _GRAM_BLOCK
        square = gram[start:end, start:end]
        square.copy_(square.triu() + square.triu(1).t())
        gram[end:, start:end] = gram[start:end, end:].t()
    check_finite(gram, f"input of {weight_label(stream.program, group.sites[0])}")
    return gram, count


def weight_label(program: Program, site: Linear) -> str:
    """The name of a linear's weight, with the expert's number for a stacked one."""
    name = program.weight_of(site.placeholder)
    assert name is not None
    return name if site.index is None else f"{name}[{site.index}]"


def input_label(program: Program, group: Group) -> str:
    """What an input of linears that are quantized already is called: the codes of the first of them, else its node."""
    return program.weight_of(group.sites[0].weight.args[0]) or group.root.name


def weight_rows(program: Program, site: Linear) -> Tensor:
    """The weight of a linear as [N, K] in memory, whatever its layout, of its expert where it is stacked."""
    name = program.weight_of(site.placeholder)
    assert name is not None
    weight = program.weight(name).detach()
    weight = materialized(weight if site.index is None else weight[site.index])
    return weight.t() if site.transposed else weight


def shared_magnitudes(program: Program, sites: Sequence[Linear]) -> dict[str, float]:
    """By weight: the largest |w| among the weights of linears that share an input.

    Raises:
        InputError: a weight is not finite; names it.
    """
    found: dict[str, float] = {}
    for group in input_groups(sites):
        table = {weight_label(program, site): float(weight_rows(program, site).abs().amax()) for site in group.sites}
        for label, value in table.items():
            if not math.isfinite(value):
                raise InputError("the weight holds NaN or infinity", where=label, remedy="repair the checkpoint")
        top = max(table.values())
        found |= {label: max(found.get(label, 0.0), top) for label in table}
    return found
