"""Regions over stream sockets, TCP or Unix.

The peer's end blocks, in the caller's thread, on a few pooled sockets: straight from and into the caller's buffers. The
serving end runs on the owner's event loop, straight from and into the registered buffer, one batch at a time per
connection; it checks every piece before it touches a byte, and again when `recheck` says that claims may have ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import cast

from mooncake.core.errors import BadArgument, OutOfRange, PathLost, TransferTimeout
from mooncake.transport.base import DONE, Completion, Piece, Region
from mooncake.transport.frames import (
    HEADER,
    MAX_PIECES,
    MAX_TRANSFER_BYTES,
    PIECE,
    ErrorCode,
    Kind,
    pack,
    pack_error,
)

MAX_STREAMS = 4
"""Sockets per path. Two saturate loopback, a few a fast network; each costs the node a connection."""
TIMEOUT_S = 10.0
"""Without progress. A transfer that moves is not cut off."""
_CHUNK = 256 * 1024  # of one send on the serving side: bounds what the loop copies when the socket is full
_TIMED_OUT = (errno.EAGAIN, errno.EINPROGRESS, errno.ETIMEDOUT)
_MAX_ERROR_BYTES = 4096


def parse_address(address: str) -> tuple[int, str | tuple[str, int]]:
    """unix:/path or tcp://host:port, as socket family and address. Raises BadArgument."""
    if address.startswith("unix:") and len(address) > 5:
        return socket.AF_UNIX, address[5:]
    host, colon, port = address.removeprefix("tcp://").rpartition(":")
    if not address.startswith("tcp://") or not host or not colon or not port.isdigit():
        raise BadArgument(f"address: must be unix:/path or tcp://host:port, got {address!r}")
    host = host.strip("[]")
    return (socket.AF_INET6 if ":" in host else socket.AF_INET), (host, int(port))


class TcpPath:
    """greeting: the frame that makes the serving side accept a data connection; it answers OK or ERROR."""

    def __init__(
        self, region: Region, greeting: bytes, *, timeout_s: float = TIMEOUT_S, max_streams: int = MAX_STREAMS
    ) -> None:
        self.region = region
        self._target = parse_address(region.handle)
        self._greeting = greeting
        self._timeout = struct.pack("@ll", int(timeout_s), int(timeout_s % 1 * 1e6))
        self._slots = threading.BoundedSemaphore(max_streams)
        self._idle: list[socket.socket] = []
        self._closed = False

    def read(self, pieces: Sequence[Piece]) -> Completion:
        for batch in _batches(pieces):
            with self._stream(Kind.READ) as stream:
                stream.sendall(_request(Kind.READ, batch))
                _expect_ok(stream, sum(piece.local.nbytes for piece in batch))
                for piece in batch:
                    _receive(stream, piece.local)
        return DONE

    def write(self, pieces: Sequence[Piece]) -> Completion:
        for batch in _batches(pieces):
            with self._stream(Kind.WRITE) as stream:
                stream.sendall(_request(Kind.WRITE, batch))
                for piece in batch:
                    stream.sendall(piece.local)
                _expect_ok(stream, 0)
        return DONE

    def view(self, offset: int, size: int) -> memoryview | None:
        return None

    def close(self) -> None:
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    @contextlib.contextmanager
    def _stream(self, kind: Kind) -> Iterator[socket.socket]:
        """A socket for one batch. Whatever goes wrong in the middle, the stream is out of step and is closed, except
        after a refused read: then the serving side is ready for the next."""
        with self._slots:
            try:
                stream = self._idle.pop()
            except IndexError:
                stream = self._open()
            try:
                yield stream
            except OutOfRange:
                if kind is Kind.READ:
                    self._put_back(stream)
                else:
                    stream.close()
                raise
            except OSError as error:
                stream.close()
                if error.errno in _TIMED_OUT:
                    raise TransferTimeout(f"{self.region.handle}: no progress in time") from error
                raise PathLost(f"{self.region.handle}: {error}") from error
            except BaseException:
                stream.close()
                raise
            self._put_back(stream)

    def _put_back(self, stream: socket.socket) -> None:
        if self._closed:
            stream.close()
        else:
            self._idle.append(stream)

    def _open(self) -> socket.socket:
        family, target = self._target
        stream = socket.socket(family, socket.SOCK_STREAM)
        try:
            # Kernel time limits on a blocking socket: Python's own would add a poll to every call.
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                stream.setsockopt(socket.SOL_SOCKET, option, self._timeout)
            if family != socket.AF_UNIX:
                stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stream.connect(target)
            stream.sendall(self._greeting)
            _expect_ok(stream, 0)
        except (OSError, OutOfRange) as error:
            stream.close()
            raise PathLost(f"{self.region.handle}: {error}") from error
        except PathLost:
            stream.close()
            raise
        return stream


def _batches(pieces: Sequence[Piece]) -> Iterator[Sequence[Piece]]:
    for start in range(0, len(pieces), MAX_PIECES):
        yield pieces[start : start + MAX_PIECES]


def _request(kind: Kind, pieces: Sequence[Piece]) -> bytes:
    table = b"".join(PIECE.pack(claim, offset, local.nbytes) for offset, local, claim in pieces)
    length = len(table) + (sum(piece.local.nbytes for piece in pieces) if kind is Kind.WRITE else 0)
    return HEADER.pack(kind, 0, len(pieces), 0, length) + table


def _receive(stream: socket.socket, out: memoryview) -> None:
    while out.nbytes:
        num = stream.recv_into(out, 0, socket.MSG_WAITALL)
        if num == 0:
            raise PathLost("the peer closed the connection")
        out = out[num:]


def _expect_ok(stream: socket.socket, length: int) -> None:
    header = bytearray(HEADER.size)
    _receive(stream, memoryview(header))
    kind, _, code, _, actual = HEADER.unpack(header)
    if kind == Kind.ERROR and actual <= _MAX_ERROR_BYTES:
        detail = bytearray(actual)
        _receive(stream, memoryview(detail))
        error = OutOfRange if code == ErrorCode.BAD_ARGUMENT else PathLost
        raise error(detail.decode(errors="replace"))
    if kind != Kind.OK or actual != length:
        raise PathLost(f"the peer answered kind {kind} with {actual} bytes where {length} were due")


Allows = Callable[[int, int, int, bool], bool]
"""claim, offset, size, write -> whether this peer may."""


class RangeServer(asyncio.BufferedProtocol):
    """Serves one data connection. The peer was authenticated before: whoever did that calls `connection_made`.

    Each state knows the exact bytes it waits for (`_fill`) and what comes then, so that no byte is copied twice and
    none of the next request is read early."""

    def __init__(self, buffer: memoryview, allows: Allows, on_lost: Callable[[RangeServer], None]) -> None:
        self.bytes_read = 0
        self.bytes_written = 0
        self._buffer = buffer
        self._allows = allows
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._header = memoryview(bytearray(HEADER.size))
        self._table = memoryview(b"")
        self._active: list[tuple[int, int, int]] = []  # claim, offset, size of the batch under way
        self._writing = False
        self._length = 0
        self._todo: list[tuple[int, int]] = []  # offset and size of what is left of it, last first
        self._blocked = False
        self._fill, self._then = self._header, self._on_header

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are not subclasses of it
        self._transport.set_write_buffer_limits(high=0)

    def connection_lost(self, exc: Exception | None) -> None:
        self._todo, self._active = [], []
        self._on_lost(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._fill

    def buffer_updated(self, nbytes: int) -> None:
        self._fill = self._fill[nbytes:]
        if not self._fill.nbytes:
            self._then()

    def pause_writing(self) -> None:
        self._blocked = True

    def resume_writing(self) -> None:
        self._blocked = False
        if not self._writing:
            self._pump()

    def recheck(self) -> None:
        """Claims may have ended: break off a batch that has lost its own, before the space is given to someone else."""
        if not all(self._allows(*piece, self._writing) for piece in self._active):
            self.abort()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()
        self._todo, self._active = [], []

    def _send(self, data: bytes | memoryview) -> None:
        assert self._transport is not None
        self._transport.write(data)

    def _on_header(self) -> None:
        kind, _, count, _, length = HEADER.unpack(self._header)
        self._writing = kind == Kind.WRITE
        least = count * PIECE.size
        fits = length <= least + MAX_TRANSFER_BYTES if self._writing else length == least
        if kind not in (Kind.READ, Kind.WRITE) or not 0 < count <= MAX_PIECES or length < least or not fits:
            self._fail(ErrorCode.PROTOCOL, f"bad data frame: kind {kind}, {count} pieces, {length} bytes")
            return
        self._length = length
        self._table = memoryview(bytearray(least))
        self._fill, self._then = self._table, self._on_table

    def _on_table(self) -> None:
        pieces = list(PIECE.iter_unpack(self._table))
        total = sum(size for _, _, size in pieces)
        if self._writing and total + self._table.nbytes != self._length:
            self._fail(ErrorCode.PROTOCOL, f"{self._length - self._table.nbytes} bytes for pieces of {total}")
            return
        for claim, offset, size in pieces:
            if size == 0 or not self._allows(claim, offset, size, self._writing):
                self._refuse(
                    f"no claim {claim} on [{offset}, {offset + size}) to {'write' if self._writing else 'read'}"
                )
                return
        self._active = pieces
        self._todo = [(offset, size) for _, offset, size in reversed(pieces)]
        if self._writing:
            self._receive_next()
        else:
            assert self._transport is not None
            self._transport.pause_reading()
            self._send(HEADER.pack(Kind.OK, 0, 0, 0, total))
            self._pump()

    def _receive_next(self) -> None:
        if self._todo:
            offset, size = self._todo.pop()
            self.bytes_written += size
            self._fill, self._then = self._buffer[offset : offset + size], self._receive_next
            return
        self._await_next_request()
        self._send(pack(Kind.OK))

    def _pump(self) -> None:
        """Send what is left of a read until the socket is full; `resume_writing` goes on."""
        while self._todo and not self._blocked:
            offset, size = self._todo.pop()
            num = min(size, _CHUNK)
            if num < size:
                self._todo.append((offset + num, size - num))
            self.bytes_read += num
            self._send(self._buffer[offset : offset + num])
        if (
            self._active and not self._todo and not self._blocked
        ):  # still blocked: the last chunk is not sent, only queued
            self._await_next_request()
            assert self._transport is not None
            self._transport.resume_reading()

    def _await_next_request(self) -> None:
        self._active = []
        self._fill, self._then = self._header, self._on_header

    def _refuse(self, detail: str) -> None:
        if self._writing:  # its bytes are under way: there is no next request to find behind them
            self._fail(ErrorCode.BAD_ARGUMENT, detail)
        else:
            self._await_next_request()
            self._send(pack_error(ErrorCode.BAD_ARGUMENT, detail))

    def _fail(self, code: ErrorCode, detail: str) -> None:
        assert self._transport is not None
        self._send(pack_error(code, detail))
        self._fill, self._then = self._header, self._ignore
        self._transport.close()

    def _ignore(self) -> None:
        self._fill = self._header
