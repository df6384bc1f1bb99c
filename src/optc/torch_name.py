"""The name "optc" among the backends of torch.compile, where no metadata of the package is installed.

An installed package has an entry point of the group `torch_dynamo_backends`, which torch reads itself. In a source tree
`import optc` registers the name instead: at once where torch's registry is loaded, else when it is (PEP 369 calls this a
post-import hook), as neither torch nor the compiler is imported for it.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any

_REGISTRY = "torch._dynamo.backends.registry"


def announce() -> None:
    """Make the name known to torch.compile, now or when its registry of backends is imported."""
    registry = sys.modules.get(_REGISTRY)
    if registry is not None:
        _register(registry)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def backend(graph: Any, example_inputs: Any, **options: Any) -> Any:
    """See `optc.torch_backend.backend`, which is imported by the first graph."""
    from optc.torch_backend import backend as compile_graph

    return compile_graph(graph, example_inputs, **options)


def _register(registry: ModuleType) -> None:
    if "optc" not in registry._BACKENDS:  # else an entry point says the same
        registry.register_backend(backend, name="optc")


class _Finder(MetaPathFinder):
    """Finds torch's registry as others do, once, with a loader that registers behind it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, own: Loader) -> None:
        self._own = own

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._own.exec_module(module)
        assert module.__spec__ is not None
        module.__spec__.loader = self._own
        _register(module)
