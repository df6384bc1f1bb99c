"""Which linears a quantization pass takes, and how a quantized weight is put in place: the same for all methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.dataflow import aten, readers, value_of
from optc.compiler.analysis.linears import (
    LINEARS,
    Linear,
    chooses_experts,
    head_linear,
    linear_site,
    linear_sites,
)
from optc.compiler.analysis.name_patterns import check_patterns, fits
from optc.compiler.formats.group_sizes import GroupSize, check_group_size, default_group_size, size_for
from optc.compiler.formats.weight_format import weight_format
from optc.compiler.ir.contract import WeightQuantization
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import add_weight, drop_dead, insert_call, replace_call
from optc.compiler.ops.library import makes_weight
from optc.compiler.rewriting.passes import Miss, PassResult
from optc.compiler.rewriting.weights import prune_contract, record_weight
from optc.passes.quantization.arithmetic.groups import weight_label


@dataclass(frozen=True)
class Selection:
    """The linears of a program as quantization sees them.

    Attributes:
        chosen: to be quantized, in graph order.
        misses: left alone, with the reason.
        notes: the head that stays.
        candidates: all linears.
        sizes: group size of each chosen weight by its label, of a selection in groups.
    """

    chosen: tuple[Linear, ...]
    misses: tuple[Miss, ...]
    notes: tuple[str, ...]
    candidates: int
    sizes: Mapping[str, int] = field(default_factory=dict)


def select_linears(program: Program, ignore: Sequence[str], head: bool) -> Selection:
    """Choose the linears whose weight is read by linears alone.

    Left alone: the linear that makes the logits unless `head` (its errors reach the output undamped), the routers of
    experts (a changed choice is no small error), weights that an embedding reads too, weights that `ignore` names.

    Raises:
        NoMatchError: a pattern of `ignore` matches no weight of the program, nor one that it was captured with.
    """
    sources = (name for names in program.contract.sources.values() for name in names)
    check_patterns("ignore", ignore, dict.fromkeys((*program.exported.state_dict, *sources)))
    sites = list(linear_sites(program))
    last = head_linear(program)
    chosen: list[Linear] = []
    misses: list[Miss] = []
    notes: list[str] = []
    for site in sites:
        reason = _obstacle(program, site, ignore, last, head)
        if reason:
            misses.append(Miss(site.node.name, reason))
        elif site.node is last and not head:
            notes.append(
                f"{weight_name(program, site)} computes the logits and is not quantized (head=True quantizes it)"
            )
        else:
            chosen.append(site)
    return Selection(tuple(chosen), tuple(misses), tuple(notes), len(sites))


def select_in_groups(program: Program, ignore: Sequence[str], head: bool, size: GroupSize) -> Selection:
    """`select_linears` for a method with groups along K, and the size of each weight's.

    Of several sizes each weight gets the first that divides its K; one that none divides is left alone, which the notes
    say, as they say who did not get the first.

    Raises:
        NoMatchError: see `select_linears`. InputError: the one size, or each default one, does not divide a K; names
            the weight.
    """
    selection = select_linears(program, ignore, head)
    labels = {site.node: weight_label(program, site) for site in selection.chosen}
    if isinstance(size, tuple):
        return _each_in_groups(selection, labels, size)
    columns, names, notes = [site.columns for site in selection.chosen], list(labels.values()), selection.notes
    if size is not None:
        check_group_size(size, columns, names)
    elif columns:
        size = default_group_size(columns, names)
        notes = (*notes, f"group size {size}: the largest of 128, 64, 32 that divides every K")
    return replace(selection, notes=notes, sizes=dict.fromkeys(names, size or 0))


def _each_in_groups(selection: Selection, labels: Mapping[Node, str], sizes: Sequence[int]) -> Selection:
    columns = {labels[site.node]: site.columns for site in selection.chosen}
    found = {label: size_for(count, sizes) for label, count in columns.items()}
    tried = ", ".join(map(str, sizes))
    misses = [
        Miss(site.node.name, f"no group of {tried} divides the K = {site.columns} of {labels[site.node]}")
        for site in selection.chosen
        if found[labels[site.node]] is None
    ]
    notes = [_size_note(size, found, columns) for size in (*sizes, None) if size in found.values()]
    return replace(
        selection,
        chosen=tuple(site for site in selection.chosen if found[labels[site.node]] is not None),
        misses=(*selection.misses, *misses),
        notes=(*selection.notes, *notes),
        sizes={label: size for label, size in found.items() if size is not None},
    )


_NAMED = 8
"""Weights that a note names, at most: the records of the artifact have each of them with its size."""


def _size_note(size: int | None, found: Mapping[str, int | None], columns: Mapping[str, int]) -> str:
    """Which weights got a size: their number where it is the most frequent one, else their names."""
    those = [label for label, chosen in found.items() if chosen == size]
    what = "not quantized, as no group divides K" if size is None else f"group size {size or 'of a row'}"
    if size is not None and 2 * len(those) > len(found):
        return f"{what}: {len(those)} of {len(found)} weights"
    more = f" and {len(those) - _NAMED} more" if len(those) > _NAMED else ""
    return f"{what}: " + ", ".join(f"{label} (K = {columns[label]})" for label in those[:_NAMED]) + more


def quantize_selected(
    program: Program,
    selection: Selection,
    quantize: Callable[[Program, Linear], None],
    notes: Sequence[str] = (),
) -> PassResult:
    """The result of a pass that calls `quantize` for every chosen linear of a clone, in graph order."""
    notes = (*selection.notes, *notes)
    if not selection.chosen:
        return PassResult(program, 0, selection.candidates, selection.misses, notes)
    edited = program.clone()
    nodes = {node.name: node for node in edited.graph.nodes}
    with torch.no_grad():
        for site in selection.chosen:
            quantize(edited, counterpart(edited, nodes[site.node.name]))
    drop_dead(edited)
    edited = prune_contract(edited.changed())
    return PassResult(edited, len(selection.chosen), selection.candidates, selection.misses, notes)


def counterpart(program: Program, node: Node) -> Linear:
    """The linear at a node of a clone that stands where one was chosen."""
    site = linear_site(program, node)
    assert site is not None
    return site


def replace_weight(
    program: Program,
    site: Linear,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    entry: WeightQuantization,
) -> Node:
    """Let a linear read `optc.dequantize` of new weights; returns the new linear. Arguments as `dequantized` has."""
    weight = dequantized_before(program, site) or dequantized(program, site, codes, scale, zero, entry)
    return read_instead(program, site, weight)


def dequantized(
    program: Program,
    site: Linear,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    entry: WeightQuantization,
) -> Node:
    """Add the parts of a quantized weight, and `optc.dequantize` of them in front of a site; returns that call.

    Args:
        codes, scale, zero: uint8 [N, K], [N, G] and uint8 [N, G] or None.
    """
    scale_node, zero_node = weight_part(program, site, "scale", scale), None
    if zero is not None:
        zero_node = weight_part(program, site, "zero", zero)
    return place_codes(program, site, codes, [scale_node, zero_node], entry)


def read_instead(program: Program, site: Linear, weight: Node, x: Node | None = None) -> Node:
    """Let a linear read the weight [N, K] (and the input `x`) in place of its own; returns the new linear."""
    arguments = (site.input if x is None else x, weight, site.bias)
    return replace_call(program, site.node, aten.linear.default, arguments)


def dequantized_before(program: Program, site: Linear) -> Node | None:
    """The dequantization that an earlier linear of the same weight got, or None."""
    codes = existing_part(program, site, "codes")
    return None if codes is None else next(user for user in codes.users if makes_weight(user.target))


def existing_part(program: Program, site: Linear, suffix: str) -> Node | None:
    """What `weight_part` made of an earlier linear of the same weight, or None."""
    name = f"{_stem(program, site)}_{suffix}"
    if name not in program.exported.state_dict:
        return None
    return next(node for node in program.graph.nodes if program.weight_of(node) == name)


def place_codes(
    program: Program,
    site: Linear,
    codes: Tensor,
    parts: Sequence[Node | None],
    entry: WeightQuantization,
) -> Node:
    """Add the codes of a weight, and the call that makes [N, K] of them and of the format's other parts."""
    form = weight_format(entry.format)
    node = weight_part(program, site, "codes", codes, entry)
    knobs = form.keywords(entry.bits, entry.group_size, value_of(site.weight).dtype)
    return insert_call(program, site.node, form.spec.op, [node, *parts], knobs)


def weight_part(
    program: Program, site: Linear, suffix: str, tensor: Tensor, entry: WeightQuantization | None = None
) -> Node:
    """Add one tensor (codes, scale, ...) of a linear's quantized weight, recorded in the contract.

    It is called after the weight with `_suffix`: beside it, not below, as a tied weight stays, and a name is a
    leaf or a branch.
    """
    stem, name = weight_name(program, site), f"{_stem(program, site)}_{suffix}"
    record_weight(program, name, program.contract.sources.get(stem, (stem,)), entry)
    return add_weight(program, name, tensor.contiguous())


def _stem(program: Program, site: Linear) -> str:
    name = weight_name(program, site)
    return name if site.index is None else f"{name}_{site.index}"


def weight_name(program: Program, site: Linear) -> str:
    """The name of a linear's weight (of all experts, where it is stacked)."""
    name = program.weight_of(site.placeholder)
    assert name is not None
    return name


def _obstacle(program: Program, site: Linear, ignore: Sequence[str], last: Node | None, head: bool) -> str | None:
    if site.placeholder is None:
        return "its weight is already quantized"
    name = weight_name(program, site)
    pattern = next((item for item in ignore if fits(name, item)), None)
    if pattern is not None:
        return f"{name} is ignored ('{pattern}')"
    others = sorted({str(user.target) for user in _calls(site.placeholder) if user.target not in LINEARS})
    tied = str(aten.embedding.default) in others
    if site.node is last and not head:
        return f"{name} is tied with the embedding (head=True quantizes a copy)" if tied else None
    if others and not (head and last is site.node):
        return f"{name} is read by {', '.join(others)} too"
    if chooses_experts(program, site.node):
        return f"{name} routes tokens to experts"
    return None


def _calls(placeholder: Node) -> list[Node]:
    """The calls that read a weight, looking through the selection of one expert."""
    return [
        call
        for reader in readers(placeholder)
        for call in (readers(reader) if reader.target is aten.select.int else [reader])
    ]
