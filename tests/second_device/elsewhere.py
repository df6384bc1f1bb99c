"""A second device that every machine has: tensors that say they are on it, hold data, and mix with no CPU tensor.

An operator whose tensors are on two devices is refused, as CUDA does it (a CPU tensor without axes may take part);
so is reading the memory of a tensor without moving it first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from optc.compiler.ops.library import reference

backend_registration._setup_privateuseone_for_python_backend("elsewhere")
ELSEWHERE = torch.device("elsewhere", 0)
_MIXED = (
    torch.ops.aten._to_copy.default,
    torch.ops.aten.copy_.default,
    torch.ops.aten.index.Tensor,  # places may be on the CPU, for CUDA too
    torch.ops.aten.index_put_.default,
)


class There(Tensor):
    """A tensor on `ELSEWHERE`; `held` is its data."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=ELSEWHERE,
            requires_grad=False,
        )
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:
        return f"There({self.held!r})"

    def untyped_storage(self) -> torch.UntypedStorage:
        """Of the data: it tells which tensors are the same memory."""
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        """As of any device: the numbers are fetched."""
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the held data; its result is where its inputs are."""
    tensors = [item for item in tree_flatten((args, kwargs))[0] if isinstance(item, Tensor)]
    if any(isinstance(item, FakeTensor) for item in tensors):
        return func(*args, **kwargs)  # shapes alone; they know their device
    there = any(isinstance(item, There) for item in tensors)
    device = kwargs.get("device")
    if there and func not in _MIXED and device is None:
        strangers = [item for item in tensors if not isinstance(item, There) and item.dim()]
        if strangers:
            raise RuntimeError(f"{func}: tensors on {ELSEWHERE} and on the CPU, {tuple(strangers[0].shape)}")
    made_there = there if device is None else torch.device(device).type == ELSEWHERE.type
    if not there and not made_there:
        return func(*args, **kwargs)
    if made_there and device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if there and func.namespace == "optc":
        with FromLists(), Factories():  # its Python, on these tensors; a mode is off while it answers a call
            return reference(func._schema.name.partition("::")[2])(*args, **kwargs)
    unwrap = lambda item: item.held if isinstance(item, There) else item  # noqa: E731
    plain_args, plain_kwargs = tree_map(unwrap, args), tree_map(unwrap, kwargs)
    result = func(*plain_args, **plain_kwargs)
    if func.namespace == "aten" and func._schema.name in ("aten::_local_scalar_dense", "aten::equal"):
        return result
    originals = {id(unwrap(item)): item for item in tensors}

    def wrap(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        if id(item) in originals:
            return originals[id(item)]  # written in place
        return There(item) if made_there else item

    return tree_map(wrap, result)


class Factories(TorchDispatchMode):
    """Makes tensors on `ELSEWHERE` where a call says so."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            return func(*args, **(kwargs or {}))  # shapes alone; this mode comes before that one
        return run(func, args, kwargs or {})


class FromLists(TorchFunctionMode):
    """Numbers of lists get there by way of the CPU, as torch.tensor moves them where no mode sees it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        return func(*args, **kwargs)


@contextmanager
def second_device() -> Iterator[torch.device]:
    """The device, for the time of a test."""
    with FromLists(), Factories():
        yield ELSEWHERE
