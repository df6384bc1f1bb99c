"""float32 arithmetic on a model whose weights are stored in 16 bits; of programs see `execution/widened`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from optc.compiler.execution.widened import is_narrow


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Let a model compute in float32: the tensors of a block are widened while it runs, and put back after it.

    Tensors that lie in files are widened where they are read, one at a time.
    """
    units = {module: [place for place in places if is_narrow(place.get().dtype)] for module, places in _units(model)}
    kept: dict[nn.Module, list[tuple[_Place, Tensor]]] = {}

    def enter(module: nn.Module, _: Any) -> None:
        if module not in kept:
            kept[module] = [(place, place.get()) for place in units[module]]
            for place, tensor in kept[module]:
                wide = tensor.detach().float()
                place.put(nn.Parameter(wide, requires_grad=False) if isinstance(tensor, nn.Parameter) else wide)

    def leave(module: nn.Module, *_: Any) -> None:
        for place, tensor in kept.pop(module, ()):
            place.put(tensor)

    hooks = [unit.register_forward_pre_hook(enter) for unit in units]
    hooks += [unit.register_forward_hook(leave) for unit in units]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in list(kept):
            leave(module)


class _Place(NamedTuple):
    """Where a module keeps a tensor."""

    tensors: dict[str, Any]
    name: str

    def get(self) -> Tensor:
        tensor: Tensor = self.tensors[self.name]
        return tensor

    def put(self, tensor: Tensor) -> None:
        self.tensors[self.name] = tensor


def _units(model: nn.Module) -> Iterator[tuple[nn.Module, list[_Place]]]:
    """The blocks of a model (the outermost members of its module lists) and every other module that has tensors of
    its own, with the places of their tensors."""
    if isinstance(model, nn.ModuleList):
        for block in model:
            yield block, [place for module in block.modules() for place in _places(module)]
        return
    own = _places(model)
    if own:
        yield model, own
    for child in model.children():
        yield from _units(child)


def _places(module: nn.Module) -> list[_Place]:
    """Of the tensors that a module itself has."""
    tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    return [_Place(table, name) for table in tables for name, tensor in table.items() if tensor is not None]
