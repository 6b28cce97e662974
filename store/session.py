"""One control connection to a store node for blocking callers: what `StoreClient` is to an event loop.

A call is a request and its answer, one after the other; threads take turns. After an error the connection is no more, and
the next call makes a new one.
"""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

from mooncake.core.errors import (
    AuthError,
    BadArgument,
    DeadlineExceeded,
    HandleLost,
    ProtocolError,
    StoreError,
    StoreUnavailable,
)
from mooncake.store import wire
from mooncake.store.events import Request, fault_of
from mooncake.store.exchange import Exchange
from mooncake.store.handles import Link
from mooncake.store.links import open_link
from mooncake.store.operations import DEADLINE_S
from mooncake.store.wakeful import Patience
from mooncake.transport.frames import Frame, FrameReader
from mooncake.transport.sockets import connect, has_ended, limit_time
from mooncake.transport.tcp import TIMEOUT_S, parse_address

_READ_BYTES = 1 << 18
_TIMED_OUT = (errno.EAGAIN, errno.EWOULDBLOCK, errno.ETIMEDOUT)
_RETRY_S = 0.2
"""After a failed attempt to connect: callers that ask again at once must not make a storm of it."""


class _Connection:
    def __init__(self, stream: socket.socket, link: Link, welcome: wire.Welcome) -> None:
        self.stream = stream
        self.link = link
        self.welcome = welcome
        self.exchange = Exchange()
        self.posted: dict[int, Any] = {}
        """Answers that nobody has collected yet, None for those that did not come."""
        self.deadline_s = 0.0

    def limit(self, seconds: float) -> None:
        """A system call that is saved if nothing changes."""
        if seconds != self.deadline_s:
            limit_time(self.stream, seconds)
            self.deadline_s = seconds


class NodeSession:
    """addresses: of one node. node: the name it must have, if given. stall_s: how long data sockets may be without progress."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        token: str,
        name: str,
        tenant: str = "",
        node: str = "",
        stall_s: float = TIMEOUT_S,
    ) -> None:
        if not addresses:
            raise BadArgument("addresses: at least one is needed")
        self.addresses = tuple(sorted(addresses, key=lambda address: not address.startswith("unix:")))
        self._hello = wire.Hello(wire.VERSION, token, name, tenant, minor=wire.MINOR)
        self._node = node
        self._stall_s = stall_s
        self._lock = threading.Lock()
        self._connection: _Connection | None = None
        self._failed_at = 0.0
        self._failure = ""
        self._closed = False
        self._buffer = bytearray(_READ_BYTES)
        self._patience = Patience()

    def link(self, deadline_s: float = DEADLINE_S) -> Link:
        """Raises AuthError, StoreUnavailable or DeadlineExceeded."""
        connection = self._connection
        if connection is not None:
            return connection.link
        with self._lock:
            return self._connected(deadline_s).link

    def call(self, request: Request, deadline_s: float = DEADLINE_S, *, link: Link | None = None) -> Any:
        """The results. link: of the claims that the request speaks of. Raises BadArgument, StoreUnavailable, DeadlineExceeded,
        or HandleLost where that link is gone."""
        return self.claim(request, deadline_s, link=link)[0]

    def claim(self, request: Request, deadline_s: float = DEADLINE_S, *, link: Link | None = None) -> tuple[Any, Link]:
        """As call, with the link of the claims that the results may be."""
        with self._lock:
            connection = self._checked(request, deadline_s, link)
            number, data = connection.exchange.ask(request)
            return self._answer(connection, number, data, deadline_s), connection.link

    def post(self, request: Request, link: Link, deadline_s: float = DEADLINE_S) -> int:
        """Ask without waiting: the answer is taken by this number with `collect`, unless the
        connection ends before. Raises as call."""
        with self._lock:
            connection = self._checked(request, deadline_s, link)
            number, data = connection.exchange.ask(request)
            try:
                connection.limit(deadline_s)
                connection.stream.sendall(data)
            except OSError as error:
                self._lose(connection, str(error))
                raise StoreUnavailable(f"the connection broke: {error}") from error
            connection.posted[number] = None
            return number

    def collect(self, number: int, link: Link, deadline_s: float = DEADLINE_S) -> Any:
        """The results of what was posted; most often they are there. Raises as call."""
        with self._lock:
            connection = self._connection
            if connection is None or connection.link is not link:
                raise HandleLost("the claim went with its connection")
            outcome = connection.posted.pop(number)
            if outcome is None:
                return self._answer(connection, number, b"", deadline_s)
            if isinstance(outcome, StoreError):
                raise outcome
            return outcome

    def welcome(self, deadline_s: float = DEADLINE_S) -> wire.Welcome:
        connection = self._connection
        if connection is not None:
            return connection.welcome
        with self._lock:
            return self._connected(deadline_s).welcome

    def node_name(self, deadline_s: float = DEADLINE_S) -> str:
        return self.welcome(deadline_s).node

    def sync(self, deadline_s: float = DEADLINE_S) -> None:
        """Returns when the directory knows all that was committed until now. Raises as call."""
        with self._lock:
            connection = self._connected(deadline_s)
            number, data = connection.exchange.sync()
            self._answer(connection, number, data, deadline_s)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._connection is not None:
                self._lose(self._connection, "closed", release=True)

    # ------------------------------------------------------------ one exchange

    def _checked(self, request: Request, deadline_s: float, link: Link | None) -> _Connection:
        """The connection to send it on."""
        if self._connection is not None and has_ended(self._connection.stream):
            self._lose(self._connection, "the node closed the connection")
        connection = self._connected(deadline_s)
        if link is not None and link is not connection.link:
            raise HandleLost("the claim went with its connection")
        fault = fault_of(request, connection.welcome.capacity)
        if fault is not None:
            raise BadArgument(fault)
        return connection

    def _answer(self, connection: _Connection, number: int, data: bytes, deadline_s: float) -> Any:
        until = time.monotonic() + deadline_s
        connection.limit(deadline_s)
        stream, exchange, view = connection.stream, connection.exchange, memoryview(self._buffer)
        try:
            if data:
                stream.sendall(data)
            while True:
                num_bytes = _receive_soon(stream, view, self._patience)
                if not num_bytes:
                    raise StoreUnavailable("the node closed the connection")
                answers, undoing = exchange.receive(bytes(view[:num_bytes]))
                if undoing:
                    stream.sendall(undoing)
                found = dict(answers)
                for posted in found.keys() & connection.posted.keys():
                    connection.posted[posted] = found[posted]
                if number in found:
                    outcome = found[number]
                    if isinstance(outcome, StoreError):
                        raise outcome
                    return outcome
                if time.monotonic() > until:
                    raise TimeoutError
        except OSError as error:
            if isinstance(error, TimeoutError) or error.errno in _TIMED_OUT:
                exchange.abandon(number)
                raise DeadlineExceeded(f"no answer in {deadline_s} s") from None
            self._lose(connection, str(error))
            raise StoreUnavailable(f"the connection broke: {error}") from error
        except (StoreUnavailable, ProtocolError) as error:
            self._lose(connection, str(error))
            raise

    def _lose(self, connection: _Connection, why: str, *, release: bool = False) -> None:
        """Data calls that run go on: the node sees the end when the socket is closed, so that waits for them."""
        self._connection = None
        link = connection.link
        link.lose(why)
        until = time.monotonic() + DEADLINE_S
        while not link.idle() and time.monotonic() < until:
            time.sleep(0.001)
        link.close(release=release)
        connection.stream.close()

    # ------------------------------------------------------------ connecting

    def _connected(self, deadline_s: float) -> _Connection:
        if self._connection is not None:
            return self._connection
        if self._closed:
            raise StoreUnavailable("the client is closed")
        now = time.monotonic()
        if self._failure and now < self._failed_at + _RETRY_S:
            raise StoreUnavailable(self._failure)
        failures = []
        for address in self.addresses:
            try:
                self._connection = self._connect_to(address, deadline_s)
                self._failure = ""
                return self._connection
            except AuthError:
                raise
            except (StoreError, OSError) as error:
                failures.append(f"{address}: {error}")
        self._failed_at, self._failure = now, f"no address leads to the store node: {'; '.join(failures)}"
        raise StoreUnavailable(self._failure)

    def _connect_to(self, address: str, deadline_s: float) -> _Connection:
        stream = connect(*parse_address(address), deadline_s)
        try:
            stream.sendall(wire.encode_hello(self._hello))
            frame = _first_frame(stream)
            if wire.is_error(frame):
                raise wire.decode_error(frame)
            welcome = wire.decode_welcome(frame)
            if self._node and welcome.node != self._node:
                raise StoreUnavailable(f"is node {welcome.node}, not {self._node}")
            link = open_link(address, self._hello, welcome, self._stall_s)
            connection = _Connection(stream, link, welcome)
        except BaseException:
            stream.close()
            raise
        if connection.link.local is not None:
            number, data = connection.exchange.attach(connection.link.local.table.path)
            self._answer(connection, number, data, deadline_s)
        return connection


def _receive_soon(stream: socket.socket, view: memoryview, patience: Patience) -> int:
    """As `recv_into`. Most answers come before this thread could sleep and be woken, so it looks for a while first."""
    patience.start()
    while patience.lasts():
        try:
            return stream.recv_into(view, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            continue
    return stream.recv_into(view)


def _first_frame(stream: socket.socket) -> Frame:
    reader = FrameReader(wire.MAX_HELLO_BYTES)
    while True:
        data = stream.recv(4096)
        if not data:
            raise StoreUnavailable("the node closed the connection")
        frames = reader.feed(data)
        if frames:
            return frames[0]
