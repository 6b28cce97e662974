"""Regions over stream sockets, TCP or Unix: the peer's end.

It blocks, in the caller's thread, on a few pooled sockets: straight from and into the caller's buffers. The serving end is
`mooncake.transport.ranges`.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from collections.abc import Iterator, Sequence

from mooncake.core.errors import BadArgument, OutOfRange, PathLost, TransferTimeout
from mooncake.transport.base import DONE, Completion, Each, Piece, Region
from mooncake.transport.frames import HEADER, MAX_PIECES, PIECE, ErrorCode, Kind
from mooncake.transport.sockets import connect, receive, send

MAX_STREAMS = 4
"""Sockets per path. Two saturate loopback, a few a fast network; each costs the node a connection."""
TIMEOUT_S = 10.0
"""Without progress. A transfer that moves is not cut off."""
_GROUP_BYTES = 1 << 20
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
        self._timeout_s = timeout_s
        self._slots = threading.BoundedSemaphore(max_streams)
        self._idle: list[socket.socket] = []
        self._closed = False

    def read(self, pieces: Sequence[Piece], each: Each | None = None) -> Completion:
        for batch in _batches(pieces):
            with self._stream(Kind.READ) as stream:
                stream.sendall(_request(Kind.READ, batch))
                _expect_ok(stream, sum(piece.local.nbytes for piece in batch))
                for some in _groups(batch):
                    receive(stream, [piece.local for piece in some])
                    _call_each(each, some)
        return DONE

    def write(self, pieces: Sequence[Piece], each: Each | None = None) -> Completion:
        for batch in _batches(pieces):
            with self._stream(Kind.WRITE) as stream:
                stream.sendall(_request(Kind.WRITE, batch))
                for some in _groups(batch):
                    send(stream, [piece.local for piece in some])
                    _call_each(each, some)
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
        try:
            stream = connect(*self._target, self._timeout_s)
        except OSError as error:
            raise PathLost(f"{self.region.handle}: {error}") from error
        try:
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


def _groups(pieces: Sequence[Piece]) -> Iterator[Sequence[Piece]]:
    """Of one system call each: what is done with one, is done while the socket's buffer moves the next."""
    first, num_bytes = 0, 0
    for at, piece in enumerate(pieces):
        num_bytes += piece.local.nbytes
        if num_bytes >= _GROUP_BYTES:
            yield pieces[first : at + 1]
            first, num_bytes = at + 1, 0
    if first < len(pieces):
        yield pieces[first:]


def _call_each(each: Each | None, pieces: Sequence[Piece]) -> None:
    if each is not None:
        for piece in pieces:
            each(piece)


def _request(kind: Kind, pieces: Sequence[Piece]) -> bytes:
    table = b"".join(PIECE.pack(claim, offset, local.nbytes) for offset, local, claim in pieces)
    length = len(table) + (sum(piece.local.nbytes for piece in pieces) if kind is Kind.WRITE else 0)
    return HEADER.pack(kind, 0, len(pieces), 0, length) + table


def _expect_ok(stream: socket.socket, length: int) -> None:
    header = bytearray(HEADER.size)
    receive(stream, [memoryview(header)])
    kind, _, code, _, actual = HEADER.unpack(header)
    if kind == Kind.ERROR and actual <= _MAX_ERROR_BYTES:
        detail = bytearray(actual)
        receive(stream, [memoryview(detail)])
        error = OutOfRange if code == ErrorCode.BAD_ARGUMENT else PathLost
        raise error(detail.decode(errors="replace"))
    if kind != Kind.OK or actual != length:
        raise PathLost(f"the peer answered kind {kind} with {actual} bytes where {length} were due")
