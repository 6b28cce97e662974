"""The directory's shell: connections of nodes and clients, and a `DirectoryCore` that decides. A process of its own, or part
of another one."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import logging
import os
from collections.abc import Sequence
from typing import cast

from mooncake.config import Config, RoleConfig
from mooncake.core.clock import monotonic
from mooncake.core.errors import AuthError, ConfigError, ProtocolError, StoreError, StoreUnavailable
from mooncake.metrics import Registry
from mooncake.rpc.driver import CoreDriver
from mooncake.status import Status
from mooncake.store.directory import wire
from mooncake.store.directory.core import (
    Copy,
    DirectoryCommand,
    DirectoryConfig,
    DirectoryCore,
    DirectoryEvent,
    Elsewhere,
    Found,
    Gone,
    Registered,
    Snapshot,
    Tick,
    Uses,
)
from mooncake.store.instruments import instrument_directory
from mooncake.store.wire import encode_error
from mooncake.transport.frames import Frame, FrameReader, pack
from mooncake.transport.tcp import parse_address

log = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 5.0
MAX_CONNECTIONS = 4096
SILENT_S = 10.0
"""A node that says nothing for so long, not even that it lives, is gone."""


async def run(config: Config, role: RoleConfig, status: Status, registry: Registry) -> None:
    """Until cancelled."""
    server = DirectoryServer(config.cluster, config.token, role.listen.split(","), DirectoryConfig())
    instrument_directory(registry, server.core)
    try:
        await server.start()
    except StoreError as error:
        raise ConfigError(str(error)) from None
    try:
        status.ready(", ".join(server.addresses))
        await asyncio.Event().wait()
    finally:
        await server.close()


class DirectoryServer:
    """addresses: where it listens, unix:/path or tcp://host:port, port 0 for any free one; real ones after `start`."""

    def __init__(self, cluster: str, token: str, addresses: Sequence[str], config: DirectoryConfig) -> None:
        self.cluster = cluster
        self.token = token.encode()
        self.addresses = tuple(addresses)
        self.core = DirectoryCore(config, monotonic())
        self.connections: dict[int, _Connection] = {}
        self.numbers = itertools.count(1)
        self._servers: list[asyncio.Server] = []
        self._driver = CoreDriver(self.core, self._carry_out, Tick())

    async def start(self) -> None:
        """Raises StoreError if it cannot listen."""
        loop = asyncio.get_running_loop()
        addresses = []
        for address in self.addresses:
            _, target = parse_address(address)
            try:
                if isinstance(target, str):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(target)  # of a life before; one that lives holds the cluster's run folder
                    old_mask = os.umask(0o177)
                    try:
                        server: asyncio.Server = await loop.create_unix_server(lambda: _Connection(self), target)
                    finally:
                        os.umask(old_mask)
                    addresses.append(address)
                else:
                    server = await loop.create_server(lambda: _Connection(self), *target)
                    addresses.append(f"tcp://{target[0]}:{server.sockets[0].getsockname()[1]}")
            except OSError as error:
                await self.close()
                raise StoreError(f"the directory cannot listen at {address}: {error}") from error
            self._servers.append(server)
        self.addresses = tuple(addresses)

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        for connection in list(self.connections.values()):
            connection.abort()
        for server in self._servers:
            await server.wait_closed()
        self._servers = []
        self._driver.close()

    def handle(self, event: DirectoryEvent) -> None:
        self._driver.handle(event)

    def _carry_out(self, command: DirectoryCommand) -> None:
        connection = self.connections.get(command.peer)
        if connection is None:
            return
        match command:
            case Found():
                connection.send(wire.encode_found(command))
            case Snapshot():
                connection.send(pack(wire.Op.SNAPSHOT))
            case Copy():
                connection.send(wire.encode_copy(command))
            case Elsewhere():
                connection.send(wire.encode_usage(command.usage))


class _Connection(asyncio.Protocol):
    def __init__(self, server: DirectoryServer) -> None:
        self.number = next(server.numbers)
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._reader = FrameReader(wire.MAX_HELLO_BYTES)
        self._transport: asyncio.Transport | None = None
        self._greeted = False
        self._is_node = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._server.connections[self.number] = self
        self._watch(HELLO_TIMEOUT_S)
        if len(self._server.connections) > MAX_CONNECTIONS:
            self._fail(StoreUnavailable(f"the directory serves at most {MAX_CONNECTIONS} connections"))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._server.connections.pop(self.number, None)
        if self._is_node:
            self._server.handle(Gone(self.number))

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._reader.feed(data):
                self._on_frame(frame)
        except StoreError as error:
            self._fail(error)
            return
        if self._is_node:
            self._watch(SILENT_S)

    def pause_writing(self) -> None:
        """It does not read its answers: it gets no more until it does."""
        assert self._transport is not None
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        assert self._transport is not None
        self._transport.resume_reading()

    def send(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(data)

    def abort(self) -> None:
        assert self._transport is not None
        self._transport.abort()

    def _on_frame(self, frame: Frame) -> None:
        server, op = self._server, wire.Op
        if not self._greeted:
            self._greet(frame)
        elif frame.kind in (op.FIND, op.WANT):
            server.handle(wire.decode_question(self.number, frame))
        elif frame.kind == op.CHANGED:
            server.handle(wire.decode_changed(self.number, frame))
            self.send(pack(op.ACK, request=frame.request))
        elif frame.kind == op.TOLD:
            server.handle(wire.decode_told(self.number, frame))
        elif frame.kind == op.USAGE:
            server.handle(Uses(self.number, wire.decode_usage(frame)))
        elif frame.kind == op.REGISTER:
            self._is_node = True
            server.handle(Registered(self.number, wire.decode_register(frame)))
        elif frame.kind == op.NODES:
            self.send(wire.encode_nodes(server.core.nodes, frame.request))
        elif frame.kind == op.ACK:
            pass  # it lives
        else:
            raise ProtocolError(f"kind {frame.kind} is nothing that the directory is told")

    def _greet(self, frame: Frame) -> None:
        hello = wire.decode_hello(frame)
        if not hmac.compare_digest(hello.token.encode(), self._server.token):
            raise AuthError("wrong cluster token")
        if hello.cluster != self._server.cluster:
            raise AuthError(f"this is the directory of cluster {self._server.cluster!r}, not of {hello.cluster!r}")
        self._greeted = True
        self._reader.max_bytes = wire.MAX_FRAME_BYTES
        if self._timer is not None:
            self._timer.cancel()
        self.send(pack(wire.Op.READY))

    def _fail(self, error: StoreError) -> None:
        assert self._transport is not None
        self._transport.write(encode_error(error))
        self._transport.close()

    def _watch(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self._silent)

    def _silent(self) -> None:
        log.warning("connection %d said nothing in time", self.number)
        self.abort()
