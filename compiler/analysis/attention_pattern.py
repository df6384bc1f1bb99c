"""Attention as models spell it: what a call of SDPA, or a softmax between two products, computes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from optc.compiler.analysis.aliases import Storage
from optc.compiler.analysis.attention_products import (
    Operand,
    before_merge,
    merges_heads,
    score_factors,
    splits_heads,
    weighted_values,
)
from optc.compiler.analysis.dataflow import COPIES, is_tensor, readers, scalar, value_of
from optc.compiler.analysis.masks.elements import UnprovenError, operator_name
from optc.compiler.analysis.masks.proof import MASKED, MaskProver, Term

_MASKINGS = ("add", "masked_fill", "where")
_POINTWISE = frozenset(
    (
        "mul",
        "div",
        "tanh",
        *_MASKINGS,
        "sub",
        "neg",
        "relu",
        "clamp",
        "clamp_min",
        "clamp_max",
        "cat",
        "max",
        "maximum",
    )
)
"""What scores may pass through and be told to be scores still, in a report of what is not understood."""
_SDPA_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


@dataclass(frozen=True)
class Site:
    """softmax(softcap(q k^T * scale) + masks) v as it was found.

    Attributes:
        result: the node that holds the result; v is read there.
        product: the node that reads q and k.
        result_axes: the order of [B, (H,) S, Dv]'s axes in it.
        gqa: whether query heads may share key and value heads in groups.
        weights: what `result` multiplies with v, when it is spelled out.
        biases: what is added to the scores and says the same to every query, where that is no mask.
        merged: whether `result` has batch and heads in one axis, [B * H, S, Dv].
    """

    result: Node
    product: Node
    q: Operand
    k: Operand
    v: Operand
    scale: float
    softcap: float = 0.0
    terms: tuple[Term, ...] = ()
    is_causal: bool = False
    gqa: bool = False
    result_axes: tuple[int, ...] = ()
    weights: Node | None = None
    biases: tuple[Term, ...] = ()
    merged: bool = False


# -- torch's operator ----------------------------------------------------------------------------


def sdpa_site(node: Node) -> Site:
    """What a call of `aten.scaled_dot_product_attention` computes.

    Raises:
        UnprovenError: dropout, or a scale that is not a number.
    """
    q, k, v = node.args[:3]
    assert isinstance(q, Node)
    assert isinstance(k, Node)
    assert isinstance(v, Node)
    given = dict(zip(("attn_mask", "dropout_p", "is_causal"), node.args[3:], strict=False))
    options: dict[str, Any] = {**_SDPA_DEFAULTS, **given, **node.kwargs}
    if options["dropout_p"]:
        raise UnprovenError(f"it applies dropout to its weights (p = {options['dropout_p']})")
    width = value_of(q).shape[-1]
    scale = options["scale"]
    if scale is None and isinstance(width, int):
        scale = float(width) ** -0.5
    if scalar(scale) is None:
        raise UnprovenError(f"its scale {scale} is not a number")
    mask = options["attn_mask"]
    terms: tuple[Term, ...] = ()
    if mask is not None:
        terms = (Term(mask, "keep" if value_of(mask).dtype == torch.bool else "add", node),)
    axes = tuple(range(value_of(q).dim()))
    return Site(
        node,
        node,
        Operand(q, axes),
        Operand(k, axes),
        Operand(v, axes),
        float(scale),
        terms=terms,
        is_causal=bool(options["is_causal"]),
        gqa=bool(options["enable_gqa"]),
        result_axes=axes,
    )


# -- softmax -------------------------------------------------------------------------------------


class SoftmaxReader:
    """Reads attention that is spelled out around a softmax."""

    def __init__(self, prover: MaskProver, storage: Storage) -> None:
        self._prover, self._storage = prover, storage

    def site(self, softmax: Node) -> Site | None:
        """What the softmax and the two products around it compute; None when it is no attention.

        Raises:
            UnprovenError: it is attention, and something in it is not understood.
        """
        weights = _last_identity(softmax)
        read = _joined(weights)
        products = [user for user in readers(read) if weighted_values(user, read) is not None]
        start = softmax.args[0]
        assert isinstance(start, Node)
        if not _leads_to_scores(start):
            return None
        if not products:
            self._check_weights(weights)
            return None
        result = products[0]
        others = [user.name for user in readers(read) if user is not result]
        if others:
            raise UnprovenError(f"its weights are also read by {', '.join(others)}")
        axis = softmax.args[1]
        if axis not in (-1, value_of(softmax).dim() - 1):
            raise UnprovenError(f"it is taken over axis {axis}, not over the keys")
        weighted = weighted_values(result, read)
        assert weighted is not None
        v, axes = weighted
        site = self._scores(start, softmax, result, v)
        if site.merged or read is not weights:
            site, axes = replace(site, v=_apart(v), merged=True), (0, 1, 2, 3)
        return replace(site, result_axes=axes, weights=weights)

    @staticmethod
    def _check_weights(weights: Node) -> None:
        """Tell weights that are changed on their way to the values from a softmax that is no attention."""
        for changed in (user for user in readers(weights) if is_tensor(user)):
            if any(weighted_values(user, changed) is not None for user in readers(changed)):
                raise UnprovenError(f"{changed.name} ({changed.target}) changes its weights")

    def _scores(self, node: Node, reader: Node, result: Node, v: Operand) -> Site:
        """Walk from the softmax back to q k^T."""
        factor, softcap, apart, joined = 1.0, 0.0, True, False
        terms: list[Term] = []
        while (factors := score_factors(node)) is None:
            self._check(node, reader)
            name, tensors = operator_name(node), _tensors(node)
            number = self._multiplier(node)
            if _is_identity(node):
                step = tensors[0]
            elif splits_heads(node):
                step, apart = tensors[0], False
            elif merges_heads(node) and not terms:
                step, joined = tensors[0], True
            elif (raised := self._raised(node)) is not None:
                step = raised
            elif number is not None:
                step, scale = number
                factor *= scale
            elif name == "tanh" and not softcap and factor > 0:
                step, softcap, factor = tensors[0], factor, 1.0
            elif name in _MASKINGS and apart:
                if softcap:
                    raise UnprovenError(f"{node.name} masks scores before their softcap")
                step, term = self._mask(node, factor)
                terms.append(term)
            elif name == "mul" and apart and not softcap and len(tensors) == 2:
                step, mask = tensors if _leads_to_scores(tensors[0]) else reversed(tensors)
                terms.append(Term(mask, "multiply", node))
            else:
                raise UnprovenError(f"{node.name} ({node.target}) is not a scale, mask or softcap of scores")
            node, reader = step, node
        self._check(node, reader)
        biases: tuple[Term, ...] = ()
        if operator_name(node) == "baddbmm":
            options, bias = {"beta": 1, "alpha": 1, **node.kwargs}, _argument(node, 0)
            if self._prover.number(bias, node) != 0:
                biases = (Term(bias, "add", node, factor * options["beta"]),)
            factor *= options["alpha"]
        q, k = factors if apart else map(_apart, factors)
        scale = factor * (softcap or 1.0)
        return Site(result, node, q, k, v, scale, softcap, tuple(terms), biases=biases, merged=joined)

    def _check(self, node: Node, reader: Node) -> None:
        written = self._storage.overwritten(node, reader)
        if written is not None:
            raise UnprovenError(f"{written.name} overwrites {node.name} before {reader.name} reads it")

    def _multiplier(self, node: Node) -> tuple[Node, float] | None:
        """The tensor and the number that a product or quotient multiplies it with, else None."""
        name = operator_name(node)
        if name not in ("mul", "div") or node.kwargs or len(node.args) != 2:
            return None
        left, right = node.args
        if name == "mul" and not (isinstance(left, Node) and _leads_to_scores(left)):
            left, right = right, left
        if not isinstance(left, Node):
            return None
        number = self._number(right, node)
        if number is None and name == "mul" and is_tensor(right):
            return None
        if number is None or number == 0.0 or not math.isfinite(number):
            raise UnprovenError(f"{node.name} scales by {right}, which is not one number")
        return left, number if name == "mul" else 1.0 / number

    def _number(self, argument: Any, reader: Node) -> float | None:
        if isinstance(argument, Node) and is_tensor(argument):
            return self._prover.number(argument, reader)
        return scalar(argument)

    def _raised(self, node: Node) -> Node | None:
        """The scores of a call that raises them to a number which masks all the same, else None."""
        if operator_name(node) not in ("max", "maximum") or node.kwargs or len(node.args) != 2:
            return None
        left, right = node.args
        scores, other = (left, right) if isinstance(left, Node) and _leads_to_scores(left) else (right, left)
        lowest = self._number(other, node)
        return scores if isinstance(scores, Node) and lowest is not None and lowest <= MASKED else None

    def _mask(self, node: Node, factor: float) -> tuple[Node, Term]:
        """The scores and the mask of a call that puts a mask on scores."""
        name, arguments = operator_name(node), node.args
        if node.kwargs or len(arguments) != (2 if name == "add" else 3):
            raise UnprovenError(f"{node.name} ({node.target}) has options that are not supported")
        if name == "add":
            left, right = arguments
            paths = [isinstance(item, Node) and _leads_to_scores(item) for item in (left, right)]
            scores, mask = (left, right) if paths[0] else (right, left)
            if all(paths) or not isinstance(mask, Node):
                raise UnprovenError(f"{node.name} adds {mask} to the scores, which is not a mask")
            return scores, Term(mask, "add", node, factor)
        if name == "masked_fill":
            scores, mask, number = arguments
            kind = "drop"
        else:
            mask, left, right = arguments
            keeps = isinstance(left, Node) and _leads_to_scores(left)
            scores, number = (left, right) if keeps else (right, left)
            kind = "keep" if keeps else "drop"
        filling = self._number(number, node)
        assert isinstance(scores, Node)
        assert isinstance(mask, Node)
        if filling is None or filling * factor > MASKED:
            raise UnprovenError(f"{node.name} puts {number} in place of scores, which does not mask them")
        return scores, Term(mask, kind, node, factor)  # type: ignore[arg-type]


def _argument(node: Node, place: int) -> Node:
    found = node.args[place]
    assert isinstance(found, Node)
    return found


def _apart(operand: Operand) -> Operand:
    """An operand whose batch and heads are one axis, as it was before.

    Raises:
        UnprovenError: it was not made of one that has them apart.
    """
    found = before_merge(operand)
    if found is None:
        raise UnprovenError(f"{operand.node.name} has batch and heads in one axis, and was not made by joining them")
    return found


def _joined(weights: Node) -> Node:
    """The view that joins batch and heads of weights, where nothing else reads them."""
    users = readers(weights)
    return users[0] if len(users) == 1 and merges_heads(users[0]) else weights


def _tensors(node: Node) -> list[Node]:
    """The tensors among the arguments of a call."""
    return [item for item in node.all_input_nodes if is_tensor(item)]


def _is_identity(node: Node) -> bool:
    """Whether a call has its argument's values: casts between float types, copies, inactive dropout."""
    name = operator_name(node)
    if name == "dropout":
        return not (node.args[1] and node.args[2])
    if node.target in COPIES:
        return True
    if name not in ("to", "_to_copy", "type_as"):
        return False
    return all(value_of(item).is_floating_point() for item in (node, _tensors(node)[0]))


def bypass_dropout(weights: Node) -> None:
    """Take inactive dropout out of the way of attention weights: random operators are never dead code."""
    while _is_identity(weights):
        source = weights.args[0]
        assert isinstance(source, Node)
        if operator_name(weights) == "dropout":
            weights.replace_all_uses_with(source)
            weights.graph.erase_node(weights)
        weights = source


def _last_identity(node: Node) -> Node:
    """The last of the nodes that pass on a node's values and have no other reader; heads may be parted and joined again."""
    while len(users := readers(node)) == 1:
        (user,) = users
        if splits_heads(user) and len(again := readers(user)) == 1 and merges_heads(again[0]):
            user = again[0]
        elif not _is_identity(user):
            break
        node = user
    return node


def _leads_to_scores(node: Node) -> bool:
    """Whether a product of two activations lies behind scales, masks, softcaps and the like."""
    seen, stack = set(), [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if score_factors(current) is not None:
            return True
        name = operator_name(current)
        if _is_identity(current) or name in _POINTWISE or splits_heads(current) or merges_heads(current):
            stack += _tensors(current)
    return False
