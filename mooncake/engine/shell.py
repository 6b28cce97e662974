"""What the prefill and the decode service have in common: engine, store and links around a core.

Turns commands into calls and answers into events; decides nothing. Failures of the store come back to the core as refusals
and empty sources, which it knows how to live with.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from mooncake.core.errors import StoreError
from mooncake.core.messages import CONDUCTOR, AnyMessage, Send
from mooncake.core.types import KvSource
from mooncake.engine.attempts import (
    AbortSequence,
    CloseSource,
    ListBlocks,
    LoadBlocks,
    OpenSource,
    PeerGone,
    PeerOpened,
    Received,
    RunSequence,
    SourceOpened,
)
from mooncake.engine.base import Engine
from mooncake.engine.kv_objects import SourceReader, StoredTarget, TargetWriter, open_source
from mooncake.rpc.driver import CoreDriver
from mooncake.rpc.stream import Link
from mooncake.store.operations import StoreOperations

log = logging.getLogger(__name__)


StoreFor = Callable[[KvSource], Awaitable[StoreOperations]]
"""A connected client of the source's node. Raises StoreError."""


class InstanceShell:
    """driver and engine are set by the service before the first event, as they need this object to exist."""

    driver: CoreDriver
    engine: Engine

    def __init__(self, store_for: StoreFor, shard: bytes, block_tokens: int) -> None:
        self.shard = shard
        self.block_tokens = block_tokens
        self.writers: dict[int, TargetWriter | StoredTarget] = {}
        self._store_for = store_for
        self._links: dict[str, Link] = {}
        self._readers: dict[int, SourceReader] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._actions: dict[type, Callable[[Any], None]] = {
            Send: self._send,
            OpenSource: lambda command: self.spawn(self._open_source(command)),
            CloseSource: lambda command: self.spawn(self._close_source(command.seq)),
            RunSequence: self._run_sequence,
            LoadBlocks: self._load_blocks,
            ListBlocks: lambda command: self.engine.list_blocks(),
            AbortSequence: lambda command: self.engine.abort(command.seq),
        }

    def add_action(self, command: type, action: Callable[[Any], None]) -> None:
        self._actions[command] = action

    def perform(self, command: Any) -> None:
        self._actions[type(command)](command)

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a store call failed unexpectedly", exc_info=task.exception())

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ------------------------------------------------------------------ links

    def opened(self, link: Link) -> None:
        self._links[link.peer] = link
        self.driver.handle(PeerOpened(link.peer))

    def drive(self, driver: CoreDriver) -> None:
        """Give what happens to another core from now on, and first the connections that there are."""
        self.driver = driver
        for peer in list(self._links):
            driver.handle(PeerOpened(peer))

    def closed(self, link: Link) -> None:
        """A link that was replaced by a newer one of the same peer is nobody's loss."""
        if self._links.get(link.peer) is link:
            del self._links[link.peer]
            self.driver.handle(PeerGone(link.peer))

    def received(self, link: Link, messages: list[AnyMessage]) -> None:
        for message in messages:
            self.driver.handle(Received(link.peer, message))

    def _send(self, command: Send) -> None:
        link = self._links.get(command.to)
        if link is not None:
            link.send(command.message)
        elif command.to != CONDUCTOR:
            log.debug("no link to %s for %s", command.to, type(command.message).__name__)

    # ------------------------------------------------------------------ sources and sequences

    async def _open_source(self, command: OpenSource) -> None:
        num_tokens = 0
        try:
            client = await self._store_for(command.source)
            reader = await open_source(client, command.source, self.shard, self.block_tokens, command.tenant)
            num_tokens = reader.num_tokens
            if num_tokens:
                self._readers[command.seq] = reader
            else:
                await reader.close()
        except StoreError as error:
            log.warning("source at %s: %s", command.source.node, error)
        self.driver.handle(SourceOpened(command.seq, num_tokens))

    async def _close_source(self, seq: int) -> None:
        reader = self._readers.pop(seq)
        try:
            await reader.close()
        except StoreError as error:
            log.warning("release of a source: %s", error)

    def _run_sequence(self, command: RunSequence) -> None:
        reader = self._readers.get(command.seq) if command.source_tokens else None
        writer = self.writers.get(command.seq) if command.store else None
        self.engine.submit(
            command.seq, command.job, one_token=command.one_token, reader=reader, writer=writer, turn=command.turn
        )

    def _load_blocks(self, command: LoadBlocks) -> None:
        self.engine.load_ahead(command.seq, command.block_keys, command.start, self._readers[command.seq])
