"""The shell of a store node: a shared segment, a data port, and a `StoreCore` that decides.

Control connections (`mooncake.store.connection`) are served on the event loop, data connections by threads, which ask the core
too: so the core has a lock. Clients of this machine read without asking (`mooncake.store.local`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from mooncake.core.errors import AuthError, BadArgument, SegmentError, StoreError, StoreUnavailable
from mooncake.core.event_log import EventLogWriter
from mooncake.core.messages import NodeInfo
from mooncake.core.types import NANOS_PER_S
from mooncake.store import wire
from mooncake.store.connection import Connection
from mooncake.store.core import StoreCore
from mooncake.store.events import (
    ClientGone,
    ClientTenant,
    Command,
    Commit,
    Event,
    Fault,
    Flush,
    Name,
    NodeReport,
    Reply,
    Report,
    Reserve,
    Snapshot,
    SnapshotWanted,
    SsdJob,
    SsdRead,
    SsdRests,
    SsdWritten,
    Tick,
    Usage,
    Used,
)
from mooncake.store.eviction import POLICIES
from mooncake.store.local.readers import LocalReaders
from mooncake.store.local.segment import take_segment
from mooncake.store.ssd import SsdConfig
from mooncake.store.ssd_file import SsdFile
from mooncake.store.ssd_jobs import Moved, SsdJobs
from mooncake.store.ssd_layout import PAGE_BYTES
from mooncake.store.wakeful import Wakeful
from mooncake.transport.frames import Kind, pack
from mooncake.transport.ranges import RangeServer
from mooncake.transport.shm import SHM_DIR, ShmSegment

log = logging.getLogger(__name__)

MAX_DATA_CONNECTIONS = 16
"""Of one client; each is a thread here."""
LOOK_S = 1.0
"""How often it is looked what clients have read by themselves, and whether they are still alive."""
SYNC_S = 5.0
"""How long a client may wait for the directory."""
_END_S = 1.0
"""How long the end waits for data connections."""
_MAX_UNIX_PATH = 107
_TRANSFERS = ("bytes_read", "bytes_written", "read_ns", "write_ns")
"""Of data connections, as `RangeServer` counts them."""
_COUNTERS = ("faults", "auth_errors", "protocol_errors", "blocks_copied", "bytes_copied", "copy_ns", *_TRANSFERS)


class NodeConfig(msgspec.Struct, frozen=True):
    """tcp_port: None, no TCP port; 0, any free one. advertised_host: the name under which others reach the TCP port. ssd_dir:
    where the SSD tier has its file, if there is one. quotas: bytes by tenant (`mooncake.store.quotas`)."""

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
    ssd: SsdConfig = SsdConfig()
    ssd_dir: str = ""
    quotas: dict[str, int] = {}


class Directory(Protocol):
    """As a node sees it."""

    async def synced(self, deadline_s: float) -> bool:
        """Whether, within that time, it knows what was reported until now."""
        ...


class StoreNode:
    """`on_report` is called on the event loop with every report and snapshot of the core; it must not block."""

    event_log: EventLogWriter | None = None
    directory: Directory | None = None

    def __init__(self, config: NodeConfig, on_report: Callable[[NodeReport], None]) -> None:
        self.config = config
        self.epoch = time.time_ns()
        self.addresses: tuple[str, ...] = ()
        self.core: StoreCore
        self.wakeful: Wakeful
        self.lock = threading.Lock()
        """Of the core."""
        self.readers: LocalReaders | None = None
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
        self._syncs: set[asyncio.Task[None]] = set()
        self._looking: asyncio.TimerHandle | None = None
        self._counters = dict.fromkeys(_COUNTERS, 0)
        self._ssd: SsdJobs | None = None

    async def start(self) -> None:
        """Make the segment, take back what is on SSD, and listen. Raises StoreError; then nothing is left behind."""
        config = self.config
        if len(os.fsencode(config.unix_path)) > _MAX_UNIX_PATH:
            raise BadArgument(f"unix_path: {config.unix_path} is longer than {_MAX_UNIX_PATH} bytes")
        self.wakeful = Wakeful()
        try:
            segment, self.readers, adopted = await asyncio.to_thread(
                take_segment,
                config.cluster,
                config.node,
                self.epoch,
                config.capacity_bytes,
                config.alignment,
                config.shm_dir,
            )
            self.segment = segment
            self.core = StoreCore(
                config.capacity_bytes,
                epoch=self.epoch,
                alignment=config.alignment,
                policy=POLICIES[config.eviction](),
                ssd=config.ssd,
                readers=self.readers,
                last_number=self.epoch,  # a time in nanoseconds: no life can have numbered so many
                quotas=config.quotas,
            )
            if config.ssd.capacity_bytes:
                await self._open_ssd(segment.buffer)
            if adopted is not None:
                self.handle(adopted)
            self.addresses = (await self._listen_unix(), *await self._listen_tcp())
        except SegmentError as error:
            await self.close()
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
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_S):
                while self._clients or self.connections:  # their ends are events for the core, and may arm the timer
                    await asyncio.sleep(0.001)
        for timer in (self._timer, self._looking):
            if timer is not None:
                timer.cancel()
        if self.readers is not None:
            self.readers.close()
        if self._ssd is not None:
            ssd, self._ssd = self._ssd, None
            await asyncio.to_thread(ssd.close)
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
        """`StoreCore.metrics`, and what the shell counts."""
        counters = dict(self._counters)
        for connection in self.connections:
            for server in connection.data:
                for name in _TRANSFERS:
                    counters[name] += getattr(server, name)
        num_tables = 0 if self.readers is None else self.readers.num_tables
        with self.lock:
            return self.core.metrics() | counters | {"clients": len(self._clients), "local_readers": num_tables}

    def ssd_moved(self) -> dict[str, Moved]:
        """By direction; empty without an SSD tier."""
        return {} if self._ssd is None else {"write": self._ssd.written, "read": self._ssd.read_back}

    def data_ended(self, server: RangeServer) -> None:
        """What it has moved goes on to count."""
        for name in _TRANSFERS:
            self._counters[name] += getattr(server, name)

    # ------------------------------------------------------------ from connections

    def handle(self, event: Event) -> None:
        """One event through the core, and its commands carried out."""
        if isinstance(event, Reserve | Commit | Name):
            self._take_uses()  # before what is new: told of them later, eviction would take them for newer than that
        now, readers = time.monotonic_ns(), self.readers
        with self.lock:
            if readers is not None:
                readers.begin()
            commands = self.core.handle(event, now)
        if self.event_log is not None:
            self.event_log.append(now, event, commands, readers.answers if readers is not None else ())
        for command in commands:
            self._carry_out(command)
        deadline = self.core.deadline()
        if deadline is not None and (self._timer is None or deadline < self._timer_at):
            self._arm(deadline)

    def allows(self, client: int, number: int, offset: int, size: int, write: bool) -> bool:
        """For data connections, from their threads."""
        with self.lock:
            return self.core.allows(client, number, offset, size, write)

    def attach(self, path: str) -> None:
        """A client reads by itself from now on, and says in this table what. Raises BadArgument."""
        if self.readers is None:
            raise BadArgument("table: this node has no index")
        try:
            self.readers.attach(path)
        except SegmentError as error:
            raise BadArgument(f"table: {error}") from error
        if self._looking is None:
            self._looking = asyncio.get_running_loop().call_later(LOOK_S, self._look)

    def sync(self, connection: Connection, request_id: int) -> None:
        """Answer when the directory knows what is committed now."""
        self.handle(Flush())
        task = asyncio.get_running_loop().create_task(self._sync(connection, request_id))
        self._syncs.add(task)
        task.add_done_callback(self._syncs.discard)

    async def _sync(self, connection: Connection, request_id: int) -> None:
        if self.directory is None or await self.directory.synced(SYNC_S):
            answer = pack(Kind.OK, request=request_id)
        else:
            answer = wire.encode_error(StoreUnavailable("the directory does not answer"), request_id)
        if connection.client in self._clients:
            connection.reply(answer)

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
        connection.minor = hello.minor
        self._clients[connection.client] = connection
        self._sessions[connection.session] = connection
        if hello.tenant in self.config.quotas:
            self.handle(ClientTenant(connection.client, hello.tenant))
        return None

    def welcome(self, connection: Connection) -> wire.Welcome:
        assert self.segment is not None
        config = self.config
        num_entries = 0 if self.readers is None else self.readers.index.num_entries
        return wire.Welcome(
            config.node,
            self.epoch,
            config.capacity_bytes,
            self.segment.path,
            connection.session,
            num_entries,
            config.alignment,
            bool(config.quotas),
        )

    def gone(self, connection: Connection) -> None:
        """A connection ended, and its data connections too: they write into the segment as long as they last."""
        self.connections.discard(connection)
        if connection.client:
            del self._clients[connection.client]
            self._sessions.pop(connection.session, None)
            if self.readers is not None:
                self.readers.drop_abandoned()
            self.handle(ClientGone(connection.client))

    def refuse_data(self, connection: Connection) -> None:
        """No more data connections for this client."""
        self._sessions.pop(connection.session, None)

    # ------------------------------------------------------------ commands

    def _carry_out(self, command: Command) -> None:
        match command:
            case Reply():
                connection = self._clients[command.client]
                connection.reply(wire.encode_reply(command.request_id, command.results, connection.minor))
            case Fault():
                self.count("faults")
                self._clients[command.client].reply(wire.encode_error(BadArgument(command.detail), command.request_id))
            case Report() | Snapshot() | Usage():
                self._on_report(command)
            case SsdJob():
                if self._ssd is not None:
                    self._ssd.submit(command)
            case SsdRests():
                rest_s = command.rest_ns / NANOS_PER_S
                log.error("%d writes to SSD failed in a row: none for %g s", command.num_failures, rest_s)

    async def _open_ssd(self, memory: memoryview) -> None:
        config, loop = self.config, asyncio.get_running_loop()
        if config.alignment % PAGE_BYTES:
            raise SegmentError(f"alignment: an SSD tier needs a multiple of {PAGE_BYTES}, got {config.alignment}")
        geometry = config.ssd.geometry
        file = await asyncio.to_thread(SsdFile.open, config.ssd_dir, config.cluster, config.node, geometry)

        def on_done(event: SsdWritten | SsdRead) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                loop.call_soon_threadsafe(self._ssd_done, event)

        self._ssd = SsdJobs(file, memory, on_done)
        self.handle(await asyncio.to_thread(self._ssd.recover))

    def _ssd_done(self, event: SsdWritten | SsdRead) -> None:
        if self._ssd is not None:  # else we are closing
            self.handle(event)

    def _arm(self, deadline: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = deadline
        delay_s = max(0, deadline - time.monotonic_ns()) / NANOS_PER_S
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.handle(Tick())

    def _look(self) -> None:
        assert self.readers is not None
        self._take_uses()
        self.readers.drop_abandoned()
        more = self.readers.num_tables > 0
        self._looking = asyncio.get_running_loop().call_later(LOOK_S, self._look) if more else None

    def _take_uses(self) -> None:
        uses = self.readers.take_uses() if self.readers is not None else ()
        if uses:
            self.handle(Used(uses))

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
