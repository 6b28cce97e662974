"""Event logs: what a live core was told, when, and what it answered.

A log is a file of frames, each a 4-byte little-endian length and that many bytes of msgpack: first a header (`LogHeader`), then
one `LogEntry` per event. Replaying the events through a core built from the same header must give the same command bytes
(`mooncake.sim.replay_log`); so an incident becomes a test file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

import msgspec

LOG_VERSION = 1
MAX_FRAME_BYTES = 256 << 20
_LENGTH = struct.Struct("<I")


class LogHeader(msgspec.Struct, frozen=True):
    """core: which core it was; seed and settings: what it was built from."""

    version: int
    core: str
    seed: int
    settings: dict[str, Any]


class LogEntry(msgspec.Struct, frozen=True, array_like=True):
    """answers: what the core was told by those it asked during the event (`mooncake.store.readers`)."""

    now: int
    event: msgspec.Raw
    commands: bytes
    answers: tuple[tuple[int, tuple[int, ...]], ...] = ()


def encode_commands(commands: list[Any]) -> bytes:
    """The canonical bytes of a list of commands; two lists are the same if and only if their bytes are."""
    return msgspec.msgpack.encode([(type(command).__name__, command) for command in commands])


class EventLogWriter:
    """Appends to a file that it owns, which should be unbuffered: what a process did just before it was killed is what its log
    is wanted for. Not for several threads."""

    def __init__(self, file: BinaryIO, core: str, seed: int, settings: Any) -> None:
        self._file = file
        self._write(LogHeader(LOG_VERSION, core, seed, msgspec.to_builtins(settings)))

    def append(
        self, now: int, event: Any, commands: list[Any], answers: tuple[tuple[int, tuple[int, ...]], ...] = ()
    ) -> None:
        self._write(LogEntry(now, msgspec.Raw(msgspec.msgpack.encode(event)), encode_commands(commands), answers))

    def close(self) -> None:
        self._file.close()

    def _write(self, frame: LogHeader | LogEntry) -> None:
        data = msgspec.msgpack.encode(frame)
        self._file.write(_LENGTH.pack(len(data)) + data)


def read_log(file: BinaryIO) -> tuple[LogHeader, Iterator[LogEntry]]:
    """Raises ValueError for a file that is no log; a torn last frame, as a killed process leaves it, ends the entries."""
    try:
        header = msgspec.msgpack.decode(_next_frame(file) or b"", type=LogHeader)
    except ValueError as error:
        raise ValueError(f"not an event log: {error}") from None
    if header.version != LOG_VERSION:
        raise ValueError(f"event log has version {header.version}, this program reads {LOG_VERSION}")
    return header, _entries(file)


def _entries(file: BinaryIO) -> Iterator[LogEntry]:
    while (data := _next_frame(file)) is not None:
        yield msgspec.msgpack.decode(data, type=LogEntry)


def _next_frame(file: BinaryIO) -> bytes | None:
    head = file.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes")
    data = file.read(length)
    return data if len(data) == length else None
