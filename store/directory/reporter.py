"""A store node's connection to its directory: it registers, reports, and is asked for copies. Made again when it breaks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Sequence

from mooncake.core.errors import AuthError, ProtocolError, StoreError, StoreUnavailable
from mooncake.core.messages import NodeInfo
from mooncake.store.directory import wire
from mooncake.store.directory.core import TIERS
from mooncake.store.events import NodeReport, Snapshot, Usage, UsedElsewhere
from mooncake.store.node import StoreNode
from mooncake.store.wire import decode_error, is_error
from mooncake.transport.frames import Frame, FrameReader, pack
from mooncake.transport.tcp import parse_address

log = logging.getLogger(__name__)

CONNECT_S = 5.0
BACKOFF_S = (0.05, 1.0)
BEAT_S = 2.0
OUTBOX_BYTES = 64 << 20
"""What waits to be sent; a directory that is so far behind gets a snapshot when it is back."""

OnCopy = Callable[[NodeInfo, tuple[bytes, ...]], None]
"""source, object keys"""


class DirectoryReporter:
    """The node's reports go to `report`; `synced` waits until all of them have arrived."""

    def __init__(self, node: StoreNode, addresses: Sequence[str], on_copy: OnCopy) -> None:
        self._node = node
        self._addresses = tuple(addresses)
        self._on_copy = on_copy
        self._writer: asyncio.StreamWriter | None = None
        self._last_sent = 0
        self._last_acked = 0
        self._acked = asyncio.Condition()
        self._task = asyncio.create_task(self._run())

    @property
    def connected(self) -> bool:
        return self._writer is not None

    def report(self, command: NodeReport) -> None:
        writer = self._writer
        if writer is None:
            return
        if isinstance(command, Snapshot):
            for frame in wire.encode_told(command.tier, command.seq, command.keys):
                writer.write(frame)
        elif isinstance(command, Usage):
            writer.write(wire.encode_usage(command.usage))
        elif len(command.added) + len(command.removed) <= wire.MAX_KEYS:  # else the directory sees the gap
            self._last_sent += 1
            number = self._last_sent & 0xFFFFFFFF
            writer.write(wire.encode_changed(command.tier, command.seq, command.added, command.removed, number))
        if writer.transport.get_write_buffer_size() > OUTBOX_BYTES:
            log.warning("the directory does not read; connecting anew")
            writer.transport.abort()

    async def synced(self, deadline_s: float) -> bool:
        """Whether the directory knows now what was reported until the call."""
        number = self._last_sent
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s), self._acked:
                await self._acked.wait_for(lambda: self._last_acked >= number)
                return True
        return False

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    # ------------------------------------------------------------ the connection

    async def _run(self) -> None:
        delay_s, longest_s = BACKOFF_S
        while True:
            for address in self._addresses:
                try:
                    await self._serve(address)
                    delay_s = BACKOFF_S[0]
                except (StoreError, OSError, TimeoutError) as error:
                    log.info("directory %s: %s", address, error)
                    if isinstance(error, AuthError):
                        log.error("directory %s refuses this node: %s", address, error)
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, longest_s)

    async def _serve(self, address: str) -> None:
        """Until it breaks; raises what broke it."""
        config = self._node.config
        async with asyncio.timeout(CONNECT_S):
            reader, writer = await _connect(address)
        beats: asyncio.Task[None] | None = None
        try:
            writer.write(wire.encode_hello(wire.Hello(wire.VERSION, config.cluster, config.token, config.node)))
            frames = FrameReader(wire.MAX_FRAME_BYTES)
            async with asyncio.timeout(CONNECT_S):
                rest = await _await_ready(reader, frames)
            writer.write(wire.encode_register(self._node.info))
            self._writer = writer
            beats = asyncio.create_task(_beat(writer))
            while True:
                for frame in rest:
                    await self._on_frame(frame)
                data = await reader.read(1 << 16)
                if not data:
                    raise StoreUnavailable("the directory closed the connection")
                rest = frames.feed(data)
        finally:
            self._writer = None
            if beats is not None:
                beats.cancel()
            writer.transport.abort()

    async def _on_frame(self, frame: Frame) -> None:
        if is_error(frame):
            raise decode_error(frame)
        if frame.kind == wire.Op.SNAPSHOT:
            self._node.snapshot()
            assert self._writer is not None
            for tier in TIERS:
                if tier not in self._node.core.tiers:
                    self._writer.writelines(wire.encode_told(tier, 0, ()))
        elif frame.kind == wire.Op.ACK:
            async with self._acked:
                self._last_acked = self._last_sent - ((self._last_sent - frame.request) & 0xFFFFFFFF)
                self._acked.notify_all()
        elif frame.kind == wire.Op.USAGE:
            self._node.handle(UsedElsewhere(wire.decode_usage(frame)))
        elif frame.kind == wire.Op.COPY:
            self._on_copy(*wire.decode_copy(frame))
        else:
            raise ProtocolError(f"kind {frame.kind} is nothing that a node is told")


async def _connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    family, target = parse_address(address)
    if family == socket.AF_UNIX:
        return await asyncio.open_unix_connection(str(target))
    return await asyncio.open_connection(*target)


async def _await_ready(reader: asyncio.StreamReader, frames: FrameReader) -> list[Frame]:
    """Frames behind it."""
    while True:
        data = await reader.read(1 << 16)
        if not data:
            raise StoreUnavailable("the directory closed the connection")
        read = frames.feed(data)
        if read:
            if is_error(read[0]):
                raise decode_error(read[0])
            if read[0].kind != wire.Op.READY:
                raise ProtocolError(f"HELLO must be answered by READY, got kind {read[0].kind}")
            return read[1:]


async def _beat(writer: asyncio.StreamWriter) -> None:
    while True:
        await asyncio.sleep(BEAT_S)
        writer.write(pack(wire.Op.ACK))
