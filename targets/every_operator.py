"""Legality for targets whose loader has its own model: the graph is not what runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from optc.compiler.target.target import Predicate


class EveryOperator(Mapping[Any, Predicate | None]):
    """Weights are written back and the loader has its own model. Any operator will do."""

    def __getitem__(self, operator: Any) -> None:
        return None

    def __contains__(self, operator: object) -> bool:
        return True

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return 0
