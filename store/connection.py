"""The serving end of a store node's connections.

A connection's first frame is HELLO. Without a session it is a client's control connection, whose end is that client's
end; with the session's secret it is one of its data connections, handed over to a RangeServer.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections import deque
from typing import TYPE_CHECKING, cast

from mooncake.core.errors import AuthError, ProtocolError, StoreError, StoreUnavailable
from mooncake.store import wire
from mooncake.store.events import Cancel, Commit, Release, Request
from mooncake.transport.frames import Frame, FrameReader, Kind, pack
from mooncake.transport.ranges import RangeServer

if TYPE_CHECKING:
    from mooncake.store.node import StoreNode

HELLO_TIMEOUT_S = 5.0
TRANSFER_END_S = 1.0
"""How long a claim may still be in use by a transfer when it is given up. A peer can have the last byte of a read before our
thread is back from sending it; one that takes longer has not waited for the end."""
_POLL_S = 0.001
MAX_CONNECTIONS = 1024
"""Of a node, data connections apart."""


class Connection(asyncio.Protocol):
    """data: of a control connection, its data connections. minor: version of the client (`wire.Hello`)."""

    def __init__(self, node: StoreNode) -> None:
        self.client = 0
        self.session = b""
        self.minor = 0
        self.data: list[RangeServer] = []
        self._node = node
        self._loop = asyncio.get_running_loop()
        self._reader = FrameReader(wire.MAX_HELLO_BYTES)
        self._requests: deque[Request] = deque()
        self._waits_since: float | None = None
        """When the first of them was put off."""
        self._transport: asyncio.Transport | None = None
        self._hello_timer: asyncio.TimerHandle | None = None
        self._ended = False
        self._lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are not subclasses of it
        self._node.connections.add(self)
        self._hello_timer = self._loop.call_later(HELLO_TIMEOUT_S, self._hello_late)
        if len(self._node.connections) > MAX_CONNECTIONS:
            self._fail(StoreUnavailable(f"the node serves at most {MAX_CONNECTIONS} connections"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Claims are freed when nobody uses them any more: data connections are cut, and their ends waited for."""
        self._ended = self._lost = True
        self._stop_hello_timer()
        if self.client:
            self._node.refuse_data(self)
        for server in self.data:
            server.abort()
        if not self.data:
            self._node.gone(self)

    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        self._node.wakeful.stir()
        try:
            for frame in self._reader.feed(data):
                if not self.client:
                    self._on_hello(frame)
                elif frame.kind == wire.Op.ATTACH:
                    self._on_attach(frame)
                elif frame.kind == wire.Op.SYNC:
                    self._node.sync(self, frame.request)
                else:
                    self._requests.append(wire.decode_request(self.client, frame))
            if self._waits_since is None:
                self._go_on()
        except StoreError as error:
            self._fail(error)

    def pause_writing(self) -> None:
        """The client does not read its answers: it gets no more until it does."""
        assert self._transport is not None
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        assert self._transport is not None
        if self._waits_since is None:
            self._transport.resume_reading()

    def reply(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(data)

    def abort(self) -> None:
        assert self._transport is not None
        self._transport.abort()

    # ------------------------------------------------------------ frames

    def _go_on(self) -> None:
        """Handle what was asked, in order, as long as no transfer relies on what it gives up."""
        assert self._transport is not None
        while self._requests and not self._ended:
            if self.data and self._in_use(self._requests[0]):
                self._wait()
                return
            self._node.handle(self._requests.popleft())
        if self._waits_since is not None:
            self._waits_since = None
            self._transport.resume_reading()

    def _in_use(self, request: Request) -> bool:
        numbers = request.numbers if isinstance(request, Commit | Cancel | Release) else ()
        return any(server.uses(numbers) for server in self.data)

    def _wait(self) -> None:
        assert self._transport is not None
        now = self._loop.time()
        if self._waits_since is None:
            self._waits_since = now
            self._transport.pause_reading()
        if now - self._waits_since > TRANSFER_END_S:
            self._fail(ProtocolError("numbers: a transfer under way relies on one of these claims"))
        else:
            self._loop.call_later(_POLL_S, self._go_on)

    def _on_attach(self, frame: Frame) -> None:
        try:
            self._node.attach(frame.payload.decode(errors="replace"))
        except StoreError as error:
            self.reply(wire.encode_error(error, frame.request))
        else:
            self.reply(pack(Kind.OK, request=frame.request))

    def _on_hello(self, frame: Frame) -> None:
        if self._ended or self._transport is None:
            return
        hello = wire.decode_hello(frame)
        owner = self._node.admit(self, hello)
        self._stop_hello_timer()
        if owner is not None:
            self._become_data(owner)
            return
        self._reader.max_bytes = wire.MAX_CONTROL_BYTES
        self.reply(wire.encode_welcome(self._node.welcome(self)))

    def _become_data(self, owner: Connection) -> None:
        """A thread gets the socket; nothing of what the peer says next has been read, as it waits for our OK."""
        node, transport = self._node, self._transport
        assert node.segment is not None and transport is not None
        transport.pause_reading()
        stream = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
        transport.abort()  # closes the other descriptor only

        def allows(number: int, offset: int, size: int, write: bool) -> bool:
            return node.allows(owner.client, number, offset, size, write)

        def on_end(server: RangeServer) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the node with it
                self._loop.call_soon_threadsafe(owner.data_ended, server)

        server = RangeServer(stream, node.segment.buffer, allows, on_end)
        owner.data.append(server)
        server.start()

    def data_ended(self, server: RangeServer) -> None:
        self.data.remove(server)
        self._node.data_ended(server)
        if self._lost and not self.data:
            self._node.gone(self)

    # ------------------------------------------------------------ ends

    def _fail(self, error: StoreError) -> None:
        """Say why, and end. A client on this machine may have the segment mapped and a copy running: its claims are
        freed when it closes its end, so ours is only half closed."""
        assert self._transport is not None
        self._ended = True
        self._node.count("auth_errors" if isinstance(error, AuthError) else "protocol_errors")
        self._transport.write(wire.encode_error(error))
        if self.client and self._transport.get_extra_info("socket").family == socket.AF_UNIX:
            self._transport.write_eof()
        else:
            self._transport.close()

    def _hello_late(self) -> None:
        self._fail(ProtocolError(f"no HELLO in {HELLO_TIMEOUT_S} s"))

    def _stop_hello_timer(self) -> None:
        if self._hello_timer is not None:
            self._hello_timer.cancel()
            self._hello_timer = None
