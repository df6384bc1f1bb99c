"""How the engine's process and those of the API talk: msgpack messages behind their length, on a Unix socket.

A stream socket tells both sides at once that the other is gone, whatever ended it; nothing has to be asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec
from msgspec import Struct

from optc.runtime.serving.request import Answer, Cancel, Embed, EngineInfo, EngineMetrics, Generate

MOST_BYTES = 1 << 28
"""Of one message: a prompt of a million tokens has 5 MB."""

_HEAD = 4  # bytes of a length


class Refused(Struct, frozen=True, kw_only=True, tag="refused"):
    """A request that the engine did not take; nothing else follows for its id.

    Attributes:
        why: "busy" where it may be asked again later, "input" where it is at fault.
    """

    id: str
    why: Literal["busy", "input"]
    message: str


class Given(Struct, frozen=True, tag="given"):
    """What one step of the engine gave to the requests of one client; see `Answers`.

    Attributes:
        tokens, counts: int32, in the processor's order of bytes.
    """

    ids: list[str]
    tokens: bytes
    counts: bytes
    others: list[Answer]


class Opened(Struct, frozen=True, tag="opened"):
    """The first message of an engine to each client."""

    info: EngineInfo


class Measured(Struct, frozen=True, tag="measured"):
    """Sent when the engine becomes idle, and now and then while it is not."""

    metrics: EngineMetrics


class Ping(Struct, frozen=True, tag="ping"):
    """Asks whether the engine goes on; see `watchdog`."""


class Pong(Struct, frozen=True, tag="pong"):
    """It does: sent between two steps."""


ToEngine = Generate | Embed | Cancel | Ping
FromEngine = Refused | Given | Opened | Measured | Pong

_encoder = msgspec.msgpack.Encoder()
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode


def frame(message: ToEngine | FromEngine) -> bytes:
    """A message as bytes of the stream."""
    data = _encoder.encode(message)
    return len(data).to_bytes(_HEAD, "big") + data


class Frames:
    """Bytes of a stream, cut into messages."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The messages that these bytes complete.

        Raises:
            ValueError: a length that no message has.
        """
        self._held += data
        start = 0
        while len(self._held) - start >= _HEAD:
            length = int.from_bytes(self._held[start : start + _HEAD], "big")
            if length > MOST_BYTES:
                raise ValueError(f"a message of {length} bytes")
            if len(self._held) - start - _HEAD < length:
                break
            yield bytes(self._held[start + _HEAD : start + _HEAD + length])
            start += _HEAD + length
        del self._held[:start]
