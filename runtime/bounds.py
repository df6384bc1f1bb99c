"""Bounds of the numbers that run, eval and bench are given: of their flags, and of calls from Python; and trust."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

Count = Annotated[int, Meta(ge=1, le=1 << 31)]
"""Tokens, windows, examples, blocks of a cache."""

CountOrZero = Annotated[int, Meta(ge=0, le=1 << 31)]
"""The same, where 0 has a meaning."""

Threads = Annotated[int, Meta(ge=1, le=4096)]
Batch = Annotated[int, Meta(ge=1, le=1 << 16)]
Samples = Annotated[int, Meta(ge=1, le=1 << 20)]
Warmup = Annotated[int, Meta(ge=0, le=1 << 20)]

Temperature = Annotated[float, Meta(ge=0)]
TopP = Annotated[float, Meta(gt=0, le=1)]
MinP = Annotated[float, Meta(ge=0, le=1)]
RepetitionPenalty = Annotated[float, Meta(ge=0.01, le=100)]
Penalty = Annotated[float, Meta(ge=-100, le=100)]
Beams = Annotated[int, Meta(ge=1, le=256)]
LengthPenalty = Annotated[float, Meta(ge=-10, le=10)]
Seed = Annotated[int, Meta(ge=0)]

TimedTokens = Annotated[int, Meta(ge=2, le=1 << 31)]
"""Tokens of one timed generation: decoding begins at the second."""

Trust = Annotated[
    bool,
    Meta(description="Run native code of an artifact that was made elsewhere and bears no signature of a trusted key."),
]
"""See `compiler/artifact/trust.py`."""
