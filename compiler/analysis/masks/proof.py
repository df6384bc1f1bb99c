"""Proofs of attention masks: which keys a query sees, for every shape at once.

A mask is interpreted at symbolic indices (b, q, k) (`compiler.elements`). What comes out depends on the
distance d = k - q through comparisons with constants and on zeros and ones per row and key (padding),
or it is refused. Such a mask is constant between the constants, so that a few distances decide it
exactly: it is proved when the distances kept are those of a causal mask, a window or both, and the
padding takes part as a conjunction. Queries count from the end of the keys: the last query sees up to
the last key.

A query that sees no key at all is undefined: transformers' eager attention averages all values there,
torch's gives zeros or NaN, and `optc.attention` averages.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sympy as sp
from sympy.core.relational import Relational
from torch.fx import Node

from optc.compiler.analysis.aliases import Storage
from optc.compiler.analysis.masks.element_rules import find_rule
from optc.compiler.analysis.masks.elements import (
    BATCH,
    HEAD,
    KEY,
    QUERY,
    Elements,
    Leaf,
    UnprovenError,
    Where,
    bare_symbols,
    is_truth,
    number,
    shape_of,
    truth,
)
from optc.compiler.ir.program import Program

MASKED = -1e4
"""A number at most this, added to a score or put in its place, masks it: scores are far smaller."""

_DISTANCE = sp.Symbol("d", integer=True)
_MAX_LEAVES = 4


@dataclass(frozen=True)
class Term:
    """One mask on the scores.

    Attributes:
        node: broadcasts to the scores [B, H, S, T] (or [B, S, T]).
        kind: "keep" and "drop" are truth values per score; "add" is added to the score; "multiply" is multiplied with
            it, 1 where the score stays and 0 where something else masks it.
        reader: the node that applies it.
        factor: of a mask that is added and multiplied afterwards, with the scores.
    """

    node: Node
    kind: Literal["keep", "drop", "add", "multiply"]
    reader: Node
    factor: float = 1.0


@dataclass(frozen=True)
class Padding:
    """A key of a row counts where `leaf` is 1 (`keep`), or where it is 0."""

    leaf: Leaf
    keep: bool


@dataclass(frozen=True)
class ProvedMask:
    """What `optc.attention` can say. `window` counts tokens including the query itself; 0 is none."""

    causal: bool = False
    window: int = 0
    padding: tuple[Padding, ...] = ()


class MaskProver:
    """Proves masks of one program; a mask that several layers share is proved once."""

    def __init__(self, program: Program, storage: Storage) -> None:
        self._program, self._storage = program, storage
        self._proved: dict[Any, ProvedMask] = {}

    def prove(self, terms: Sequence[Term], extents: Mapping[Any, Any], *, is_causal: bool = False) -> ProvedMask:
        """The conjunction of masks on the scores [B, (H,) S, T].

        Args:
            extents: the sizes of BATCH, HEAD (absent in 3 axes), QUERY and KEY.
            is_causal: also mask k > q, both counted from the start (torch's flag).

        Raises:
            UnprovenError: names the node or the condition that cannot be proved.
        """
        for term in terms:
            written = self._storage.overwritten(term.node, term.reader)
            if written is not None:
                raise UnprovenError(f"{written.name} overwrites {term.node.name}")
        masks = tuple((term.node, term.kind, term.factor) for term in terms)
        memo = (masks, tuple(extents.items()), is_causal)
        if memo not in self._proved:
            elements = Elements(self._program, self._storage, find_rule, extents)
            self._proved[memo] = _Proof(elements).run(terms, is_causal)
        return self._proved[memo]

    def number(self, node: Node, reader: Node) -> float | None:
        """The value of a tensor that is the same number everywhere, else None."""
        elements = Elements(self._program, self._storage, find_rule, {})
        indices = (sp.Symbol(f"i{axis}", integer=True, nonnegative=True) for axis, _ in enumerate(shape_of(node)))
        try:
            value = number(elements.at(node, tuple(indices), reader))
        except UnprovenError:
            return None
        return float(value) if value.is_number else None


_Mask = tuple[Any, Term | None]
"""A mask at the distance d, and the term it came from (None: torch's flag)."""


class _Proof:
    """One proof, over elements interpreted for one pair of query and key."""

    def __init__(self, elements: Elements) -> None:
        self.elements = elements
        extents = elements.extents
        self.index = tuple(symbol for symbol in (BATCH, HEAD, QUERY, KEY) if symbol in extents)
        older = sp.expand(extents[KEY] - extents[QUERY])
        self.distance = KEY - QUERY - older
        self.from_end = {KEY: _DISTANCE + QUERY + older}

    def run(self, terms: Sequence[Term], is_causal: bool) -> ProvedMask:
        masks: list[_Mask] = [(self._condition(term), term) for term in terms]
        if is_causal:
            self._check_square()
            masks.append((sp.Le(_DISTANCE, 0), None))
        leaves = self._leaves(masks)
        cases = {
            values: [
                (value.xreplace(dict(zip(leaves, map(sp.Integer, values), strict=True))), term) for value, term in masks
            ]
            for values in itertools.product((1, 0), repeat=len(leaves))
        }
        cuts = {cut for case in cases.values() for value, term in case for cut in self._cuts(value, term)}
        samples = sorted({sp.floor(cut) + shift for cut in cuts for shift in (-1, 0, 1, 2)} or {sp.Integer(0)})
        kept = {values: [int(d) for d in samples if self._all_keep(case, d)] for values, case in cases.items()}
        relevant = [i for i in range(len(leaves)) if any(kept[v] != kept[_flipped(v, i)] for v in kept)]
        seen = {tuple(values[i] for i in relevant): found for values, found in kept.items() if found}
        if len(seen) != 1:
            names = ", ".join(sorted(str(leaf) for leaf in leaves))
            raise UnprovenError(f"the parts {names} are not a conjunction" if seen else "everything is masked")
        ((signs, distances),) = seen.items()
        padding = tuple(
            Padding(self.elements.leaves[leaves[i]], bool(sign)) for i, sign in zip(relevant, signs, strict=True)
        )
        return _interval(distances, [int(d) for d in samples], padding)

    def _check_square(self) -> None:
        queries, keys = self.elements.extents[QUERY], self.elements.extents[KEY]
        if sp.expand(queries - keys) != 0:
            raise UnprovenError(
                f"is_causal aligns the first of {queries} queries with the first of {keys} keys, not the last"
            )

    def _condition(self, term: Term) -> Any:
        value = self.elements.operand(term.node, self.index, term.reader)
        value = number(value) if term.kind in ("add", "multiply") else truth(value)
        return value.xreplace(self.from_end)

    def _leaves(self, masks: Iterable[_Mask]) -> list[Any]:
        used = {symbol for value, _ in masks for symbol in value.free_symbols}
        leaves = sorted((symbol for symbol in self.elements.leaves if symbol in used), key=str)
        if len(leaves) > _MAX_LEAVES:
            raise UnprovenError(f"more than {_MAX_LEAVES} tensors of padding take part")
        return leaves

    def _cuts(self, value: Any, term: Term | None) -> set[Any]:
        """The distances where a mask may change. Between them it is constant, or this raises."""
        if _DISTANCE in bare_symbols(value):
            assert term is not None
            raise UnprovenError(f"{term.node.name} adds {self._shown(value)}, which varies with the position")
        cuts = set()
        for relation in value.atoms(Relational):
            sides = bare_symbols(relation.lhs) | bare_symbols(relation.rhs)
            if relation.has(Where):
                if sides:
                    raise UnprovenError(f"{self._shown(relation)} is not a bound on k - q")
                continue
            gap = sp.expand(relation.lhs - relation.rhs)
            slope = gap.coeff(_DISTANCE, 1)
            constant = sp.expand(gap - slope * _DISTANCE)
            if not slope.is_number or slope == 0 or not (constant.is_number and constant.is_finite):
                raise UnprovenError(f"{self._shown(relation)} is not a bound on k - q")
            cuts.add(-constant / slope)
        return cuts

    def _all_keep(self, masks: Sequence[_Mask], distance: Any) -> bool:
        kept = [self._keeps(value, term, distance) for value, term in masks]  # each must be known, not only the first
        return all(kept)

    def _keeps(self, value: Any, term: Term | None, distance: Any) -> bool:
        """Whether a mask keeps the score at a distance."""
        try:
            found = value.xreplace({_DISTANCE: distance})
        except TypeError as error:  # sympy's answer to a comparison with NaN
            raise UnprovenError(f"{self._shown(value)} compares with NaN") from error
        if is_truth(found):
            if found not in (sp.true, sp.false):
                raise UnprovenError(f"{self._shown(found)} is not known")
            return bool(found) != (term is not None and term.kind == "drop")
        assert term is not None
        if term.kind == "multiply":
            if found not in (0, 1):
                raise UnprovenError(f"{term.node.name} multiplies a score by {self._shown(found)}")
            return bool(found == 1)
        if found == 0:
            return True
        if found.is_number and found.is_extended_real and found * term.factor <= MASKED:
            return False
        raise UnprovenError(f"{term.node.name} adds {self._shown(found)} to a score")

    def _shown(self, value: Any) -> str:
        """A condition or number as text, in k and q."""
        if isinstance(value, Relational):
            return f"{self._shown(value.lhs)} {value.rel_op} {self._shown(value.rhs)}"
        shown = str(sp.expand(value.subs(_DISTANCE, self.distance)))
        return shown if len(shown) <= 80 else shown[:77] + "..."


def _flipped(values: tuple[int, ...], place: int) -> tuple[int, ...]:
    return (*values[:place], 1 - values[place], *values[place + 1 :])


def _interval(kept: list[int], samples: list[int], padding: tuple[Padding, ...]) -> ProvedMask:
    """The mask that keeps these of the sampled distances: an interval around 0, or open to a side."""
    first, last = kept[0], kept[-1]
    if [d for d in samples if first <= d <= last] != kept:
        raise UnprovenError("it leaves a gap between the keys that it keeps")
    causal = last < samples[-1]
    if causal and last != 0:
        raise UnprovenError(f"it keeps keys up to k = q {last:+d}, not up to k = q")
    if first == samples[0]:
        return ProvedMask(causal, 0, padding)
    if first > 0:
        raise UnprovenError(f"it keeps keys from k = q {first:+d} on, which is not a window")
    return ProvedMask(causal, 1 - first, padding)
