"""Bits and group sizes of integer weights: which there are, and which fit a model. Nothing here imports torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from optc.compiler.diagnostics import InputError, UsageError

BITS = (2, 3, 4, 8)
DEFAULT_GROUP_SIZES = (128, 64, 32)
GROUP_SIZES = (0, 16, 32, 64, 128, 256)
"""What is proposed in place of a size that does not fit: those that some engine runs. 0 is a row."""
AUTO_SIZES = (*DEFAULT_GROUP_SIZES, 16, 0)
"""What `auto` tries for each weight, in this order: a row, which divides every K, only where no group does."""

GroupSize = int | tuple[int, ...] | None
"""Of weights: one size; several, of which each weight gets the first that divides its K; or the default."""


def check_bits(bits: int) -> None:
    """Refuse bit widths that the canonical form does not know.

    Raises:
        UsageError: not 2, 3, 4 or 8.
    """
    if bits not in BITS:
        raise UsageError(f"{bits}-bit weights are not supported", remedy="choose 2, 3, 4 or 8 bits")


def size_for(columns: int, sizes: Sequence[int]) -> int | None:
    """The first of `sizes` that divides K = `columns`, 0 dividing every K; None when none does."""
    return next((size for size in sizes if size == 0 or columns % size == 0), None)


def check_sizes(group_size: GroupSize) -> None:
    """Refuse what is no group size, before any weight is known.

    Raises:
        InputError: a negative size, or an empty list of sizes.
    """
    for size in group_size if isinstance(group_size, tuple) else (group_size or 0,):
        check_group_size(size, [])
    if group_size == ():
        raise InputError("no group sizes are given", remedy="give a size, or several to choose from for each weight")


def check_group_size(
    group_size: int,
    columns: Sequence[int],
    names: Sequence[str] = (),
    *,
    sizes: Sequence[int] = GROUP_SIZES,
    auto: bool = False,
) -> None:
    """Refuse a group size that does not divide every K; 0 (one group per row) always does.

    Args:
        columns: K of each weight.
        names: the weights' names, for the message.
        sizes: what may be chosen instead: the group sizes of the target.
        auto: `--group-size auto` may be chosen too.

    Raises:
        InputError: names the first weight that it does not divide, its K, and the nearest of `sizes` that fits all.
    """
    if group_size < 0:
        raise InputError(f"group size {group_size} is negative", remedy="use 0 for one group per row")
    odd = next((i for i, size in enumerate(columns) if group_size and size % group_size), None)
    if odd is None:
        return
    raise InputError(
        f"group size {group_size} does not divide every weight",
        where=names[odd] if names else None,
        why=f"it has K = {columns[odd]}",
        remedy=_other_size(group_size, columns, sizes, names[odd] if names else "", auto=auto),
    )


def default_group_size(
    columns: Sequence[int], names: Sequence[str] = (), *, sizes: Sequence[int] = GROUP_SIZES, auto: bool = False
) -> int:
    """The largest of 128, 64 and 32 that divides every K; arguments as `check_group_size` has them.

    Raises:
        InputError: none does; names the first weight in the way.
    """
    for size in DEFAULT_GROUP_SIZES:
        if all(count % size == 0 for count in columns):
            return size
    odd = next((i for i, count in enumerate(columns) if count % DEFAULT_GROUP_SIZES[-1]), 0)
    raise InputError(
        "none of the group sizes 128, 64 and 32 divides every weight",
        where=names[odd] if names else None,
        why=f"it has K = {columns[odd]}",
        remedy=_other_size(DEFAULT_GROUP_SIZES[-1], columns, sizes, names[odd] if names else "", auto=auto),
    )


def _other_size(group_size: int, columns: Sequence[int], sizes: Sequence[int], name: str, *, auto: bool) -> str:
    """What to do about a group size: the nearest of `sizes` that divides every K, else whole rows, else neither."""
    found = [size for size in sizes if size and all(count % size == 0 for count in columns)]
    choices = []
    if found:
        near = min(found, key=lambda size: abs(math.log2(size / group_size)))
        choices.append(f"use {near}, the nearest that divides every weight")
    elif 0 in sizes:
        choices.append("use 0, one group per row")
    if auto:
        choices.append("--group-size auto, which takes a size for each weight")
    ignored = f"--ignore {name.partition('[')[0]}".rstrip()  # the experts of a stack are left out together
    return ", or ".join([*choices, f"leave this weight out: {ignored}"])
