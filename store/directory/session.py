"""Questions to the directory, for blocking callers. Threads take turns; after an error the next call connects anew."""

from __future__ import annotations

import errno
import itertools
import socket
import threading
from collections.abc import Sequence

from mooncake.core.errors import BadArgument, DeadlineExceeded, ProtocolError, StoreUnavailable
from mooncake.core.messages import NodeInfo
from mooncake.store.directory import wire
from mooncake.store.directory.core import Found
from mooncake.store.wire import decode_error, is_error
from mooncake.transport.frames import Frame, FrameReader, pack
from mooncake.transport.sockets import connect, has_ended, limit_time
from mooncake.transport.tcp import parse_address

_TIMED_OUT = (errno.EAGAIN, errno.EWOULDBLOCK, errno.ETIMEDOUT)


class DirectorySession:
    def __init__(self, addresses: Sequence[str], *, cluster: str, token: str, name: str) -> None:
        if not addresses:
            raise BadArgument("directory: at least one address is needed")
        self._addresses = tuple(addresses)
        self._hello = wire.Hello(wire.VERSION, cluster, token, name)
        self._lock = threading.Lock()
        self._stream: socket.socket | None = None
        self._reader = FrameReader(wire.MAX_FRAME_BYTES)
        self._numbers = itertools.count(1)

    def find(self, keys: Sequence[bytes], deadline_s: float) -> Found:
        """Raises StoreUnavailable, DeadlineExceeded or AuthError."""
        number = next(self._numbers) & 0xFFFFFFFF
        return wire.decode_found(self._ask(wire.encode_find(keys, number), number, deadline_s))

    def want(self, keys: Sequence[bytes], num_replicas: int, deadline_s: float) -> Found:
        """As find; from now on these are to have so many replicas."""
        number = next(self._numbers) & 0xFFFFFFFF
        return wire.decode_found(self._ask(wire.encode_want(keys, num_replicas, number), number, deadline_s))

    def nodes(self, deadline_s: float) -> list[NodeInfo]:
        number = next(self._numbers) & 0xFFFFFFFF
        return wire.decode_nodes(self._ask(pack(wire.Op.NODES, request=number), number, deadline_s))

    def close(self) -> None:
        with self._lock:
            self._drop()

    def _ask(self, data: bytes, number: int, deadline_s: float) -> Frame:
        with self._lock:
            if self._stream is not None and has_ended(self._stream):
                self._drop()  # the directory began anew, perhaps
            try:
                stream = self._connected(deadline_s)
                limit_time(stream, deadline_s)
                stream.sendall(data)
                frame = self._next_frame(stream)
                if is_error(frame):
                    raise decode_error(frame)
                if frame.request != number:
                    raise ProtocolError(f"answer to question {frame.request} instead of {number}")
                return frame
            except OSError as error:
                self._drop()
                if isinstance(error, TimeoutError) or error.errno in _TIMED_OUT:
                    raise DeadlineExceeded(f"the directory does not answer in {deadline_s} s") from None
                raise StoreUnavailable(f"the directory cannot be reached: {error}") from error
            except BaseException:
                self._drop()
                raise

    def _connected(self, deadline_s: float) -> socket.socket:
        if self._stream is not None:
            return self._stream
        failures = []
        for address in self._addresses:
            try:
                self._stream = self._connect_to(address, deadline_s)
                return self._stream
            except OSError as error:
                failures.append(f"{address}: {error}")
        raise StoreUnavailable(f"no address leads to the directory: {'; '.join(failures)}")

    def _connect_to(self, address: str, deadline_s: float) -> socket.socket:
        stream = connect(*parse_address(address), deadline_s)
        try:
            stream.sendall(wire.encode_hello(self._hello))
            self._reader = FrameReader(wire.MAX_FRAME_BYTES)
            frame = self._next_frame(stream)
            if is_error(frame):
                raise decode_error(frame)
            if frame.kind != wire.Op.READY:
                raise ProtocolError(f"kind {frame.kind} instead of READY")
        except BaseException:
            stream.close()
            raise
        return stream

    def _next_frame(self, stream: socket.socket) -> Frame:
        data = b""
        while True:
            frames = self._reader.feed(data)
            if frames:
                return frames[0]  # one question at a time: there is no second
            data = stream.recv(1 << 18)
            if not data:
                raise StoreUnavailable("the directory closed the connection")

    def _drop(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
