"""How users name a device; `ir/devices` finds it. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

DEVICE_PATTERN = "^(auto|cpu|cuda|cuda:[0-9]{1,3})$"
"""What --device may be."""

DeviceName = Annotated[
    str,
    Meta(pattern=DEVICE_PATTERN, extra={"metavar": "cpu|cuda|cuda:N|auto", "expected": "cpu, cuda, cuda:N or auto"}),
]
"""The type of a field that names a device."""
