"""A module is captured as it computes in evaluation, and afterwards is in the mode that it was in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from torch import nn

P = ParamSpec("P")
T = TypeVar("T")


def in_eval_mode(capture: Callable[Concatenate[nn.Module, P], T]) -> Callable[Concatenate[nn.Module, P], T]:
    """A function of a module that finds it in evaluation mode; each submodule has its own training flag again behind it."""

    @functools.wraps(capture)
    def captured(module: nn.Module, /, *args: P.args, **kwargs: P.kwargs) -> T:
        before = [(inner, inner.training) for inner in module.modules()]
        module.eval()
        try:
            return capture(module, *args, **kwargs)
        finally:
            for inner, training in before:
                inner.training = training

    return captured
