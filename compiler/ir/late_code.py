"""Graph modules whose Python code is written when somebody asks for it.

torch.fx writes and compiles the code of a GraphModule whenever it gets a graph: seven times in one torch.export, once in
each copy of a Program, of which one is called and most are only read, node by node. That was an eighth of the time of
all tests. While `late_code` is open, code waits for the first call, or for whoever reads `forward` or `code`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

from torch.fx import GraphModule

_RECOMPILE = GraphModule.recompile
_NOTHING = "def forward(self):\n    pass\n"


@contextmanager
def late_code() -> Iterator[None]:
    """Graph modules that are made or recompiled within get their code when it is needed, within or later."""
    with mock.patch.object(GraphModule, "recompile", _recompile_late):
        yield


def _recompile_late(module: GraphModule) -> Any:
    """All that `GraphModule.recompile` does, of no code. The class of a module is its own, and holds its forward."""
    nothing = SimpleNamespace(src=_NOTHING, globals={}, _lineno_map={}, _prologue_start=0)

    def python_code(*_: Any, **__: Any) -> SimpleNamespace:
        return nothing

    with mock.patch.object(module._graph, "python_code", python_code):
        _RECOMPILE(module)
    own: Any = type(module)
    own.forward = _LateForward(module)
    own.code = property(lambda self: (self.forward, self._code)[1])
    return nothing


class _LateForward:
    """Stands for the forward of a graph module in its class until it is read, by a call or by another."""

    def __init__(self, module: GraphModule) -> None:
        self._module = weakref.ref(module)

    def __get__(self, instance: GraphModule | None, owner: type) -> Any:
        module = instance if instance is not None else self._module()
        assert module is not None, "the class of a graph module is read while the module lives"
        _RECOMPILE(module)
        return getattr(owner if instance is None else instance, "forward")  # noqa: B009 (of a class that mypy does not know)
