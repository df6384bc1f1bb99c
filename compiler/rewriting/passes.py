"""Passes and rules.

A Pass takes a runnable Program and returns a runnable Program. It states how many sites matched and
why the near ones did not; verification, the no-op check and the numerics gate are the Pipeline's.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch.fx import Node

from optc.compiler.calibration.sequences import Calibration
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.budget import Budget
from optc.compiler.rewriting.made_weights import MadeWeights
from optc.compiler.rewriting.quantization_record import LinearRecord
from optc.compiler.settings.fields import check_type


@dataclass(frozen=True)
class Miss:
    """A site that looked right and was left alone, with the reason."""

    node: str
    reason: str


@dataclass(frozen=True)
class PassResult:
    """What a pass did. `candidates` counts the sites looked at: "matched 32 of 32".

    `linears` has a record per weight that a quantization pass rounded.
    """

    program: Program
    matched: int
    candidates: int
    misses: tuple[Miss, ...] = ()
    notes: tuple[str, ...] = ()
    linears: tuple[LinearRecord, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PassContext:
    """What a pass may know beside the program.

    Attributes:
        calibration: token sequences for passes that read activations; None when there are none.
        reference: the program in front of the first lossy pass, for passes that say they need it.
        progress: told (done, total, what) by passes that take long.
        work_dir: where such a pass keeps what it has finished, to continue after a kill.
        obstacle: says why the target cannot run a call, None where it can; there is none without a target.
        made: keeps what is made of codes, for passes that run the program.
    """

    seed: int = 0
    calibration: Calibration | None = None
    reference: Program | None = None
    progress: Callable[[int, int, str], None] | None = None
    work_dir: Path | None = None
    obstacle: Callable[[Node], str | None] | None = None
    made: MadeWeights = field(default_factory=MadeWeights, compare=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """One rewrite. Fields of the dataclass are its options (and become CLI and YAML options).

    Attributes:
        name: the pass name, hyphenated; the file is the same in snake case.
        lossy: whether the numbers may move beyond rounding (quantization); such a pass overrides `budget`.
        restores: whether it brings a lossy program closer to what it was; it adds nothing to what all may lose.
        calibrated: whether it reads `PassContext.calibration`.
        needs_reference: whether it reads `PassContext.reference`.
        leaves_inputs: whether its program may leave inputs alone that the one before writes into.
    """

    name: ClassVar[str]
    lossy: ClassVar[bool] = False
    restores: ClassVar[bool] = False
    calibrated: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    leaves_inputs: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.lossy and cls.budget is Pass.budget:
            raise TypeError(f"{cls.__name__} is a lossy pass: it must say in budget() what it may cost")
        if not cls.lossy and cls.budget is not Pass.budget:
            raise TypeError(f"{cls.__name__} has a budget but is not lossy")

    @abstractmethod
    def run(self, program: Program, context: PassContext) -> PassResult:
        """Rewrite `program` and return the result; `program` itself must stay runnable."""

    def budget(self, before: Program) -> Budget:
        """What this pass may cost behind `before`; lossy passes override it, with the measured costs beside."""
        raise TypeError(f"pass '{self.name}' is not lossy: it has no budget")

    def options(self) -> dict[str, Any]:
        """Option names and values."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}

    def __str__(self) -> str:
        defaults = {item.name: item.default for item in dataclasses.fields(self)}
        shown = [f"{key}={value}" for key, value in self.options().items() if value != defaults[key]]
        return f"{self.name}({', '.join(shown)})" if shown else self.name


@dataclass(frozen=True)
class Match:
    """A site that a rule will rewrite: the node to replace and what the rule found."""

    node: Node
    found: dict[str, Any] = field(default_factory=dict)


class Rule(ABC):
    """Pattern, check and rewrite of one kind of site."""

    def prepare(self, program: Program) -> None:  # noqa: B027  (most rules need none)
        """Called once with the clone that will be edited, before any site is matched."""

    @abstractmethod
    def match(self, program: Program, node: Node) -> Match | Miss | None:
        """Match when the site can be rewritten, Miss (with a reason) when nearly, else None."""

    @abstractmethod
    def rewrite(self, program: Program, match: Match) -> None:
        """Rewrite one matched site in place."""


def apply_rules(program: Program, rules: Sequence[Rule]) -> PassResult:
    """Apply rules to every node of a clone of `program`, in graph order, then drop dead nodes.

    Raises:
        UsageError: an argument of another type.
    """
    check_type("program", program, Program, "a Program (optc.capture)")
    check_type("rules", rules, list | tuple, "a list of rules")
    for rule in rules:
        check_type("a rule", rule, Rule, "a Rule")
    edited = program.clone()
    for rule in rules:
        rule.prepare(edited)
    matched, misses = 0, []
    for node in list(edited.graph.nodes):
        if getattr(node, "_erased", False):
            continue
        for rule in rules:
            found = rule.match(edited, node)
            if isinstance(found, Match):
                rule.rewrite(edited, found)
                matched += 1
                break
            if isinstance(found, Miss):
                misses.append(found)
    if not matched:
        return PassResult(program, 0, len(misses), tuple(misses))
    from optc.compiler.ir.surgery import drop_dead

    drop_dead(edited)
    return PassResult(edited.changed(), matched, matched + len(misses), tuple(misses))
