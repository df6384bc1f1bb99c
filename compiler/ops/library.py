"""Registration of the `optc::` dialect: per op one schema, one eager reference, one fake, and what is known about it.

Who reasons about ops (the gate, the stage driver, folding, legality) asks the traits of an `OpSpec`, never a table of
names: a new op is known everywhere when it is defined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from optc.compiler.diagnostics import TargetError
from optc.compiler.plugins import plugins

ENTRY_POINTS = "optc.ops"
_LIBRARY = torch.library.Library("optc", "FRAGMENT")

Axes = Literal["BHSD", "BSC", "NHD"]
"""Axes of an attention's (first) result: batch B, heads H, tokens S of a row or N of all rows, D or C = H * D."""

Keywords = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class PackedProduct:
    """A product with a packed weight in two steps, so that who calls it often makes the weight once.

    Attributes:
        parts: the places of the arguments that the weight is made of.
        weight: (those arguments, keyword arguments of the call) -> [N, K]; of some of their rows those of the weight.
        multiplied: (the first argument, keyword arguments) -> what is multiplied by the weight: the call gives its `linear`.
        bias: the place of the bias.
        apart: keyword arguments that say nothing of the weight.
    """

    parts: tuple[int, ...]
    weight: Callable[..., torch.Tensor]
    multiplied: Callable[..., torch.Tensor]
    bias: int
    apart: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OpSpec:
    """One op of the dialect.

    Attributes:
        schema: the operator schema without namespace, e.g. `rotary(Tensor x, ...) -> Tensor`.
        reference: eager implementation, obviously right, on any device.
        fake: shape and dtype propagation.
        aten: the same in traceable ATen, for targets without a kernel of their own; None where there is none.
        attends: it is attention, with its result in these axes.
        keeps_state: each token reads what the tokens before it left in a state of fixed size. No op but these and attention
            mixes tokens.
        activation_codes: it makes codes of its first argument, an activation; from keyword arguments to their format.
        rounds_inside: it is a product that may round its input itself; from keyword arguments to whether it does.
        makes_weight: it makes a weight [N, K] of codes.
        makes_activation: it makes an activation of codes.
        product: how a product with a packed weight comes apart; None where the reference does it in one.
    """

    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    aten: Callable[..., Any] | None = None
    attends: Axes | None = None
    keeps_state: bool = False
    activation_codes: Callable[[Keywords], str] | None = None
    rounds_inside: Callable[[Keywords], bool] | None = None
    makes_weight: bool = False
    makes_activation: bool = False
    product: PackedProduct | None = None

    @property
    def name(self) -> str:
        """Without namespace and overload."""
        return self.schema.split("(", 1)[0]

    @property
    def op(self) -> torch._ops.OpOverload:
        """What nodes of a graph call."""
        found: torch._ops.OpOverload = getattr(torch.ops.optc, self.name).default
        return found

    @property
    def mutates(self) -> tuple[str, ...]:
        """Names of the arguments that it writes, as the schema says."""
        arguments = self.op._schema.arguments
        return tuple(item.name for item in arguments if item.alias_info is not None and item.alias_info.is_write)

    def rounds_activations(self, keywords: Keywords) -> bool:
        """Whether a call with these keyword arguments rounds activations to codes as they come."""
        inside = self.rounds_inside is not None and self.rounds_inside(keywords)
        return self.activation_codes is not None or inside


_SPECS: dict[str, OpSpec] = {}
_BY_OP: dict[object, OpSpec] = {}


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any], **traits: Any) -> OpSpec:
    """Register an op of the dialect, in whichever order a process meets it and a C++ op library with a kernel for it.

    The library defines the schema only where nobody did, and torch refuses a kernel whose signature is another.

    Args:
        schema, reference, fake, traits: see `OpSpec`.

    Raises:
        TargetError: a loaded C++ op library has defined the op with another schema.
    """
    spec = OpSpec(schema=schema, reference=reference, fake=fake, **traits)
    name = spec.name
    assert name not in _SPECS, f"optc::{name} is defined twice"
    if not hasattr(torch.ops.optc, name):
        _LIBRARY.define(schema)
    else:  # by a C++ op library that was loaded before the dialect was imported
        _check_same_schema(name, schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"optc::{name}", fake, lib=_LIBRARY)
    _SPECS[name] = _BY_OP[spec.op] = spec
    return spec


def load_entry_points() -> None:
    """Import the modules by which other packages add ops to the dialect; each calls `define`."""
    for _ in plugins(ENTRY_POINTS, "a module", lambda _: True):
        pass


def specs() -> Iterator[OpSpec]:
    """Every op of the dialect."""
    yield from _SPECS.values()


def find(target: object) -> OpSpec | None:
    """The op that a node's target is, or None where it is none of the dialect."""
    return _BY_OP.get(target) if isinstance(target, torch._ops.OpOverload) else None


def named(name: str) -> OpSpec | None:
    """The op of this name (without namespace), or None."""
    return _SPECS.get(name)


def reference(name: str) -> Callable[..., Any]:
    """The eager reference of an op, past the dispatcher (where a C++ kernel may stand in front of it)."""
    return _SPECS[name].reference


def attends(target: object) -> bool:
    """Whether a node's target is an attention of the dialect."""
    spec = find(target)
    return spec is not None and spec.attends is not None


def makes_weight(target: object) -> bool:
    """Whether a node's target makes a weight [N, K] of codes."""
    spec = find(target)
    return spec is not None and spec.makes_weight


def _check_same_schema(name: str, schema: str) -> None:
    found = getattr(torch.ops.optc, name).default._schema
    if str(found) != str(torch._C.parse_schema(f"optc::{schema}")):
        raise TargetError(
            f"a C++ op library in this process defines the operator optc::{name} differently from this version of optc",
            why=f"it has {found}",
            remedy="import optc in a process that has not loaded the library of another version",
        )
