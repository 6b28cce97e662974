"""Regions over stream sockets: the serving end, a thread for each data connection.

Threads, because a blocking call straight from and into the region is as fast as the socket; an event loop takes a tenth or
more of that (FACTS 6). Every piece is checked before a byte is touched. While a batch runs, its claims must not be given up:
whoever is about to do so asks `uses`, ends the connection with `abort`, and waits for `on_end`.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
import time
from collections.abc import Callable, Collection

from mooncake.core.errors import PathLost
from mooncake.transport.frames import HEADER, MAX_PIECES, MAX_TRANSFER_BYTES, PIECE, ErrorCode, Kind, pack, pack_error
from mooncake.transport.sockets import limit_time, receive, send

TIMEOUT_S = 10.0
"""Without progress in the middle of a batch. Between batches a peer may be silent for ever."""
_LINGER_S = 1.0

Pieces = list[tuple[int, int, int]]
"""claim, offset, size"""
Allows = Callable[[int, int, int, bool], bool]
"""claim, offset, size, write -> whether this peer may. Called in the connection's thread."""


class _Refused(Exception):
    """The peer asks for what it may not have, or speaks no protocol of ours; it is told, and then the connection ends."""

    def __init__(self, code: ErrorCode, detail: str) -> None:
        super().__init__(detail)
        self.code = code


class RangeServer:
    """stream: of a peer that was authenticated before; it is ours from now on. on_end: called in its thread, last."""

    def __init__(
        self, stream: socket.socket, buffer: memoryview, allows: Allows, on_end: Callable[[RangeServer], None]
    ) -> None:
        self.bytes_read = 0
        self.bytes_written = 0
        self.read_ns = 0
        self.write_ns = 0
        self._stream = stream
        self._buffer = buffer
        self._allows = allows
        self._on_end = on_end
        self._claims: Collection[int] = ()
        self._header = memoryview(bytearray(HEADER.size))
        self._thread = threading.Thread(target=self._run, name="range-server", daemon=True)

    def start(self) -> None:
        """Tells the peer that it may begin."""
        self._thread.start()

    def abort(self) -> None:
        """The thread ends as soon as the call that it is in returns; this one does not wait for it."""
        with contextlib.suppress(OSError):  # it has ended
            self._stream.shutdown(socket.SHUT_RDWR)

    def uses(self, claims: Collection[int]) -> bool:
        """Whether a batch under way relies on one of these."""
        return bool(self._claims) and not set(self._claims).isdisjoint(claims)

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            self._stream.setblocking(True)
            limit_time(self._stream, TIMEOUT_S)
            self._stream.sendall(pack(Kind.OK))
            while self._await_request():
                self._serve()
        except _Refused as error:
            self._tell(pack_error(error.code, str(error)))
        except (OSError, PathLost):
            pass  # the peer is gone, or does not move
        finally:
            self._claims = ()
            self._stream.close()
            self._on_end(self)

    def _await_request(self) -> bool:
        """Whether there is one; False when the peer has closed."""
        while True:
            try:
                num_bytes = self._stream.recv_into(self._header, 1)
            except OSError as error:
                if error.errno != errno.EAGAIN:
                    raise
                continue
            if num_bytes:
                receive(self._stream, [self._header[num_bytes:]])
            return num_bytes > 0

    def _serve(self) -> None:
        kind, _, count, _, length = HEADER.unpack(self._header)
        writing = kind == Kind.WRITE
        table_bytes = count * PIECE.size
        fits = length <= table_bytes + MAX_TRANSFER_BYTES if writing else length == table_bytes
        if kind not in (Kind.READ, Kind.WRITE) or not 0 < count <= MAX_PIECES or length < table_bytes or not fits:
            raise _Refused(ErrorCode.PROTOCOL, f"bad data frame: kind {kind}, {count} pieces, {length} bytes")
        table = bytearray(table_bytes)
        receive(self._stream, [memoryview(table)])
        pieces: Pieces = list(PIECE.iter_unpack(table))
        total = sum([size for _, _, size in pieces])
        if writing and total + table_bytes != length:
            raise _Refused(ErrorCode.PROTOCOL, f"{length - table_bytes} bytes for pieces of {total}")
        self._claims = [claim for claim, _, _ in pieces]
        detail = self._refusal(pieces, writing)
        if detail and writing:  # its bytes are under way: there is no next request to find behind them
            raise _Refused(ErrorCode.BAD_ARGUMENT, detail)
        if detail:
            self._stream.sendall(pack_error(ErrorCode.BAD_ARGUMENT, detail))
        else:
            self._move(pieces, total, writing)
        self._claims = ()

    def _refusal(self, pieces: Pieces, writing: bool) -> str:
        for claim, offset, size in pieces:
            if size == 0 or not self._allows(claim, offset, size, writing):
                return f"no claim {claim} on [{offset}, {offset + size}) to {'write' if writing else 'read'}"
        return ""

    def _move(self, pieces: Pieces, total: int, writing: bool) -> None:
        ranges = [self._buffer[offset : offset + size] for _, offset, size in pieces]
        began = time.monotonic_ns()
        if writing:
            receive(self._stream, ranges)
            self.bytes_written += total
            self.write_ns += time.monotonic_ns() - began
            self._claims = ()  # what the peer says when it has our answer is to find it so
            self._stream.sendall(pack(Kind.OK))
        else:
            send(self._stream, [HEADER.pack(Kind.OK, 0, 0, 0, total), *ranges])
            self.bytes_read += total
            self.read_ns += time.monotonic_ns() - began

    def _tell(self, data: bytes) -> None:
        """And let it reach the peer: what it has sent and we did not read would make the kernel cut the connection."""
        with contextlib.suppress(OSError):
            self._stream.sendall(data)
            self._stream.shutdown(socket.SHUT_WR)
            scratch = bytearray(1 << 16)
            limit_time(self._stream, _LINGER_S)
            while self._stream.recv_into(scratch):
                pass
