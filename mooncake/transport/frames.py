"""Length-checked binary frames of the data connection, little-endian:

    kind u8 | flags u8 | count u16 | request u32 | length u64 | length bytes

Kinds below 32 belong to the room above (the store's control calls); a range server knows READ and WRITE only.
"""

from __future__ import annotations

import enum
import struct

import msgspec

from mooncake.core.errors import ProtocolError

HEADER = struct.Struct("<BBHIQ")
PIECE = struct.Struct("<QQQ")
"""claim, offset, size"""
MAX_PIECES = 4096
MAX_TRANSFER_BYTES = 1 << 34
"""Of one batch. Bounds a lying length; the bytes go straight into the segment, so they cost no memory."""


class Kind(enum.IntEnum):
    OK = 32
    ERROR = 33
    """count: an ErrorCode; payload: UTF-8 text for people."""
    READ = 34
    """count pieces; answered by OK with their bytes, or ERROR."""
    WRITE = 35
    """count pieces, then their bytes; answered by OK, or ERROR and the end of the connection."""


class ErrorCode(enum.IntEnum):
    PROTOCOL = 1
    AUTH = 2
    BAD_ARGUMENT = 3
    UNAVAILABLE = 4


class Frame(msgspec.Struct, frozen=True):
    kind: int
    flags: int
    count: int
    request: int
    payload: bytes


def pack(kind: int, payload: bytes = b"", *, flags: int = 0, count: int = 0, request: int = 0) -> bytes:
    return HEADER.pack(kind, flags, count, request, len(payload)) + payload


def pack_error(code: ErrorCode, detail: str, request: int = 0) -> bytes:
    return pack(Kind.ERROR, detail.encode()[:1024], count=code, request=request)


class FrameReader:
    """Cuts a stream of bytes into frames; holds at most one incomplete frame of `max_bytes`, which may be raised
    between calls."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """Raises ProtocolError on a frame that is longer than max_bytes, before its payload is awaited."""
        self._buffer += data
        frames: list[Frame] = []
        start = 0
        while len(self._buffer) - start >= HEADER.size:
            kind, flags, count, request, length = HEADER.unpack_from(self._buffer, start)
            if length > self.max_bytes:
                raise ProtocolError(f"frame of {length} bytes, the limit is {self.max_bytes}")
            end = start + HEADER.size + length
            if len(self._buffer) < end:
                break
            frames.append(Frame(kind, flags, count, request, bytes(self._buffer[start + HEADER.size : end])))
            start = end
        del self._buffer[:start]
        return frames
