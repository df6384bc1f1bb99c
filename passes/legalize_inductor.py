"""optc operators  ->  ATen, and linear(x, dequantize(int4 codes))  ->  aten._weight_int4pack_mm_for_cpu

What is left of the dialect is `optc.paged_attention_`, which has a C++ kernel. ATen's packed int4 product
takes codes two per byte in a layout of the machine's instruction set, and value = (code - 8) * scale + zero
with scale and zero interleaved as [K / group_size, N, 2]. It is taken for bfloat16 alone: in other types its
kernels are scalar loops, 25 times slower than the unquantized product. A dequantization that it cannot take
becomes arithmetic on the weight before each use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.inlining import inline_call
from optc.compiler.ops import decompositions
from optc.compiler.ops.library import reference
from optc.compiler.program import Program
from optc.compiler.rewriting import Miss, Pass, PassContext, PassResult
from optc.compiler.sharing import share_expressions
from optc.compiler.surgery import add_weight, drop_dead
from optc.compiler.weights import prune_contract, record_weight

aten, optc = torch.ops.aten, torch.ops.optc

ATEN_FORMS: dict[Any, Callable[..., Any]] = {
    optc.attention.default: decompositions.attention,
    optc.cached_attention_.default: decompositions.cached_attention_,
    optc.rotary.default: reference("rotary"),
    optc.dequantize.default: reference("dequantize"),
}
"""Operator of the dialect -> the same in traceable ATen."""

INT4_GROUP_SIZES = (32, 64, 128, 256)
_INT4_ROWS = 16  # N must be a multiple of it


@dataclass(frozen=True, kw_only=True)
class LegalizeInductor(Pass):
    """Everything but optc.paged_attention_ in ATen; 4-bit linears by ATen's packed product.

    Attributes:
        packed: use the packed int4 product where it fits.
    """

    name: ClassVar[str] = "legalize-inductor"
    packed: bool = True

    def run(self, program: Program, context: PassContext) -> PassResult:
        edited = program.clone()
        sites = edited.calls(*ATEN_FORMS)
        misses = self._pack_linears(edited, edited.calls(optc.dequantize.default)) if self.packed else []
        for node in edited.calls(*ATEN_FORMS):
            inline_call(edited, node, ATEN_FORMS[node.target])
        if not sites:
            return PassResult(program, 0, 0)
        share_expressions(edited)  # positions and masks are the same in every layer
        drop_dead(edited)
        notes = (f"{len(misses)} weights are dequantized before each use",) if misses else ()
        return PassResult(prune_contract(edited).changed(), len(sites), len(sites), tuple(misses), notes)

    def _pack_linears(self, program: Program, sites: list[Node]) -> list[Miss]:
        """Replace what the packed product can take; the rest is returned, with reasons."""
        misses = []
        size = _common_group_size(sites)
        for node in sites:
            reason = _obstacle(program, node, size)
            if reason is None:
                _pack(program, node)
            else:
                misses.append(Miss(node.name, reason))
        return misses


def _common_group_size(sites: list[Node]) -> int:
    sizes = Counter(node.kwargs["group_size"] for node in sites)
    return int(max(sizes, key=lambda size: sizes[size])) if sizes else 0


def _obstacle(program: Program, node: Node, common: int) -> str | None:
    """Why a dequantized weight cannot go through the packed product, or None."""
    bits, group_size = node.kwargs["bits"], node.kwargs["group_size"]
    rows = node.meta["val"].shape[0]
    if bits != 4:
        return f"{bits}-bit codes have no packed product"
    if group_size not in INT4_GROUP_SIZES:
        return f"groups of {group_size} have no packed product ({', '.join(map(str, INT4_GROUP_SIZES))} have)"
    if group_size != common:
        return f"groups of {group_size} among groups of {common}: a package has packed products of one size"
    if node.meta["val"].dtype is not torch.bfloat16:
        return f"torch's packed product is fast in bfloat16 only, the weight is {node.meta['val'].dtype}"
    if rows % _INT4_ROWS:
        return f"{rows} rows are not a multiple of {_INT4_ROWS}"
    if any(program.weight_of(item) is None for item in node.args if item is not None):
        return "its codes are computed"
    if any(user.target is not aten.linear.default or user.args[1] is not node for user in node.users):
        return "it is read by something else than a linear"
    return None


def _pack(program: Program, node: Node) -> None:
    """Give every linear that reads a dequantized weight the packed product instead."""
    names = [program.weight_of(item) for item in node.args]
    codes, scale, zero = (None if name is None else program.weight(name) for name in names)
    assert names[0] is not None
    assert codes is not None
    assert scale is not None
    group_size = int(node.kwargs["group_size"])
    packed, scales = pack_int4(codes, scale, zero)
    contract = program.contract
    entry, sources = contract.quantization.get(names[0]), contract.sources.get(names[0], (names[0],))
    placeholders = []
    for suffix, tensor, quantization in (("int4", packed, entry), ("scales", scales, None)):
        name = f"{names[0]}_{suffix}"
        placeholders.append(add_weight(program, name, tensor))
        record_weight(program, name, sources, quantization)

    def product(weight: Tensor, scales: Tensor, x: Tensor, _: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = aten._weight_int4pack_mm_for_cpu(rows, weight, group_size, scales)
        out = out.view(*x.shape[:-1], weight.shape[0])
        return out if bias is None else out + bias

    for user in list(node.users):
        inline_call(program, user, product, *placeholders)


def pack_int4(codes: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
    """Canonical 4-bit codes in the layout of `aten._weight_int4pack_mm_for_cpu` on this machine.

    Args:
        codes: uint8 [N, K], each below 16.
        scale: [N, G] in the compute type.
        zero: uint8 [N, G], or None for the middle code 8.

    Returns:
        the packed codes, uint8 [N, K / 2], and scales with offsets [G, N, 2] in the type of `scale`.
    """
    packed = aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    middle = torch.full_like(scale, 8.0, dtype=torch.float32) if zero is None else zero.float()
    offset = ((8.0 - middle) * scale.float()).to(scale.dtype)
    return packed, torch.stack([scale, offset], -1).transpose(0, 1).contiguous()
