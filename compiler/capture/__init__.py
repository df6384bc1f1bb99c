"""From a model folder or an nn.Module to a Program.

Names are loaded when used: what reads a config alone, as a plan does, waits for no proof and no tracing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optc.compiler.capture.encoder_decoder import capture_encoder_decoder
    from optc.compiler.capture.module import capture_module
    from optc.compiler.capture.pretrained import capture_model, capture_pretrained, capture_pretrained_pair

_HOME_OF = {
    "capture_encoder_decoder": "encoder_decoder",
    "capture_model": "pretrained",
    "capture_module": "module",
    "capture_pretrained": "pretrained",
    "capture_pretrained_pair": "pretrained",
}

__all__ = [
    "capture_encoder_decoder",
    "capture_model",
    "capture_module",
    "capture_pretrained",
    "capture_pretrained_pair",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
