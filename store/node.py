"""The shell of a store node: a shared segment, a data port, and a `StoreCore` that decides.

A connection's first frame is HELLO. Without a session it is a client's control connection, whose end is that client's
end; with the session's secret it is one of its data connections, handed over to a RangeServer.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import secrets
import socket
import time
from collections.abc import Callable
from typing import cast

import msgspec

from mooncake.core.errors import AuthError, BadArgument, ProtocolError, SegmentError, StoreError, StoreUnavailable
from mooncake.core.event_log import EventLogWriter
from mooncake.core.keys import block_keys_of
from mooncake.core.messages import CacheDelta, CacheSnapshot, NodeInfo
from mooncake.core.types import NANOS_PER_S, Tier
from mooncake.store import wire
from mooncake.store.core import StoreCore
from mooncake.store.events import ClientGone, Command, Event, Fault, Reply, Report, Snapshot, SnapshotWanted, Tick
from mooncake.store.eviction import POLICIES
from mooncake.transport.frames import Frame, FrameReader, Kind, pack
from mooncake.transport.shm import SHM_DIR, ShmSegment
from mooncake.transport.tcp import RangeServer

HELLO_TIMEOUT_S = 5.0
MAX_CONNECTIONS = 1024
MAX_DATA_CONNECTIONS = 16
"""Of one client."""
_MAX_UNIX_PATH = 107
_COUNTERS = ("faults", "auth_errors", "protocol_errors", "bytes_read", "bytes_written", "blocks_copied")


class NodeConfig(msgspec.Struct, frozen=True):
    """tcp_port: None, no TCP port; 0, any free one. advertised_host: the name under which others reach the TCP port."""

    cluster: str
    node: str
    capacity_bytes: int
    token: str
    unix_path: str
    tcp_host: str = "127.0.0.1"
    tcp_port: int | None = None
    advertised_host: str = ""
    alignment: int = 4096
    shm_dir: str = SHM_DIR
    compat: str = ""
    eviction: str = "lru"


class StoreNode:
    """`on_report` is called on the event loop with every delta and snapshot; it must not block."""

    event_log: EventLogWriter | None = None

    def __init__(self, config: NodeConfig, on_report: Callable[[CacheDelta | CacheSnapshot], None]) -> None:
        self.config = config
        self.epoch = time.time_ns()
        self.addresses: tuple[str, ...] = ()
        policy = POLICIES[config.eviction]()
        self.core = StoreCore(config.capacity_bytes, epoch=self.epoch, alignment=config.alignment, policy=policy)
        self.token = config.token.encode()
        self.segment: ShmSegment | None = None
        self.connections: set[Connection] = set()
        self._on_report = on_report
        self._clients: dict[int, Connection] = {}
        self._sessions: dict[bytes, Connection] = {}
        self._last_client = 0
        self._servers: list[asyncio.Server] = []
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0
        self._counters = dict.fromkeys(_COUNTERS, 0)

    async def start(self) -> None:
        """Make the segment and listen. Raises StoreError; then nothing is left behind."""
        config = self.config
        if len(os.fsencode(config.unix_path)) > _MAX_UNIX_PATH:
            raise BadArgument(f"unix_path: {config.unix_path} is longer than {_MAX_UNIX_PATH} bytes")
        create = ShmSegment.create
        try:
            self.segment = await asyncio.to_thread(
                create, config.cluster, config.node, self.epoch, config.capacity_bytes, config.shm_dir
            )
            self.addresses = (await self._listen_unix(), *await self._listen_tcp())
        except SegmentError as error:
            raise StoreError(str(error)) from error
        except OSError as error:
            await self.close()
            raise StoreError(
                f"cannot listen at {config.unix_path} and {config.tcp_host}:{config.tcp_port}: {error}"
            ) from error

    async def close(self) -> None:
        """Ends all connections and frees the segment. Clients that have it mapped keep their pages until they let
        go."""
        for server in self._servers:
            server.close()
        for connection in tuple(self.connections):
            connection.abort()
        for server in self._servers:
            await server.wait_closed()
        if self._servers:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.config.unix_path)
        self._servers = []
        await asyncio.sleep(0)  # the connections' ends are events for the core, and may arm the timer
        if self._timer is not None:
            self._timer.cancel()
        if self.segment is not None:
            self.segment.close()

    @property
    def info(self) -> NodeInfo:
        config = self.config
        return NodeInfo(config.node, self.epoch, self.addresses, config.capacity_bytes, config.compat)

    def snapshot(self) -> None:
        """Report everything: the answer to a SnapshotRequest, and the first report after (re)connecting."""
        self.handle(SnapshotWanted())

    def metrics(self) -> dict[str, int]:
        transferred = {"bytes_read": 0, "bytes_written": 0}
        for connection in self.connections:
            for server in connection.data:
                transferred["bytes_read"] += server.bytes_read
                transferred["bytes_written"] += server.bytes_written
        counters = {name: count + transferred.get(name, 0) for name, count in self._counters.items()}
        return self.core.metrics() | counters | {"clients": len(self._clients)}

    # ------------------------------------------------------------ from connections

    def handle(self, event: Event) -> None:
        """One event through the core, and its commands carried out."""
        now = time.monotonic_ns()
        commands = self.core.handle(event, now)
        if self.event_log is not None:
            self.event_log.append(now, event, commands)
        for command in commands:
            self._carry_out(command)
        deadline = self.core.deadline()
        if deadline is not None and (self._timer is None or deadline < self._timer_at):
            self._arm(deadline)

    def count(self, counter: str, amount: int = 1) -> None:
        self._counters[counter] += amount

    def admit(self, connection: Connection, hello: wire.Hello) -> Connection | None:
        """Give a new control connection its client number; or find the client a data connection belongs to.

        Raises AuthError or StoreUnavailable."""
        if not hmac.compare_digest(hello.token.encode(), self.token):
            raise AuthError("wrong cluster token")
        if hello.session:
            owner = self._sessions.get(hello.session)
            if owner is None:
                raise AuthError("no such session")
            if len(owner.data) >= MAX_DATA_CONNECTIONS:
                raise StoreUnavailable(f"a client has at most {MAX_DATA_CONNECTIONS} data connections")
            return owner
        self._last_client += 1
        connection.client = self._last_client
        connection.session = secrets.token_bytes(16)
        self._clients[connection.client] = connection
        self._sessions[connection.session] = connection
        return None

    def welcome(self, connection: Connection) -> wire.Welcome:
        assert self.segment is not None
        config = self.config
        return wire.Welcome(config.node, self.epoch, config.capacity_bytes, self.segment.path, connection.session)

    def gone(self, connection: Connection) -> None:
        """A connection ended. Data connections of a client are cut before its claims are freed: they write into the
        segment."""
        self.connections.discard(connection)
        if connection.client:
            del self._clients[connection.client]
            del self._sessions[connection.session]
            for server in tuple(connection.data):
                server.abort()
            self.handle(ClientGone(connection.client))

    # ------------------------------------------------------------ commands

    def _carry_out(self, command: Command) -> None:
        match command:
            case Reply():
                self._clients[command.client].reply(wire.encode_reply(command.request_id, command.results))
            case Fault():
                self.count("faults")
                self._clients[command.client].reply(wire.encode_error(BadArgument(command.detail), command.request_id))
            case Report():  # the directory speaks of blocks: one node holds one shard of each
                added, removed = block_keys_of(command.added), block_keys_of(command.removed)
                self._on_report(CacheDelta(self.config.node, command.epoch, command.seq, Tier.DRAM, added, removed))
            case Snapshot():
                keys = block_keys_of(command.keys)
                self._on_report(CacheSnapshot(self.config.node, command.epoch, command.seq, Tier.DRAM, keys))

    def _arm(self, deadline: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = deadline
        delay_s = max(0, deadline - time.monotonic_ns()) / NANOS_PER_S
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.handle(Tick())
        for client in self._clients.values():
            client.recheck()

    async def _listen_unix(self) -> str:
        path = self.config.unix_path
        old_mask = os.umask(0o177)  # the socket is for this user only, from its first moment
        try:
            self._servers.append(await asyncio.get_running_loop().create_unix_server(lambda: Connection(self), path))
        finally:
            os.umask(old_mask)
        return f"unix:{path}"

    async def _listen_tcp(self) -> list[str]:
        host, port = self.config.tcp_host, self.config.tcp_port
        if port is None:
            return []
        server = await asyncio.get_running_loop().create_server(lambda: Connection(self), host, port)
        self._servers.append(server)
        return [f"tcp://{self.config.advertised_host or host}:{server.sockets[0].getsockname()[1]}"]


class Connection(asyncio.Protocol):
    """The serving end of one connection until it turns out to be a data connection."""

    def __init__(self, node: StoreNode) -> None:
        self.client = 0
        self.session = b""
        self.data: list[RangeServer] = []
        self._node = node
        self._reader = FrameReader(wire.MAX_HELLO_BYTES)
        self._transport: asyncio.Transport | None = None
        self._hello_timer: asyncio.TimerHandle | None = None
        self._ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are not subclasses of it
        self._node.connections.add(self)
        self._hello_timer = asyncio.get_running_loop().call_later(HELLO_TIMEOUT_S, self._hello_late)
        if len(self._node.connections) > MAX_CONNECTIONS:
            self._fail(StoreUnavailable(f"the node serves at most {MAX_CONNECTIONS} connections"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        self._stop_hello_timer()
        self._node.gone(self)

    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        try:
            for frame in self._reader.feed(data):
                if self.client:
                    self._node.handle(wire.decode_request(self.client, frame))
                    self.recheck()
                else:
                    self._on_hello(frame)
        except StoreError as error:
            self._fail(error)

    def pause_writing(self) -> None:
        """The client does not read its answers: it gets no more until it does."""
        assert self._transport is not None
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        assert self._transport is not None
        self._transport.resume_reading()

    def reply(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(data)

    def recheck(self) -> None:
        for server in tuple(self.data):
            server.recheck()

    def abort(self) -> None:
        assert self._transport is not None
        for server in tuple(self.data):
            server.abort()
        self._transport.abort()

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
        node, transport = self._node, self._transport
        assert node.segment is not None and transport is not None

        def allows(number: int, offset: int, size: int, write: bool) -> bool:
            return node.core.allows(owner.client, number, offset, size, write)

        def on_lost(server: RangeServer) -> None:
            owner.data.remove(server)
            node.count("bytes_read", server.bytes_read)
            node.count("bytes_written", server.bytes_written)

        server = RangeServer(node.segment.buffer, allows, on_lost)
        owner.data.append(server)
        node.connections.discard(self)
        self._ended = True
        transport.set_protocol(server)
        server.connection_made(transport)
        transport.write(pack(Kind.OK))

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
