"""torch.export, with its failures as errors for users."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from optc.compiler import compat
from optc.compiler.diagnostics import CaptureError
from optc.compiler.ir.deferred import SingleSizes, drop_data_asserts, settle_deferred
from optc.compiler.ir.lazy_weights import LazyWeight
from optc.compiler.ir.quick_tracing import quick_tracing


def run_export(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    dynamic_shapes: Any,
    *,
    where: str,
    excepted: SingleSizes | None = None,
) -> torch.export.ExportedProgram:
    """torch.export in non-strict mode; its failures become CaptureErrors.

    Lazy weights of the module are not read, and are those of the result.

    Args:
        excepted: takes single sizes at which the caller has to hold the program to the module itself: torch made it
            under the condition that they do not come (see `settle_deferred`).
    """
    try:
        with (
            torch.no_grad(),
            quick_tracing(),
            _plain_texts(module),
            _stand_ins(module) as lazy,
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings(
                "ignore", r"(?s).*_flat_weights.*assigned during export"
            )  # torch's recurrent layers
            exported = _exported(module, args, dynamic_shapes, excepted)
    except torch._dynamo.exc.UserError as error:
        raise CaptureError(
            "torch.export cannot make one graph for all shapes",
            where=where,
            why=_reasons(str(error)),
            remedy="the model specializes on a shape or branches on data: leave that axis out of the dynamic ones, or give "
            "an example of other sizes (2 at least); see docs/compile.md",
        ) from error
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise CaptureError(
            "torch.export failed",
            where=where,
            why=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
            remedy="the model runs code that torch.export cannot trace",
        ) from error
    drop_data_asserts(exported)
    _drop_history(exported)
    for table in (exported.state_dict, exported.constants):
        table.update({name: lazy[id(value)] for name, value in table.items() if id(value) in lazy})
    return exported


def functional_export(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program without in-place operators; its failures become CaptureErrors. Lazy weights are not read.

    What it writes into inputs and buffers are further outputs, as torch.export has them.
    """
    held = dict(exported.state_dict)
    lazy: dict[int, Tensor] = {}  # stand-in -> weight; tied ones share it
    made: dict[int, Tensor] = {}
    for name, value in held.items():
        if isinstance(value, LazyWeight):
            stand_in = made.setdefault(id(value), _without_memory(value))
            lazy[id(stand_in)] = value
            exported.state_dict[name] = stand_in
    try:
        with torch.no_grad(), quick_tracing():
            result = compat.functional_program(exported)
    except (RuntimeError, ValueError, TypeError) as error:
        raise CaptureError(
            "the program cannot be written without in-place operators",
            why=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}",
            remedy="rewrite what writes into tensors in the module, or choose --target inductor-cpu",
        ) from error
    finally:
        exported.state_dict.update(held)
    broken = settle_deferred(result)
    if broken is not None:
        raise CaptureError(
            "the program cannot be written without in-place operators for all sizes",
            why=str(SizeConditionError(*broken)),
            remedy="choose --target inductor-cpu",
        )
    for name, value in result.state_dict.items():
        result.state_dict[name] = lazy.get(id(value), held.get(name, value))
    return result


def _exported(
    module: torch.nn.Module, args: tuple[Any, ...], dynamic_shapes: Any, excepted: SingleSizes | None
) -> torch.export.ExportedProgram:
    """What torch refuses for a few conditions on sizes is exported once more with these deferred, and held to them here.

    Of code that pads and cuts into chunks there are dozens, which do not hold, and another export takes minutes.
    """
    try:
        return compat.export_program(module, args, dynamic_shapes)
    except torch._dynamo.exc.UserError as error:
        if not 0 < str(error).count("Not all values of") <= _FEW:
            raise
        try:
            exported = compat.export_program(module, args, dynamic_shapes, deferred=True)
        except (torch._dynamo.exc.UserError, RuntimeError, ValueError):
            raise error from None
        broken = settle_deferred(exported, excepted)
        if broken is not None:
            raise error from SizeConditionError(*broken)
        return exported


def _drop_history(exported: torch.export.ExportedProgram) -> None:
    """Which nodes of earlier graphs a node was made of is read by nobody, and would be copied with every graph."""
    for inner in exported.graph_module.modules():
        for node in inner.graph.nodes if isinstance(inner, torch.fx.GraphModule) else ():
            node.meta.pop("from_node", None)


_FEW = 12


class SizeConditionError(Exception):
    """A condition under which the graph was made, and sizes by symbol for which it does not hold."""

    def __init__(self, condition: str, sizes: dict[str, int]) -> None:
        self.condition, self.sizes = condition, sizes
        super().__init__(f"{condition} does not hold for {sizes or 'all sizes'}")


def _reasons(text: str) -> str:
    """What torch.export says of each axis that it could not keep dynamic, and what it suggests; else its first line."""
    head, *rest = text.strip().splitlines()
    found = [line.strip().removeprefix("- ") for line in rest if line.strip().startswith("- ")]
    if "Suggested fixes:" in rest:
        fixes = rest[rest.index("Suggested fixes:") + 1 :]
        found += [f"suggested: {line.strip()}" for line in fixes[: fixes.index("") if "" in fixes else None]]
    return "; ".join([head.split(" For more information")[0], *found])


@contextmanager
def _stand_ins(module: torch.nn.Module) -> Iterator[dict[int, Tensor]]:
    """Put tensors without memory in the places of lazy weights, for torch.export; gives id of stand-in -> weight.

    torch.export makes fakes of what it finds, and does not know how to of a tensor subclass.
    """
    made: dict[int, Tensor] = {}  # by the id of the weight: tied weights stay one
    places: list[tuple[dict[str, Any], str, Tensor]] = []
    for inner in module.modules():
        tables: tuple[dict[str, Any], ...] = (inner._parameters, inner._buffers)
        for table in tables:
            for name, value in table.items():
                if isinstance(value, LazyWeight):
                    made.setdefault(id(value), _without_memory(value))
                    places.append((table, name, value))
    try:
        for table, name, value in places:
            table[name] = made[id(value)]
        yield {id(made[id(value)]): value for _, _, value in places}
    finally:
        for table, name, value in places:
            table[name] = value


@contextmanager
def _plain_texts(module: torch.nn.Module) -> Iterator[None]:
    """Let modules be printed without their data: torch 2.11 prints them while it traces, and I-BERT's print numbers that
    are none then."""
    classes = {type(inner) for inner in module.modules() if "__repr__" in vars(type(inner))} - {torch.nn.Module}
    own = {made: made.__repr__ for made in classes}
    try:
        for made in classes:
            made.__repr__ = object.__repr__  # type: ignore[method-assign]
        yield
    finally:
        for made, text in own.items():
            made.__repr__ = text  # type: ignore[method-assign]


def _without_memory(weight: LazyWeight) -> Tensor:
    tensor = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype)
    tensor.untyped_storage().resize_(0)
    if isinstance(weight, torch.nn.Parameter):
        return torch.nn.Parameter(tensor, requires_grad=False)
    return tensor
